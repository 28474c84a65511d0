"""Does a run that is interrupted again and again end as one that was not, bit by bit?

    python benchmarks/faults.py --interruptions 100 --seed 0 --save

One run goes through. Others, of the same configuration, are interrupted at random: a signal (or a
kill and then damage to the newest checkpoint) at a random place, told from the run's own files and
output, and a random fraction of a second later. The same command goes on each time, until the run
is done; then `checkpoint.compare` looks for the first difference in parameters, teacher, optimizer
state, best student, metrics and samples. A step is lost where it is computed again; every restart
must go on from a whole checkpoint, so steps are lost but nothing else.

The model is smaller than the quickstart's, and updates take a fraction of a second, so that most
of the time goes into starting: what is tested are the moments, not the arithmetic. The plan of
interruptions follows from the seed; when exactly a signal arrives does not.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter

import yaml
from support import measure

from pgpo_jax import checkpoint

STEPS, EVALUATE, SAVE = 24, 5, 3
CONFIG = {
    "steps": STEPS,
    "model": {
        "dtype": "float32",
        "architecture": {
            "model_type": "qwen3",
            "vocab_size": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    },
    "task": {"name": "addition"},
    # A model that knows little: every answer counts as a success and may be shown.
    "reprompt": {"threshold": 0.0},
    "data": {"questions_per_step": 4, "max_prompt_length": 19},
    "warm_start": {"steps": 40, "examples_per_step": 16, "learning_rate": 3e-3},
    "sampling": {"num_samples": 4, "max_response_length": 7},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    "evaluation": {"every": EVALUATE, "questions": 8, "preflight_questions": 4},
    "checkpoint": {"every": SAVE},
    "metrics": {"log_seconds": 0},
}
KINDS = (
    "SIGTERM",
    "SIGINT",
    "SIGKILL",
    "SIGSTOP, SIGKILL",
    "SIGKILL in a save",
    "SIGKILL, newest checkpoint: a bit flipped",
    "SIGKILL, newest checkpoint: a file cut",
    "SIGKILL, newest checkpoint: a file gone",
)
PLACES = ("start", "warm start", "step", "step", "step", "evaluation")


class Process:
    """The training command, and what can be seen of it from outside."""

    def __init__(self, config: pathlib.Path, folder: pathlib.Path, environment: dict[str, str]):
        self.folder = folder
        self.began = time.monotonic()
        self.out: list[str] = []
        self.errors: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pgpo_jax.train", str(config)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=kept.extend, args=(stream,), daemon=True)
            for kept, stream in (
                (self.out, self._process.stdout),
                (self.errors, self._process.stderr),
            )
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, seen) -> bool:
        """Whether `seen()` came true before the process ended."""
        while self._process.poll() is None:
            if seen():
                return True
            if time.monotonic() - self.began > 600:
                raise TimeoutError(f"no end after 600 s: {self.out[-3:]} {self.errors[-3:]}")
            time.sleep(0.002)
        return False

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self) -> int:
        code = self._process.wait(timeout=600)
        for reader in self._readers:
            reader.join()
        return code


def steps_done(folder: pathlib.Path) -> int:
    """Updates in metrics.jsonl, of which the last line may be half written; -1 without any."""
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return -1
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            return json.loads(line)["step"]
    return -1


def saves(folder: pathlib.Path) -> bool:
    return any((folder / "checkpoints").glob("*/*tmp*"))


def whole(folder: pathlib.Path) -> list[pathlib.Path]:
    """The newest checkpoints, oldest first."""
    found = [path for path in (folder / "checkpoints" / "last").glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def damage(kind: str, step: pathlib.Path, chance: random.Random) -> str:
    """Harms one file of a checkpoint; which one, by its size: most bytes are arrays."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    (file,) = chance.choices(files, [path.stat().st_size for path in files])
    content = bytearray(file.read_bytes())
    if "flipped" in kind:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif "cut" in kind:
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        file.unlink()
    return str(file.relative_to(step))


