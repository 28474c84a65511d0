"""A user's reward function: imported, called as TRL does, limited in time, its answer checked.

It runs in this process, because it may hold models and connections, so it is trusted like any code
of the user's. What it may break by mistake is guarded: it gets copies, what it prints goes to
stderr, and it must come back in time.
"""

import contextlib
import copy
import faulthandler
import hashlib
import importlib
import inspect
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from pgpo_jax.errors import InputError
from pgpo_jax.tasks.answers import Outcome
from pgpo_jax.tasks.task import Question, Verify

RULE = "must return one number in [0, 1] a completion, or (number, feedback), or a dict of both"
ROUNDING = 1e-6
"""So far outside [0, 1] a reward is rounding, and taken for 0 or 1."""
GRACE = 5.0
"""Seconds that a function has to end after it was interrupted; then the process is ended."""


class _TooLong(BaseException):
    """Raised inside a function that is over its time; few functions catch a BaseException."""


def import_function(name: str) -> Callable[..., Any]:
    """A user's function from `module:function`, importable from the current folder too.

    Raises:
      InputError: if the module cannot be imported or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(
            f"task.reward: got {name!r}, but importing {module_name!r} raised {_show(error)}; must "
            "be module:function, installed or in this folder"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(
            f"task.reward: got {name!r}, but {module_name!r} has no function {function_name!r}"
        )
    return function


class Reward(NamedTuple):
    """A user's reward function."""

    verify: Verify
    """The function as a task's `verify`."""
    digest: str
    """SHA-256 of the file that holds it (not of what that imports); empty where there is none."""


def load(name: str, limit: float) -> Reward:
    """A reward function by name.

    Args:
      name: `module:function`.
      limit: Seconds for one call.

    Raises:
      InputError: if it cannot be imported.
    """
    function = import_function(name)

    def verify(questions: Sequence[Question], responses: Sequence[str]) -> list[Outcome]:
        prompts = [question.columns["prompt"] for question in questions]
        completions = [
            response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        names = dict.fromkeys(name for question in questions for name in question.columns)
        columns = {
            name: [question.columns.get(name) for question in questions]
            for name in names
            if name not in ("prompt", "prompts", "completion", "completions")
        }
        return call_reward(name, function, prompts, completions, columns, limit)

    return Reward(verify, _digest(name, function))


def _digest(name: str, function: Callable[..., Any]) -> str:
    """SHA-256 of the module's file and of the file where the function was written."""
    module = sys.modules[name.partition(":")[0]]
    code = getattr(inspect.unwrap(function), "__code__", None)
    named = (getattr(module, "__file__", None), getattr(code, "co_filename", None))
    files = [file for file in dict.fromkeys(named) if file and Path(file).is_file()]
    found = hashlib.sha256()
    for file in files:
        found.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return found.hexdigest() if files else ""


def call_reward(
    name: str,
    function: Callable[..., Any],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    limit: float = 600.0,
) -> list[Outcome]:
    """Calls a reward function as TRL does and checks what it returns.

    A function that fails ends the run, with one line that names it: no reward of such a batch can
    be trusted, and zeros in their place would be trained on.

    Args:
      name: `module:function`, for errors.
      function: called as `function(prompts=..., completions=..., **columns)`, with copies: what
        it changes is its own. What it prints goes to stderr.
      prompts: strings or conversations, one a completion.
      completions: strings, or conversations of one assistant message.
      columns: the data set's other columns, each with one entry a completion.
      limit: seconds for the call, see :func:`_time_limit`.

    Returns:
      One outcome a completion.

    Raises:
      InputError: if the function raises, takes longer than `limit`, or does not return one number
        in [0, 1] a completion (alone, as (number, feedback text) or as
        {"reward": ..., "feedback": ...}).
    """
    arguments = copy.deepcopy({**columns, "prompts": prompts, "completions": completions})
    try:
        with _time_limit(limit), contextlib.redirect_stdout(sys.stderr):
            returned = function(**arguments)
            if isinstance(returned, Iterator):  # a generator has yet to do its work
                returned = list(returned)
    except _TooLong as error:
        raise InputError(
            f"task.reward: {name} took longer than task.reward_limit = {limit:g} seconds for "
            f"{len(completions)} completions{error}; make it faster or raise the limit"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(
            f"task.reward: {name} raised {_show(error)}{_place(error)}; it is called as "
            "f(prompts, completions, **columns)"
        ) from error
    try:
        if isinstance(returned, Mapping):  # {"reward": [...], "feedback": [...]}
            feedback = returned.get("feedback") or [""] * len(returned["reward"])
            returned = list(zip(returned["reward"], feedback, strict=True))
        if isinstance(returned, str | bytes | Set):  # a set has no order
            raise TypeError
        items = list(returned)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"task.reward: {name} returned {_show(returned)}; {RULE}") from error
    if len(items) != len(completions):
        raise InputError(
            f"task.reward: {name} returned {len(items)} rewards for {len(completions)} "
            f"completions; {RULE}"
        )
    return [_outcome(name, item) for item in items]


def _outcome(name: str, item: Any) -> Outcome:
    reward: Any = item
    feedback, well_formed = "", True
    if isinstance(item, Mapping):
        reward, feedback = item.get("reward"), item.get("feedback", "")
        well_formed = bool(item.get("well_formed", True))
    elif isinstance(item, tuple | list) and len(item) == 2:
        reward, feedback = item
    feedback = "" if feedback is None else feedback
    try:
        number = math.nan if isinstance(reward, str | bytes | bytearray) else float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    usable = -ROUNDING <= number <= 1 + ROUNDING  # false for nan
    if not usable or not isinstance(feedback, str) or not _is_unicode(feedback):
        raise InputError(f"task.reward: {name} returned {_show(item)} for a completion; {RULE}")
    return Outcome(min(max(number, 0.0), 1.0), feedback, well_formed)


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer takes it: half of a surrogate pair is no character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupts the block after so many seconds, and ends the process if that does not help.

    A signal from a second thread interrupts Python code, sleeping and waiting. It is not SIGALRM,
    which math-verify and others set for themselves. A loop in C hears no signal and lets no other
    thread run: `GRACE` seconds later `faulthandler`, which needs no Python, prints where it hangs
    and ends the process with exit code 1. Off the main thread, where no signal can be handled,
    only this second limit holds.
    """
    main = threading.current_thread() is threading.main_thread()
    running = True

    def interrupt(number: int, frame: Any) -> None:
        del number
        if running:
            file, line = frame.f_code.co_filename, frame.f_lineno
            raise _TooLong("" if file == __file__ else f" at {Path(file).name}:{line}")

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


def _place(error: BaseException) -> str:
    """Where in the user's code it happened."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _show(value: Any) -> str:
    """An exception by type and message, another value as written; not longer than a line or two."""
    if isinstance(value, BaseException):
        text, limit = f"{type(value).__name__}: {value}".removesuffix(": "), 200
    else:
        text, limit = repr(value), 80
    return text if len(text) <= limit else text[: limit - 3] + "..."
