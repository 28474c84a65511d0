"""What the extra `train` brings, and the one line where a command misses it."""

import importlib.util
import itertools
import sys
from collections.abc import Sequence

TRAIN = ("datasets", "flax", "jinja2", "orbax", "rich", "safetensors", "transformers", "yaml")
"""Modules that the commands import and the transformation, estimators and losses do not."""


def missing(modules: Sequence[str] = TRAIN) -> list[str]:
    """Those that are not installed; none is imported."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def require_train(program: str) -> None:
    """Ends the process with one line and exit code 2 where a command could not be imported.

    Args:
      program: What was called, for the line.
    """
    if names := missing():
        print(
            f"error: {program}: needs {', '.join(names)}; pip install 'pgpo_jax[train]'",
            file=sys.stderr,
        )
        raise SystemExit(2)


def check_command(words: Sequence[str]) -> None:
    """`require_train` where the interpreter was called as `python -m pgpo_jax.COMMAND`.

    The package is imported before the command is, so this comes before any import that fails.

    Args:
      words: The interpreter's own command line, `sys.orig_argv`.
    """
    program = dict(itertools.pairwise(words)).get("-m", "")
    if program.startswith("pgpo_jax."):
        require_train(f"python -m {program}")
