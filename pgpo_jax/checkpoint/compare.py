"""Comparison of two runs, bit by bit: checkpoints, metrics and samples."""

import itertools
import os
from collections.abc import Iterator

from pgpo_jax.checkpoint import digest
from pgpo_jax.checkpoint.integrity import first_line
from pgpo_jax.checkpoint.store import Checkpoints
from pgpo_jax.errors import InputError
from pgpo_jax.logs import jsonl


def compare(one: str, other: str) -> str | None:
    """Where two runs differ first: newest checkpoint, metrics or samples; None if nowhere.

    Args:
      one: Folder of a run, whose `config.yaml` says where its checkpoints are.
      other: Another.

    Raises:
      InputError: A folder is no run, or its checkpoint cannot be read.
    """
    return next(
        itertools.chain(_array_differences(one, other), jsonl.differences(one, other)), None
    )


def _array_differences(*runs: str) -> Iterator[str]:
    saved = []
    for run in runs:
        with Checkpoints(_checkpoints_of(run), read_only=True) as checkpoints:
            arrays = checkpoints.arrays()
            if checkpoints.best() is not None:
                best = checkpoints.arrays("best")
                arrays |= {f"best/{path}": array for path, array in best.items()}
            saved.append(arrays)
    return digest.array_differences(*saved, names=runs)


def _checkpoints_of(run: str) -> str:
    import yaml

    path = os.path.join(run, "config.yaml")
    try:
        with open(path, encoding="utf-8") as file:
            section = yaml.safe_load(file).get("checkpoint") or {}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"RUN: {run} is no run ({path}: {first_line(error)})") from error
    return section.get("path") or os.path.join(run, "checkpoints")
