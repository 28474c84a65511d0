"""Whose a run's folder is: the run that its config.yaml states, and no other."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import draccus

from pgpo_jax import fields, sharding
from pgpo_jax.config import Config, dump, load
from pgpo_jax.errors import InputError

FREE = {"steps", "output_dir", "mesh", "distributed", "metrics", "checkpoint", "alarms"}
FREE |= {"evaluation.every", "evaluation.preflight_questions", "data.micro_batches"}
"""Fields and sections that may change when a run is resumed: they do not change what it computes,
but for rounding. The rest of `evaluation` may not, or its numbers could not be compared."""


def claim_folder(config: Config) -> str:
    """Writes config.yaml; a folder that holds another run is refused, so that nothing is lost.

    Returns:
      What changed since the run was started, in words; empty where nothing did.
    """
    path = os.path.join(config.output_dir, "config.yaml")
    changes = []
    if os.path.exists(path):
        before, now = (dict(_flat(draccus.encode(c))) for c in (load(path), config))
        for name in sorted(before.keys() | now.keys()):
            was, is_now = before.get(name), now.get(name)
            if was == is_now:
                continue
            free = config.checkpoint.accept_changes or {name, name.partition(".")[0]} & FREE
            if not free:
                raise InputError(
                    f"{name}: got {fields.show(is_now)}; {config.output_dir} holds a run with "
                    f"{fields.show(was)}: choose another output_dir, or delete this one to start "
                    "anew (--checkpoint.accept_changes true goes on all the same)"
                )
            if name != "output_dir":
                changes.append(f"{name} {fields.show(was)} -> {fields.show(is_now)}")
    if sharding.is_main():
        fresh = f"{path}.tmp"  # and renamed, so that there is never half a file
        try:
            os.makedirs(config.output_dir, exist_ok=True)
            try:
                with open(fresh, "w", encoding="utf-8") as file:
                    file.write(dump(config))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(fresh, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(fresh)
        except OSError as error:
            raise InputError(
                f"output_dir: {config.output_dir} cannot be written ({error.strerror})"
            ) from error
    return f" (changed: {', '.join(changes)})" if changes else ""


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in a configuration."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, values
