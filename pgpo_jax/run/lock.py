"""Lock of a run: a file in a folder that one process holds, on one host or across several.

The kernel's own locks do not reach across hosts on every file system, nor into a bucket. So the
file names its holder (host, process, the process's start) and is renewed while that lives. A holder
on this host that is gone is known at once; one elsewhere, by a file that is no longer renewed.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pgpo_jax.errors import printable

NAME = "run.lock"
BEAT = 15.0
"""Seconds between two signs of life."""
STALE = 180.0
"""A holder on another host that gives none for so many seconds counts as gone."""


class Holder(NamedTuple):
    """The process that holds a lock."""

    host: str
    """Host name, boot and process namespace: where `process` means something."""
    process: int
    started: str
    """When the process was started, in the system's own words; empty where it does not say."""
    since: str
    token: str

    @property
    def text(self) -> str:
        """As the file has it."""
        return json.dumps(self._asdict()) + "\n"

    def __str__(self) -> str:
        return f"process {self.process} on {self.host.split()[0]}, since {self.since}"


UNKNOWN = "a process that has not said its name"


def this_process() -> Holder:
    """Who asks for a lock."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    started = _started(os.getpid()) or ""
    return Holder(_this_host(), os.getpid(), started, since, secrets.token_hex(8))


def take_lock(
    folder: str,
    stack: ExitStack,
    me: Holder | None = None,
    *,
    beat: float = BEAT,
    stale: float = STALE,
) -> Holder | str | None:
    """Takes the lock of a folder until the stack is left.

    Where the holder is on another host and gave its last sign a while ago, this waits for the next
    one, `stale` seconds at most.

    Args:
      folder: An existing folder, or a bucket's.
      stack: Lets go of the lock.
      me: The new holder; None is this process.
      beat: Seconds between two signs of life.
      stale: Without one for so many seconds, a holder elsewhere is gone.

    Returns:
      The holder where it is another; None where the lock was taken.

    Raises:
      OSError: The folder cannot be written.
    """
    me = me or this_process()
    file = _Bucket(folder) if "://" in folder else _Local(folder)
    seen: float | None = None
    while not file.create(me):
        if (found := file.read()) is None:
            continue  # let go meanwhile
        text, renewed, age = found
        holder = _parse(text)
        alive = None if holder is None else _is_alive(holder)
        if alive is False or (alive is None and age > stale):
            if file.replace(text, me):
                break
            continue
        if alive or seen not in (None, renewed):
            return holder or UNKNOWN
        if seen is None and age > 2:
            told = f"{folder} is locked by {holder or UNKNOWN}; waiting for its next sign of life"
            print(printable(told), file=sys.stderr, flush=True)
        seen = renewed
        time.sleep(min(1.0 if text else 0.05, stale / 10))  # an empty one is being written
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(file, me, stop, beat, folder), daemon=True)
    stack.callback(file.remove, me)
    stack.callback(renewing.join)
    stack.callback(stop.set)
    renewing.start()
    return None


@runtime_checkable
class _File(Protocol):
    """A lock file, wherever it is."""

    def create(self, me: Holder) -> bool: ...
    def text(self) -> str | None: ...
    def read(self) -> tuple[str, float, float] | None: ...
    def replace(self, seen: str, me: Holder) -> bool: ...
    def renew(self, me: Holder) -> None: ...
    def remove(self, me: Holder) -> None: ...


class _Local:
    """On a file system, one of a network too: a file is made by one process only."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, NAME)

    def create(self, me: Holder) -> bool:
        """Makes the file, where there is none."""
        try:
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, me.text.encode())
        except OSError:  # no space: nor shall an empty file stay
            os.remove(self._path)
            raise
        finally:
            os.close(file)
        return True

    def text(self) -> str | None:
        """What is in the file; None where there is none."""
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def read(self) -> tuple[str, float, float] | None:
        """Text, time of the last sign of life, and its age, by the file system's own clock."""
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                text, renewed = file.read(), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None
        return text, renewed, self._now() - renewed

    def replace(self, seen: str, me: Holder) -> bool:
        """Takes the place of the file that was seen, and of no other."""
        guard, fresh = f"{self._path}.guard", f"{self._path}.{me.token}"
        try:  # one at a time
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            with suppress(FileNotFoundError):
                if self._now() - os.stat(guard).st_mtime > STALE:  # killed in the lines below
                    os.remove(guard)
            time.sleep(0.05)
            return False
        try:
            if self.text() != seen:
                return False
            with open(fresh, "w", encoding="utf-8") as file:
                file.write(me.text)
            os.replace(fresh, self._path)
            return True
        finally:
            for path in (fresh, guard):
                with suppress(FileNotFoundError):
                    os.remove(path)

    def _now(self) -> float:
        probe = f"{self._path}.{secrets.token_hex(4)}"
        try:
            with open(probe, "w", encoding="utf-8") as file:
                return os.fstat(file.fileno()).st_mtime
        finally:
            os.remove(probe)

    def renew(self, me: Holder) -> None:
        """A sign of life."""
        del me
        os.utime(self._path)

    def remove(self, me: Holder) -> None:
        """Lets go, where the file is still the holder's."""
        with suppress(OSError):
            with open(self._path, encoding="utf-8") as file:
                mine = file.read() == me.text
            if mine:
                os.remove(self._path)


