"""Integrity of a checkpoint: what counts as damaged, and how its errors are said in one line."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from pgpo_jax.errors import InputError, printable


class Damaged(InputError):
    """A checkpoint that cannot be read, or not as it was written."""


def checksum(arrays: Mapping[str, Any], run: Mapping[str, Any]) -> int:
    """Of what is not an array; a JSON file has none of its own."""
    return zlib.crc32(json.dumps([arrays, run], sort_keys=True).encode())


def unreadable(folder: Any, why: str) -> Damaged:
    """The error of a checkpoint that cannot be read."""
    return Damaged(
        f"checkpoints: {folder} cannot be read ({why.replace(';', ',')}); it is damaged or no "
        "checkpoint of a run: delete it, or choose another folder"
    )


def first_line(error: BaseException) -> str:
    """Kind and first line of an error of Orbax's or TensorStore's."""
    first, *_ = str(error).strip().splitlines() or [""]
    first = first.partition(" See full TensorStore details")[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def plain(error: BaseException) -> str:
    """Why a save failed; what TensorStore says besides fills a screen."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    system = os.strerror(int(found[1])) if found else getattr(error, "strerror", None)
    return system or first_line(error)


def warn(text: str) -> None:
    """Says what is wrong but ends nothing."""
    print("warning: " + printable(" ".join(text.split())), file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what Orbax's tasks say when they are dropped after an error that is reported."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
        gc.collect(0)
    finally:
        sys.unraisablehook = before
