"""Folder of a run: it belongs to the run that its config.yaml states, and to one process."""

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from typing import Any

import draccus

from pgpo_jax import fields, sharding
from pgpo_jax.config import Config, dump, load
from pgpo_jax.errors import InputError

FREE = {"steps", "output_dir", "mesh", "distributed", "metrics", "checkpoint", "alarms"}
FREE |= {
    "evaluation.every",
    "evaluation.untrained",
    "evaluation.preflight_questions",
    "data.micro_batches",
}
"""Fields and sections that may change when a run is resumed: they do not change what it computes,
but for rounding. The rest of `evaluation` may not, or its numbers could not be compared."""


@contextlib.contextmanager
def hold_folder(config: Config) -> Iterator[list[str]]:
    """Locks a run's folder and claims it for the run; yields what changed since it was started.

    Another run's folder is refused before anything in it is opened or written.
    """
    changes = compare_folder(config)
    with lock_folder(config.output_dir):
        if sharding.is_main():
            _write_config(config)
        yield changes


def compare_folder(config: Config) -> list[str]:
    """What changed since the folder's run was started, in words.

    Raises:
      InputError: The folder holds another run.
    """
    path = os.path.join(config.output_dir, "config.yaml")
    if not os.path.exists(path):
        return []
    changes = []
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
    return changes


def _write_config(config: Config) -> None:
    """Writes config.yaml beside its place and moves it there: there is never half a file."""
    path = os.path.join(config.output_dir, "config.yaml")
    fresh = f"{path}.tmp"
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(dump(config))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise InputError(
            f"output_dir: {config.output_dir} cannot be written ({error.strerror})"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(fresh)


@contextlib.contextmanager
def lock_folder(folder: str) -> Iterator[None]:
    """Holds a run's folder for this run: the same command twice would write it twice.

    The lock is the kernel's, on the file `run.lock`, so it ends with the process, however that
    ends; the file says who holds it. All hosts call it together, process 0 takes it.

    Raises:
      InputError: Another process holds the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        problem = _take_lock(folder, stack) if sharding.is_main() else ""
        if sharding.agree_max([bool(problem)])[0]:
            raise InputError(problem or f"output_dir: {folder} is refused by the first host")
        yield


def _take_lock(folder: str, stack: contextlib.ExitStack) -> str:
    """Takes the lock until the stack is left; else says why not."""
    path = os.path.join(folder, "run.lock")
    try:
        os.makedirs(folder, exist_ok=True)
        file = stack.enter_context(open(path, "a+", encoding="utf-8"))  # noqa: SIM115
    except OSError as error:
        return f"output_dir: {folder} cannot be written ({error.strerror})"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "a process that has not said its name yet"
        return (
            f"output_dir: {folder} is in use by {holder}; wait until that run ends, stop it, or "
            "choose another output_dir"
        )
    except OSError:
        return ""  # a file system without locks: nobody can be told apart there
    file.truncate(0)
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
    file.flush()
    return ""


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in a configuration."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, values
