"""JSON-lines files: appended to in whole lines, cut where a run resumes, and compared."""

import contextlib
import glob
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def _drop_rows_after(path: Path, step: int) -> None:
    kept = []
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the line at which a run was killed
                if row["step"] <= step:
                    kept.append(line if line.endswith("\n") else line + "\n")
    # Through a second file, so that a crash here cannot lose the history.
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
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
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    # NaN would differ from itself; as text it does not.
    return [{k: str(v) for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]
