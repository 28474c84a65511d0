"""Makes and scores questions of Reasoning Gym in a process of its own (see `workers.py`).

Run as a file, `NAME OPTIONS SEED SIZE`, so that it imports neither jax nor the package. A request
`[index, answer, seconds]` is answered with the score of an answer to a question, or, where `answer`
is null, with the question, its answer and the score of that. Some scorers evaluate what a model
wrote as an expression, and some take for ever: the process ends when a request takes too long, has
limits of memory that the system enforces, and can then write no file, start no process and open no
connection. That stops accidents; it is no sandbox.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from typing import Any

MEMORY = 2**32
"""Bytes of address space; some data sets load tables."""
REFUSED = ("os.", "shutil.", "socket.", "subprocess.", "ctypes.", "signal.", "sys.addaudithook")
"""Audit events (PEP 578) that scoring an answer has no need of."""
ALLOWED = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")


def create(name: str, options: dict[str, Any], seed: int, size: int) -> Any:
    """The data set.

    Raises:
      ValueError: There is none of this name, or it refuses the options; in words.
    """
    import dataclasses
    import difflib

    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3) or sorted(DATASETS)
        raise ValueError(f"task.dataset: got {name!r}; Reasoning Gym has {', '.join(near)}")
    fields = {entry.name for entry in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    if unknown := sorted(options.keys() - fields):
        raise ValueError(
            f"task.options: got {unknown[0]}; {name} has {', '.join(sorted(fields)) or 'none'}"
        )
    try:
        return create_dataset(name, seed=seed, size=size, **options)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"task.options: got {json.dumps(options)}; {name} says {said}") from error


def reply(dataset: Any, index: int, answer: str | None) -> Any:
    """The score of an answer; for None the question with its own answer and the score of that."""
    entry = dataset[index]
    if answer is not None:
        return float(dataset.score_answer(answer, entry))
    own = entry["answer"]
    score = float(dataset.score_answer(own, entry)) if isinstance(own, str) else 0.0
    return [entry["question"], own, score]


def confine() -> None:
    """From here on the process only computes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if writes or (event.startswith(REFUSED) and event not in ALLOWED):
        raise PermissionError(f"{event}: an answer is only compared")


def main(name: str, options: str, seed: str, size: str) -> None:
    """Serves requests from stdin until it closes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # whatever a library prints is not an answer

    def say(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        dataset = create(name, json.loads(options), int(seed), int(size))
    except ValueError as error:
        return say(str(error))
    confine()
    with contextlib.suppress(Exception):  # a question that cannot be made is its asker's to report
        reply(dataset, 0, None)  # imports what scoring needs before the clock runs
    say("ready")
    for line in sys.stdin:
        index, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # the default action ends the process
        try:
            found = reply(dataset, index, answer)
        except Exception:  # a response must not end the worker
            found = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