class _Bucket:
    """In a bucket, which cannot make a file only once: written, and read again after a moment."""

    def __init__(self, folder: str, settle: float = 2.0) -> None:
        from etils import epath

        self._path = epath.Path(folder) / NAME
        self._settle = settle

    def create(self, me: Holder) -> bool:
        """Writes the file, where there is none; the last of several writers has it."""
        if self._path.exists():
            return False
        self._path.write_text(me.text)
        time.sleep(self._settle)
        return self.text() == me.text

    def text(self) -> str | None:
        """What is in the file; None where there is none."""
        return self._path.read_text() if self._path.exists() else None

    def read(self) -> tuple[str, float, float] | None:
        """Text, time of the last sign of life, and its age."""
        if (text := self.text()) is None:
            return None
        renewed = float(self._path.stat().mtime)
        return text, renewed, time.time() - renewed

    def replace(self, seen: str, me: Holder) -> bool:
        """Takes the place of the file that was seen."""
        if (found := self.text()) is not None:
            if found != seen:
                return False
            self._path.unlink()
        return self.create(me)

    def renew(self, me: Holder) -> None:
        """A sign of life."""
        self._path.write_text(me.text)

    def remove(self, me: Holder) -> None:
        """Lets go, where the file is still the holder's."""
        with suppress(Exception):  # as many kinds as there are buckets
            if self._path.read_text() == me.text:
                self._path.unlink()


def _renew(file: _File, me: Holder, stop: threading.Event, beat: float, folder: str) -> None:
    """Gives signs of life; ends the process where another took the lock, as after a long sleep."""
    while not stop.wait(beat):
        try:
            found = file.text()
            if found is None:
                file.create(me)
            elif found == me.text:
                file.renew(me)
            else:
                end(f"{folder} was taken over by {_parse(found) or UNKNOWN}")
        except Exception:
            continue


def end(why: str) -> None:
    """Ends the process at once: another one writes the folder, so nothing may be saved."""
    print("error: " + printable(f"{why}; this run ends"), file=sys.stderr, flush=True)
    os._exit(1)


def _parse(text: str) -> Holder | None:
    """None for a file that is being written, or of an earlier version."""
    try:
        found: Any = json.loads(text)
        return Holder(**found)
    except (ValueError, TypeError):
        return None


def _is_alive(holder: Holder) -> bool | None:
    """Whether a holder on this host is there; None where that cannot be known from here."""
    if holder.host != _this_host():
        return None
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(holder.process) == holder.started if holder.started else None


def _started(process: int) -> str | None:
    """Ticks since the boot at which a process was started; None for one that is none any more."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            state, *values = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else values[18]


def _this_host() -> str:
    """Host, boot and namespace in which a process number stands for one process."""
    return f"{socket.gethostname() or 'localhost'} {_text(_boot)} {_text(_namespace)}"


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read().strip()


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _text(read: Callable[[], str]) -> str:
    try:
        return read()
    except OSError:  # another system than Linux
        return "-"
