"""JSON-lines files: appended to in whole lines, cut where a run resumes, read and compared."""

import contextlib
import glob
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pgpo_jax import fields
from pgpo_jax.errors import InputError

MEASURED = ("time/", "tokens_per_second/", "compilations")
"""Metrics that differ between equal runs."""


class Lines:
    """A JSON-lines file to append to, which holds whole lines only.

    Args:
      path: Of the file.
      resume_from: Rows of later steps are dropped; None starts it anew.
      size: Bytes to keep, where that is known, instead of what `resume_from` says.
    """

    def __init__(self, path: Path, resume_from: int | None, size: int | None) -> None:
        self._waiting: list[bytes] = []
        old = path.stat().st_size if path.exists() else 0
        if resume_from is None:
            size = 0
        elif size is None or size > old:  # an older checkpoint, or the user's own changes
            _drop_rows_after(path, resume_from)
            size = path.stat().st_size
        self._size = size
        self._file = path.open("ab", buffering=0)
        self._file.truncate(size)

    @property
    def waits(self) -> bool:
        """Whether lines are in memory only."""
        return bool(self._waiting)

    def append(self, line: str) -> None:
        """Writes a line, after those that wait; where it cannot be, an OSError, and it waits."""
        self._waiting.append(line.encode("utf-8", errors="replace"))
        self._write()

    def sync(self) -> int:
        """All lines on the disk; returns the bytes."""
        self._write()
        os.fsync(self._file.fileno())
        return self._size

    def close(self) -> None:
        with contextlib.suppress(OSError):  # said when the line was written
            self._write()
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                self._file.truncate(self._size)  # no part of a line stays
                raise
            self._size += len(line)
            del self._waiting[0]


class Line(NamedTuple):
    """A line of a file, and what it holds."""

    number: int
    text: bytes
    row: dict[str, Any]
    """Its object; empty where the line holds none."""
    problem: str = ""
    """What it holds instead of an object."""
    torn: bool = False
    """Whether it is no JSON, as the last line of a run that was killed may be."""


def read(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The lines of a file that are not blank; what they hold instead of objects is the reader's."""
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield _line(number, text)


def _line(number: int, text: bytes) -> Line:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return Line(number, text, {}, f"{error.msg} (column {error.colno})", torn=True)
    except (ValueError, RecursionError) as error:  # no UTF-8, a number or depth beyond Python's
        return Line(number, text, {}, str(error), torn=True)
    if isinstance(row, dict):
        return Line(number, text, row)
    return Line(number, text, {}, fields.show(row))


def _drop_rows_after(path: Path, step: int) -> None:
    kept = []
    for line in read(path) if path.exists() else ():
        if line.torn:  # there a run was killed
            continue
        last = line.row.get("step")
        if not isinstance(last, int):
            raise InputError(
                f"output_dir: {path}:{line.number}: got {line.problem or 'no step'}; must be one "
                "JSON object with its step"
            )
        if last <= step:
            kept.append(line.text.rstrip(b"\n") + b"\n")
    # Through a second file, so that a crash here cannot lose the history.
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(b"".join(kept))
    fresh.replace(path)


def differences(one: str, other: str) -> Iterator[str]:
    """Where metrics and samples of two runs (their folders) differ, but for what is measured."""
    names = {
        os.path.basename(path)
        for run in (one, other)
        for kind in ("metrics", "samples")
        for path in glob.glob(os.path.join(glob.escape(run), f"{kind}*.jsonl"))
    }
    for name in sorted(names):
        rows = [_rows(os.path.join(run, name)) for run in (one, other)]
        for number, (a, b) in enumerate(itertools.zip_longest(*rows), start=1):
            if a != b:
                yield f"{name} differs in line {number}"


def _rows(path: str) -> list[dict[str, Any]]:
    rows = []
    for line in read(path) if os.path.exists(path) else ():
        if line.problem:
            raise InputError(f"RUN: {path}:{line.number}: got {line.problem}; must be one object")
        # NaN would differ from itself; as text it does not.
        rows.append({k: str(v) for k, v in line.row.items() if not k.startswith(MEASURED)})
    return rows
