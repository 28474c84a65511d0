"""Sandboxes for programs that a model wrote: a process of bubblewrap, without network and files.

What runs in it is `sandbox_worker.py`, which confines every program once more: see there. Nothing
of this machine is in a sandbox but Python and the libraries of the system, all read-only; its only
place to write is a small `/tmp` of its own, and it has its own processes, users and network, no
capability and an empty environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import workers

Kind = Literal["bubblewrap", "none"]
SPACE = 2**24
"""Bytes of a sandbox's `/tmp`."""
NOBODY = "65534"
UNPROTECTED = (
    "task.sandbox = none: programs that the model writes run as this user, who can read and change "
    "files, end this run and use the network"
)
_WORKER = str(Path(__file__).with_name("sandbox_worker.py"))
_INSIDE = "/sandbox_worker.py"
"""Where it lies in a sandbox: the package itself may lie in /tmp, which is another one there."""
_START = 30.0  # seconds, on a busy machine


def notes(kind: Kind) -> tuple[str, ...]:
    """What is said of a sandbox before a run."""
    return (UNPROTECTED,) if kind == "none" else ()


class Sandbox:
    """Programs run on texts and by tests, each in a process that ends with it."""

    def __init__(self, kind: Kind) -> None:
        """No process is started yet.

        Raises:
          InputError: There is no bubblewrap, it can make no sandbox here, or a process cannot be
            confined; with what to do.
        """
        command = [os.path.realpath(sys.executable), "-I", "-S", _WORKER]
        if kind == "bubblewrap":
            command = [*_bubblewrap(command[0]), *command[:-1], _INSIDE]
        _try(kind, command)
        self._pool = workers.Pool(command, {})

    def run(self, program: str, text: str, seconds: float) -> dict[str, Any] | None:
        """A program whose input is a text.

        Returns:
          `why` it did not end (`time`, `threads`; else None), its exit `code`, its `output`,
          whether that was cut (`full`), and the error that it `said`; None where the sandbox
          itself ended.
        """
        return self._pool.ask(["stdin", program, text, None], seconds)

    def test(
        self, program: str, test: str, entry_point: str | None, seconds: float
    ) -> dict[str, Any] | None:
        """A program by a test, which calls its functions or gets one as `candidate`.

        Returns:
          `why` as for `run`, and what the test `said`, with the `kind` of its end: `passed`,
          `wrong`, `error`, `ended` (the program's process did) or `broken` (the test is).
        """
        return self._pool.ask(["test", program, test, entry_point], seconds)

    def stop(self) -> None:
        """Ends its processes."""
        self._pool.stop()


def _bubblewrap(python: str) -> list[str]:
    """The command and options that go before a command; `python` is the interpreter it runs.

    Raises:
      InputError: It is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise InputError(
            "task.sandbox: got 'bubblewrap', which is not installed; `apt install bubblewrap` "
            "(Linux only), or choose none, which runs programs unprotected"
        )
    options = ["--unshare-all", "--as-pid-1", "--new-session", "--clearenv"]
    options += ["--hostname", "sandbox", "--uid", NOBODY, "--gid", NOBODY, "--cap-drop", "ALL"]
    options += ["--ro-bind", "/usr", "/usr", "--size", str(SPACE), "--tmpfs", "/tmp"]
    for folder in ("/lib", "/lib64"):
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        else:
            options += ["--ro-bind-try", folder, folder]
    # Python's own folders, and those that its loader needs where a system has no /usr.
    for folder in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix, "/nix/store")):
        if not Path(folder).is_relative_to("/usr"):
            options += ["--ro-bind-try", folder, folder]
    if not Path(python).is_relative_to(sys.base_prefix):
        options += ["--ro-bind-try", python, python]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    options += ["--ro-bind", _WORKER, _INSIDE, "--dev", "/dev", "--remount-ro", "/dev"]
    return [program, *options, "--remount-ro", "/", "--"]


def _try(kind: Kind, command: list[str]) -> None:
    """Starts a worker that finds its input closed.

    Raises:
      InputError: It does not get ready, with the last that was said.
    """
    try:
        done = subprocess.run(
            command, input="", capture_output=True, text=True, env={}, timeout=_START, check=False
        )
        said, ready = done.stderr.strip() or done.stdout.strip(), done.stdout == '"ready"\n'
    except (OSError, subprocess.TimeoutExpired) as error:
        said, ready = str(error), False
    if not ready:
        fix = (
            "; allow user namespaces (in a container: --security-opt seccomp=unconfined), take "
            "bubblewrap 0.7 or newer, or choose none, which runs programs unprotected"
        )
        last = said.splitlines()[-1].strip('"')[:200] if said else "it said nothing"
        raise InputError(
            f"task.sandbox: got {kind!r}, which cannot run a program here ({last})"
            f"{fix if kind == 'bubblewrap' else ''}"
        )
