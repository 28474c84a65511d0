"""Worker processes of verifiers: libraries that may hang, crash or take all the memory there is.

A worker is a script that imports neither jax nor the package. It writes one line of JSON when it is
ready, then reads one request `[..., seconds]` a line and writes one answer a line; null is no
answer. It ends itself when a request takes longer than its seconds, and after an answer whose line
begins with `!`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

READY = "ready"
Found = TypeVar("Found")


def script(name: str, *arguments: str) -> list[str]:
    """The command that runs a file beside this one."""
    return [sys.executable, "-P", str(Path(__file__).with_name(name)), *arguments]


def cores() -> int:
    """How many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def spread(
    judge: Callable[..., Found], *columns: Iterable[Any], workers: int | None = None
) -> list[Found]:
    """`judge` of every row, `workers` at a time (None: as many as cores), in the rows' order."""
    with ThreadPoolExecutor(workers or cores()) as threads:
        return list(threads.map(judge, *columns))


class Pool:
    """As many processes as there are requests at the same time.

    The process used last is used first, so that requests one by one start only one.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """`command` runs a worker, in this environment (None: ours); none is started yet."""
        self._command, self._environment = command, environment
        self._free: list[_Process] = []
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, request: Sequence[Any], seconds: float) -> Any:
        """The answer to `[*request, seconds]`, or None after a time-out, a crash or none.

        Raises:
          ValueError: What the worker says instead of being ready.
          RuntimeError: No process of this command starts.
        """
        with self._lock:
            process = self._free.pop() if self._free else None
        process = process or _Process(self._command, self._environment)
        try:
            return process.ask([*request, seconds], seconds)
        finally:
            with self._lock:
                self._free.append(process)

    def stop(self) -> None:
        """Ends the processes that are free; at exit, all of them."""
        for process in self._free:
            process.stop()


class _Process:
    """A command as a persistent process, started when needed, replaced when it ends.

    A plain child process and not multiprocessing: that would import the caller's main script again.
    """

    START_LIMIT = 120.0  # seconds; importing sympy on a busy machine
    works: ClassVar[set[str]] = set()  # the commands of which one has ever started

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None) -> None:
        self._command, self._environment = command, environment
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Sequence[Any], seconds: float) -> Any:
        """The answer, or None."""
        if not self._running() and not self._start():
            return None
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            answer = self._read(seconds + 2)  # the worker's own limit comes first
        except OSError:
            answer = None
        if answer is None:
            self.stop()
            return None
        if answer.startswith(b"!"):  # its last one; it may take a moment to end
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self.stop()
        return json.loads(answer.lstrip(b"!"))

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> bool:
        self.stop()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # an interrupt at the console is for the run, not for this
        )
        first = self._read(self.START_LIMIT)
        if first is None:
            self.stop()
            command = " ".join(self._command)
            if command not in self.works:  # not one response's fault, so not a reward of 0
                raise RuntimeError(f"a process of this command does not start: {command}")
            return False
        if (said := json.loads(first)) != READY:
            self.stop()
            raise ValueError(said)
        self.works.add(" ".join(self._command))
        return True

    def _read(self, seconds: float) -> bytes | None:
        """One line of the worker's output, or None when time or the worker is over."""
        assert self._process is not None
        assert self._process.stdout is not None
        output, line, end = self._process.stdout.fileno(), b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([output], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(output, 65536) if ready else b""
            if not chunk:
                return None
            line += chunk
        return line

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None
