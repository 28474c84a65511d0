"""Folders of a run: they belong to the run that their config.yaml states, and to one process."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from pgpo_jax import fields, sharding
from pgpo_jax.config import Config, dump
from pgpo_jax.errors import InputError
from pgpo_jax.run.lock import take_lock

FREE = {"steps", "output_dir", "mesh", "distributed", "metrics", "checkpoint", "alarms"}
FREE |= {
    "evaluation.every",
    "evaluation.untrained",
    "evaluation.preflight_questions",
    "data.micro_batches",
    "warm_start.save_every",
}
"""Fields and sections that may change when a run is resumed: they do not change what it computes,
but for rounding. The rest of `evaluation` may not, or its numbers could not be compared."""


@contextlib.contextmanager
def hold_folder(config: Config) -> Iterator[list[str]]:
    """Locks a run's folder and claims it for the run; yields what changed since it was started.

    So too the folder of its checkpoints, where that is elsewhere (`checkpoint.path`). What belongs
    to another run is refused before anything in it is opened.
    """
    if "://" in config.output_dir:
        raise InputError(
            f"output_dir: got {config.output_dir}; metrics are appended to, so give a local folder "
            "(checkpoint.path may be a bucket)"
        )
    with lock_folder(config.output_dir), contextlib.ExitStack() as stack:
        elsewhere = _checkpoints_elsewhere(config)
        if elsewhere is not None:
            stack.enter_context(lock_folder(elsewhere, "checkpoint.path"))
        yield claim_folder(config, elsewhere)


def claim_folder(config: Config, elsewhere: str | None = None) -> list[str]:
    """Writes config.yaml; a folder that holds another run is refused, so that nothing is lost.

    Args:
      config: The run's.
      elsewhere: The folder of its checkpoints, where that is not in its own: it gets the same file,
        and both a `run.id`, by which a run whose own folder was moved is known.

    Returns:
      What changed since the run was started, in words.

    Raises:
      InputError: A folder holds another run, or cannot be written; on all hosts alike.
    """
    changes, ids, problem = [], [], ""
    try:
        changes = _compare(config, config.output_dir, "output_dir", moved=True)
        if elsewhere is not None:
            ids = [_read(folder, "run.id") for folder in (config.output_dir, elsewhere)]
            moved = not sharding.is_main() or (ids[0] is not None and ids[0] == ids[1])
            told = _compare(config, elsewhere, "checkpoint.path", moved)
            changes += [change for change in told if change not in changes]
    except InputError as error:
        problem = str(error)
    _all_or_none(problem)
    if sharding.is_main():
        files = [("output_dir", config.output_dir, "config.yaml", dump(config))]
        if elsewhere is not None:
            run_id = ids[0] or ids[1] or uuid.uuid4().hex
            files += [
                ("output_dir", config.output_dir, "run.id", run_id),
                ("checkpoint.path", elsewhere, "run.id", run_id),
                ("checkpoint.path", elsewhere, "config.yaml", dump(config)),
            ]
        for field, folder, name, text in files:
            try:
                write_file(folder, name, text)
            except OSError as error:
                problem = problem or _not_written(field, error, folder)
    _all_or_none(problem)
    return changes


@contextlib.contextmanager
def lock_folder(folder: str, field: str = "output_dir") -> Iterator[None]:
    """Holds a folder for this run: the same command twice would write it twice.

    All hosts call it together, process 0 holds the lock.

    Raises:
      InputError: Another process holds the folder, or it cannot be written; on all hosts alike.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        if sharding.is_main():
            try:
                epath.Path(folder).mkdir(parents=True, exist_ok=True)
                holder = take_lock(folder, stack)
            except (OSError, ImportError) as error:  # a bucket needs its package
                holder, problem = None, _not_written(field, error, folder)
            if holder is not None:
                problem = (
                    f"{field}: {folder} is in use by {holder}; wait until that run ends, stop it, "
                    f"or choose another {field}"
                )
        _all_or_none(problem)
        yield


def _checkpoints_elsewhere(config: Config) -> str | None:
    """The folder of the checkpoints where the lock of the run's own does not hold it."""
    path = config.checkpoint.path
    if path is None or os.path.realpath(path) == os.path.realpath(config.output_dir):
        return None
    return path


def _compare(config: Config, folder: str, field: str, moved: bool) -> list[str]:
    """What differs from the run that a folder holds, in words; all that may not is refused.

    `moved` says whether the run's own folder may be another than that of before.
    """
    text = _read(folder, "config.yaml")
    if text is None:
        return []
    try:
        held = fields.decode(Config, fields.load_yaml(text))
    except ValueError as error:
        raise InputError(f"{field}: {folder}/config.yaml is not valid YAML ({error})") from error
    before, now = (dict(_flat(fields.encode(c))) for c in (held, config))
    allowed = FREE if moved else FREE - {"output_dir"}
    if config.teacher.refresh == "restarts":  # at fractions of them
        allowed = allowed - {"steps"}
    changes = []
    for name in sorted(before.keys() | now.keys()):
        was, is_now = before.get(name), now.get(name)
        if was == is_now:
            continue
        may = {name, name.partition(".")[0]} & allowed
        if not may and not config.checkpoint.accept_changes:
            raise InputError(
                f"{name}: got {fields.show(is_now)}; {folder} holds a run with "
                f"{fields.show(was)}: choose another {field}, or delete this one to start "
                "anew (--checkpoint.accept_changes true goes on all the same)"
            )
        if name != "output_dir" or not moved:
            changes.append(f"{name} {fields.show(was)} -> {fields.show(is_now)}")
    return changes


def _read(folder: str, name: str) -> str | None:
    """A file of a folder, or of a bucket; None where there is none."""
    path = epath.Path(folder) / name
    try:
        return path.read_text() if path.exists() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error


def write_file(folder: str, name: str, text: str) -> None:
    """The same, written: on a disk through a second file, so that there is never half of one."""
    if "://" in folder:
        (epath.Path(folder) / name).write_text(text)
        return
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}.tmp")


def _not_written(field: str, error: Exception, folder: str) -> str:
    return f"{field}: {folder} cannot be written ({getattr(error, 'strerror', None) or error})"


def _all_or_none(problem: str) -> None:
    """Ends all hosts where one of them has a problem, for the others would wait for it."""
    if sharding.agree_max([bool(problem)])[0]:
        raise InputError(problem or "output_dir: refused by another host, which says why")


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in a configuration."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, values
