"""How long are the programs of a step in the sandbox?

256 responses of 10 tests each, all different and all right, so that every test is run: programs
that read and print, and functions that asserts call. A test costs a fork (an assert two: the test
has a process of its own), which is about 2 to 5 ms of a core; a sandbox is started once for each
worker. The target is 20 s on two cores, for either kind.

    python benchmarks/sandbox.py [--responses 256] [--tests 10] [--workers 2] [--save]
"""

import argparse
import os
import time

from support import measure

from pgpo_jax.tasks import programs, workers
from pgpo_jax.tasks.task import Question, TaskConfig

TARGET = 20.0
"""Seconds, for 256 responses of 10 tests."""


def questions(kind: str, responses: int, tests: int) -> tuple[list[Question], list[str]]:
    """Questions, and a right program for each."""
    found = []
    for index in range(responses):
        if kind == "asserts":
            rows = [f"assert f({x}) == {x * index}" for x in range(tests)]
            program = f"def f(x):\n    return {index} * x\n"
        else:
            rows = [{"input": f"{x}\n", "output": f"{x * index}\n"} for x in range(tests)]
            program = f"print({index} * int(input()))\n"
        row = {"prompt": "multiply", "tests": rows}
        question = Question(({"role": "user", "content": "multiply"},), "", str(index), row)
        found.append((question, f"```python\n{program}```"))
    asked, answers = zip(*found, strict=True)
    return list(asked), list(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--tests", type=int, default=10)
    parser.add_argument("--workers", type=int, default=workers.cores())
    parser.add_argument("--sandbox", choices=("bubblewrap", "none"), default="bubblewrap")
    parser.add_argument("--save", action="store_true", help="keep the result under results/")
    args = parser.parse_args()
    config = TaskConfig(name="code", workers=args.workers, sandbox=args.sandbox, time_limit=60.0)
    verify = programs.verify_programs(config)
    rows, seconds = [], {}
    for kind in ("stdin", "asserts"):
        asked, answers = questions(kind, args.responses, args.tests)
        start = time.perf_counter()
        outcomes = verify(asked, answers)
        seconds[kind] = time.perf_counter() - start
        if any(outcome.reward < 1 for outcome in outcomes):
            raise SystemExit(f"{kind}: a right program got a reward below 1")
        each = 1000 * seconds[kind] * args.workers / (args.responses * args.tests)
        rows.append({"tests": kind, "seconds": seconds[kind], "worker ms per test": each})
    measure.table(rows)
    result = {
        "responses": args.responses,
        "tests": args.tests,
        "workers": args.workers,
        "sandbox": args.sandbox,
        "seconds": seconds,
        "load_average": os.getloadavg()[0],
    }
    measure.finish(f"sandbox_{args.workers}_workers", result, args.save)


if __name__ == "__main__":
    main()
