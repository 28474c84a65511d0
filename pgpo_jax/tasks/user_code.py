"""Code of a user's: imported by name, limited in time, its mistakes told in one line.

It runs in this process, because it may hold models and connections, so it is trusted like any code
of the user's. What it may break by mistake is guarded: what it prints goes to stderr, and it must
come back in time.
"""

import asyncio
import contextlib
import faulthandler
import hashlib
import importlib
import inspect
import os
import selectors
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pgpo_jax.errors import InputError

GRACE = 5.0
"""Seconds that a function has to end after it was interrupted; then the process is ended."""
_NOT_THEIRS = tuple(os.path.dirname(os.path.abspath(f)) for f in (__file__, asyncio.__file__))


class TooLong(BaseException):
    """Raised inside a function that is over its time; few functions catch a BaseException."""


def import_function(name: str, field: str) -> Callable[..., Any]:
    """A user's function from `module:function`, importable from the current folder too.

    Args:
      name: `module:function`.
      field: Where the configuration names it.

    Raises:
      InputError: The module cannot be imported or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(
            f"{field}: got {name!r}, but importing {module_name!r} raised {show(error)}; must be "
            "module:function, installed or in this folder"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(
            f"{field}: got {name!r}, but {module_name!r} has no function {function_name!r}"
        )
    return function


def digest(name: str, function: Callable[..., Any]) -> str:
    """SHA-256 of the module's file and of the file where the function was written, not of what
    these import; empty where there is none."""
    module = sys.modules[name.partition(":")[0]]
    code = getattr(inspect.unwrap(function), "__code__", None)
    named = (getattr(module, "__file__", None), getattr(code, "co_filename", None))
    files = [file for file in dict.fromkeys(named) if file and Path(file).is_file()]
    found = hashlib.sha256()
    for file in files:
        found.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return found.hexdigest() if files else ""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupts the block after so many seconds, and ends the process if that does not help.

    A signal from a second thread interrupts Python code, sleeping and waiting. It is not SIGALRM,
    which math-verify and others set for themselves. A loop in C hears no signal and lets no other
    thread run: `GRACE` seconds later `faulthandler`, which needs no Python, prints where it hangs
    and ends the process with exit code 1. Off the main thread, where no signal can be handled,
    only this second limit holds.

    Raises:
      TooLong: The block took longer; it says where.
    """
    main = threading.current_thread() is threading.main_thread()
    running = True

    def interrupt(number: int, frame: Any) -> None:
        del number
        if running:
            file, line = frame.f_code.co_filename, frame.f_lineno
            raise TooLong(f" at {Path(file).name}:{line}" if _is_theirs(file) else "")

    def send() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, interrupt) if main else None
    timer = threading.Timer(seconds, send)
    if main:
        timer.start()
    stderr = 2  # the process's own, wherever sys.stderr leads
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=stderr)
    try:
        yield
    finally:
        running = False
        faulthandler.cancel_dump_traceback_later()
        if main:
            timer.cancel()
            timer.join()  # a signal sent at the last moment must find our handler still there
            signal.signal(signal.SIGUSR2, before)


def place(error: BaseException) -> str:
    """Where in the user's code it happened."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_theirs(f.filename)]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _is_theirs(file: str) -> bool:
    """Not of this folder, nor of the loop that awaits their functions."""
    return os.path.dirname(file) not in _NOT_THEIRS and file != selectors.__file__


def show(value: Any) -> str:
    """An exception by type and message, another value as written; not longer than a line or two."""
    if isinstance(value, BaseException):
        text, limit = f"{type(value).__name__}: {value}".removesuffix(": "), 200
    else:
        text, limit = repr(value), 80
    return text if len(text) <= limit else text[: limit - 3] + "..."
