"""Training that is hit by a signal at a certain place: `python tests/faulty.py PLACE TIMES SIGNAL
CONFIG ...`, or `with hit(place, times, signal):` around it in this process.

Everything that runs is the real thing; at the TIMES-th call of the function that stands for a place
the process first sends itself the signal.
"""

import contextlib
import functools
import importlib
import os
import pathlib
import signal
import sys
from unittest import mock

# A place in the run -> module, function. The signal comes before the call (`after` it: see below).
PLACES = {
    "warm start": ("pgpo_jax.warm_start", "_encode"),
    "rollout": ("pgpo_jax.train", "rollout"),
    "verification": ("pgpo_jax.train", "verify"),
    "update": ("pgpo_jax.train", "make_updates"),
    "metrics": ("pgpo_jax.logs.writer", "Writer.write"),
    "samples": ("pgpo_jax.logs.writer", "Writer.samples"),
    "evaluation": ("pgpo_jax.evaluation", "verify"),
    "held-out batch": ("pgpo_jax.evaluation", "rollout"),
    "best": ("pgpo_jax.checkpoint", "Checkpoints.save_best"),
    "save": ("pgpo_jax.checkpoint", "Checkpoints.save"),
    "commit": ("os", "rename"),
    "deletion": ("shutil", "rmtree"),
    "config": ("os", "replace"),
    "cut": ("pgpo_jax.logs.jsonl", "Lines.__init__"),
}
AFTER = {"update", "best", "save", "cut"}  # in the middle of what the call has begun


@contextlib.contextmanager
def hit(place, times=1, number=signal.SIGKILL):
    """Sends this process the signal when the place is reached for the `times`-th time."""
    module, name = PLACES[place]
    *owners, attribute = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, attribute), []

    def strike(*args):
        if place == "commit" and not pathlib.Path(str(args[1])).name.isdigit():
            return  # of a part of a checkpoint
        calls.append(place)
        if len(calls) == times:
            os.kill(os.getpid(), number)

    @functools.wraps(original)
    def call(*args, **named):
        if place not in AFTER:
            strike(*args)
            return original(*args, **named)
        result = original(*args, **named)
        if place == "update":  # what makes the update made one: strike once it is on its way
            return lambda *arguments: (result(*arguments), strike())[0]
        strike(*args)
        return result

    with mock.patch.object(owner, attribute, call):
        yield calls


if __name__ == "__main__":
    from pgpo_jax import train
    from pgpo_jax.errors import command

    place, times, number, *arguments = sys.argv[1:]
    with hit(place, int(times), getattr(signal, number)):
        command(train.main, arguments)