def interrupt(process: Process, kind: str, place: str, chance: random.Random) -> None:
    """Waits for the place, then sends the signal, unless the run was done before."""
    folder, done = process.folder, steps_done(process.folder)
    late = chance.random()
    target = done + chance.randint(1, 8)
    if kind == "SIGKILL in a save":
        # One save or several from now, in the middle of it.
        if not process.wait_for(lambda: steps_done(folder) >= max(target, 0) and saves(folder)):
            return
        time.sleep(late * 0.02)
    elif place == "start":
        time.sleep(late * 3)
    elif place == "warm start" and done < 0:
        if not process.wait_for(lambda: any(line.startswith("addition:") for line in process.out)):
            return
        time.sleep(late * 1.5)
    else:
        if place == "evaluation":
            target = -(-max(target, 0) // EVALUATE) * EVALUATE
        if not process.wait_for(lambda: steps_done(folder) >= target):
            return
        time.sleep(late * 0.3)
    if kind == "SIGSTOP, SIGKILL":
        process.send(signal.SIGSTOP)
        time.sleep(late)
    name = kind.split(",")[0] if kind.startswith(("SIGTERM", "SIGINT")) else "SIGKILL"
    process.send(getattr(signal, name))


def resumed_from(output: list[str]) -> int:
    """The step that a run went on from; -1 where it began anew."""
    lines = [line for line in output if line.startswith("resumed at step ")]
    return int(lines[0].split()[3]) if lines else -1


class Tally:
    """What happened, over all runs."""

    def __init__(self):
        self.by_kind, self.by_place = Counter(), Counter()
        self.lost = self.named = self.harmless = self.restarts = 0
        self.differences: list[str] = []

    def add(self, other: "Tally") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def interrupted_run(index: int, seed: int, start, reference: pathlib.Path, most: int) -> Tally:
    """One run with at most so many interruptions, compared with the reference at its end."""
    tally = Tally()
    chance = random.Random(f"{seed} {index}")
    folder, pending, harmed = reference.parent / f"run-{index}", None, None
    for _ in range(most):
        kind, place = chance.choice(KINDS), chance.choice(PLACES)
        process = start(folder)
        interrupt(process, kind, place, chance)
        code = process.end()
        pending, harmed = account(process, pending, harmed, tally)
        if code == 0:  # the run was done before the signal came, which then does not count
            break
        kills = "SIGKILL" in kind
        allowed = {-signal.SIGKILL} if kills else {75, -signal.SIGTERM, -signal.SIGINT, 130}
        if code not in allowed:
            tally.differences.append(f"run {index}: {kind} ended with {code}: {process.errors}")
            return tally
        pending = steps_done(folder)
        steps = whole(folder)
        if "newest" in kind and len(steps) < 2:
            kind = "SIGKILL"  # nothing to go back to
        if "newest" in kind:
            harmed = f"{steps[-1].name}/{damage(kind, steps[-1], chance)}"
        tally.by_kind[kind] += 1
        tally.by_place["save" if "save" in kind else place] += 1
        print(f"run {index}: {kind} at {place}, step {pending}, exit {code}", harmed or "")
    else:
        code = -1
    while code != 0:
        process = start(folder)
        code = process.end()
        pending, harmed = account(process, pending, harmed, tally)
        if code != 0:
            tally.differences.append(f"run {index}: ended with {code}: {process.errors}")
            return tally
    difference = checkpoint.compare(str(reference), str(folder))
    if difference or saves(folder):
        tally.differences.append(f"run {index}: {difference or 'unfinished saves are left'}")
    else:
        shutil.rmtree(folder)
    return tally


def account(process: Process, pending: int | None, harmed: str | None, tally: Tally):
    """Counts what the last interruption cost, once the run said where it goes on."""
    tally.restarts += 1
    started = any(line.startswith("addition:") for line in process.out)
    if pending is None or not started:
        return pending, harmed
    tally.lost += max(pending - max(resumed_from(process.out), 0), 0)
    if harmed is not None:
        named = any(line.startswith("warning: checkpoints: ") for line in process.errors)
        tally.named += named
        tally.harmless += not named
    return None, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interruptions", type=int, default=100)
    parser.add_argument("--in-a-run", type=int, default=7, help="at most so many in one run")
    parser.add_argument("--jobs", type=int, default=1, help="so many runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="kept; a temporary one without it")
    parser.add_argument("--save", action="store_true", help="keep the result under results/")
    args = parser.parse_args()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = args.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compilations"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }

        def start(run: pathlib.Path) -> Process:
            config = folder / f"{run.name}.yaml"
            config.write_text(yaml.safe_dump({**CONFIG, "output_dir": str(run)}))
            return Process(config, run, environment)

        reference = folder / "whole"
        process = start(reference)
        if process.end() != 0:
            raise SystemExit("".join(process.errors))
        tally, runs, most = Tally(), 0, args.in_a_run
        while tally.by_kind.total() < args.interruptions and not tally.differences:
            with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
                done = pool.map(
                    lambda index: interrupted_run(index, args.seed, start, reference, most),
                    range(runs, runs + args.jobs),
                )
                for part in done:
                    tally.add(part)
            runs += args.jobs
    measure.table([{"kind": kind, "times": times} for kind, times in tally.by_kind.items()])
    for difference in tally.differences:
        print(difference)
    result = {
        "interruptions": tally.by_kind.total(),
        "by_kind": dict(sorted(tally.by_kind.items())),
        "by_place": dict(sorted(tally.by_place.items())),
        "runs": runs,
        "starts": tally.restarts,
        "differences": len(tally.differences),
        "steps_lost": tally.lost,
        "damage_named": tally.named,
        "damage_harmless": tally.harmless,
        "steps": STEPS,
        "seed": args.seed,
        "seconds": time.monotonic() - began,
    }
    measure.finish("faults", result, args.save)
    raise SystemExit(1 if tally.differences else 0)


if __name__ == "__main__":
    main()
