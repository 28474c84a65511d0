"""A user's reward functions: called as TRL does, weighted and summed, their answers checked.

They get copies, so that what one changes is its own, and what they print goes to stderr.
"""

import asyncio
import contextlib
import copy
import hashlib
import inspect
import math
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from pgpo_jax.errors import InputError
from pgpo_jax.tasks.answers import Outcome
from pgpo_jax.tasks.task import Question, TaskConfig, Verify
from pgpo_jax.tasks.user_code import TooLong, digest, import_function, place, show, time_limit

RULE = "must return a finite number or None a completion, or (number, feedback), or a dict of both"
ROUNDING = 1e-6
"""So far outside [0, 1] a reward is rounding, and not warned of."""
SEARCH = 10.0
"""Seconds for which the row is looked for at which a function fails."""
METRICS = ("mean", "std", "failed")
"""What `reward/...` says already: no function is called so in the metrics."""

Functions = Mapping[str, Callable[..., Any]]


class Judge(NamedTuple):
    """A user's reward functions as one."""

    verify: Verify
    """Their weighted sum as a task's `verify`."""
    names: tuple[str, ...]
    """What each is called in the metrics."""
    digest: str
    """SHA-256 of the files that hold them (not of what these import); empty where there is none."""


class Asked(NamedTuple):
    """What reward functions are called with, an entry a completion."""

    prompts: Sequence[Any]
    """Strings or conversations."""
    completions: Sequence[Any]
    """Strings, or conversations of one assistant message where the prompt is a conversation."""
    columns: Mapping[str, Sequence[Any]]
    """The other columns of the data set."""
    keys: Sequence[str]
    """The questions' names, for errors."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a call, in copies."""
        return copy.deepcopy(
            {**self.columns, "prompts": self.prompts, "completions": self.completions}
        )

    def alone(self, row: int) -> "Asked":
        """One completion of these."""
        one = slice(row, row + 1)
        columns = {name: values[one] for name, values in self.columns.items()}
        return Asked(self.prompts[one], self.completions[one], columns, self.keys[one])

    def place(self, row: int) -> str:
        """A row in words."""
        return f"completion {row} ({self.keys[row]})"


class Given(NamedTuple):
    """What a function gave for one completion."""

    reward: float | None
    """None: it does not judge this one."""
    feedback: str
    well_formed: bool


def load(config: TaskConfig) -> Judge | None:
    """The reward functions of a configuration; None where it names none.

    Raises:
      InputError: One cannot be imported.
    """
    names = config.rewards
    if not names:
        return None
    functions = {name: import_function(name, "task.reward") for name in names}
    labels = metric_names(names)
    weights = config.reward_weights or (1.0,) * len(names)
    files = [digest(name, function) for name, function in functions.items()]
    code = files[0] if len(files) == 1 else hashlib.sha256("".join(files).encode()).hexdigest()
    warned = False

    def verify(questions: Sequence[Question], responses: Sequence[str]) -> list[Outcome]:
        nonlocal warned
        asked = _asked(questions, responses)
        given = call_rewards(functions, asked, config.reward_limit)
        rows = zip(*given, strict=True)
        outcomes = []
        for index, row in enumerate(rows):
            if all(each.reward is None for each in row):  # NaN would be trained on
                raise InputError(
                    f"task.reward: {', '.join(names)} returned None for {asked.place(index)}; at "
                    "least one must judge it: leave such rows out, or add a function that does"
                )
            outcomes.append(_sum(labels, weights, row))
        outside = (i for i, outcome in enumerate(outcomes) if _leaves_0_to_1(outcome.reward))
        if not warned and (row := next(outside, None)) is not None:
            warned = True
            warnings.warn(
                f"task.reward gave {outcomes[row].reward:g} for {asked.place(row)}, outside "
                "[0, 1], which is fine where reprompt.threshold says what a success is",
                stacklevel=2,
            )
        return outcomes

    return Judge(verify, labels, code if any(files) else "")


def _leaves_0_to_1(reward: float) -> bool:
    return not -ROUNDING <= reward <= 1 + ROUNDING


def metric_names(functions: Sequence[str]) -> tuple[str, ...]:
    """What `module:function` is called in the metrics: `function` where that tells it apart."""
    short = [name.partition(":")[2] for name in functions]
    return tuple(
        own if own not in METRICS and short.count(own) == 1 else name.replace(":", ".")
        for own, name in zip(short, functions, strict=True)
    )


def _asked(questions: Sequence[Question], responses: Sequence[str]) -> Asked:
    prompts = [q.columns.get("prompt", [dict(m) for m in q.messages]) for q in questions]
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
    return Asked(prompts, completions, columns, [question.key for question in questions])


def _sum(labels: Sequence[str], weights: Sequence[float], row: Sequence[Given]) -> Outcome:
    """The weighted sum of what judged a completion; feedback in the functions' order."""
    judged = [
        (label, weight, given.reward)
        for label, weight, given in zip(labels, weights, row, strict=True)
        if given.reward is not None
    ]
    reward = math.fsum(weight * value for _, weight, value in judged)
    if len(row) > 1 or weights[0] != 1:  # 0.1 + 0.7 must reach a threshold of 0.8
        reward = float(f"{reward:.12g}")
    return Outcome(
        reward,
        "\n".join(dict.fromkeys(given.feedback for given in row if given.feedback)),
        all(given.well_formed for given in row),
        parts=tuple((label, value) for label, _, value in judged),
    )


# ---- calls ---------------------------------------------------------------------------------------


class _Failed(Exception):
    """A function, by name, raised what is the cause of this."""


def call_rewards(functions: Functions, asked: Asked, limit: float = 600.0) -> list[list[Given]]:
    """Calls reward functions as TRL does, those that are async together, and checks the answers.

    A function that fails ends the run, with one line that names it: no reward of such a batch can
    be trusted, and zeros in their place would be trained on. To find the row at which it failed it
    is called once more with each completion alone, for `SEARCH` seconds at most.

    Args:
      functions: `module:function`, for errors -> called as `f(prompts=..., completions=...,
        **columns)`.
      asked: What they are called with.
      limit: Seconds for one call, or for all async ones together; see `time_limit`.

    Returns:
      `[function][completion]`.

    Raises:
      InputError: A function raises, takes longer than `limit`, or does not return one finite number
        or None a completion (alone, as (number, feedback text) or as
        {"reward": ..., "feedback": ...}).
    """
    try:
        returned = _call(functions, asked, limit)
    except _Failed as failed:
        name, error = str(failed), failed.__cause__
        assert error is not None
        row = _failing_row(functions[name], asked, error, limit)
        where = "" if row is None else f" for {asked.place(row)}"
        raise InputError(
            f"task.reward: {name} raised {show(error)}{place(error)}{where}; it is called as "
            "f(prompts, completions, **columns)"
        ) from error
    return [_read(name, returned[name], asked) for name in functions]


def _call(functions: Functions, asked: Asked, limit: float) -> dict[str, Any]:
    """What each function returned."""
    returned: dict[str, Any] = {}
    waiting: dict[str, Awaitable[Any]] = {}
    try:
        for name, function in functions.items():
            with _limited(name, asked, limit), _named(name):
                given = function(**asked.arguments())
                if isinstance(given, Iterator):  # a generator has yet to do its work
                    given = list(given)
            if inspect.isawaitable(given):
                waiting[name] = given
            else:
                returned[name] = given
        if waiting:
            with _limited(", ".join(waiting), asked, limit):
                returned |= asyncio.run(_together(waiting))
    finally:
        for given in waiting.values():
            if inspect.iscoroutine(given):  # it was not awaited where another function failed
                given.close()
    return returned


async def _together(waiting: Mapping[str, Awaitable[Any]]) -> dict[str, Any]:
    async def one(name: str, given: Awaitable[Any]) -> tuple[str, Any]:
        with _named(name):
            return name, await given

    return dict(await asyncio.gather(*(one(*pair) for pair in waiting.items())))


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        raise _Failed(name) from error


@contextlib.contextmanager
def _limited(names: str, asked: Asked, limit: float) -> Iterator[None]:
    try:
        with time_limit(limit), contextlib.redirect_stdout(sys.stderr):
            yield
    except TooLong as error:
        raise InputError(
            f"task.reward: {names} took longer than task.reward_limit = {limit:g} seconds for "
            f"{len(asked.completions)} completions{error}; make it faster or raise the limit"
        ) from error


def _failing_row(
    function: Callable[..., Any], asked: Asked, error: BaseException, limit: float
) -> int | None:
    """The first row that alone raises the same; None where all do, or none is found in time."""
    end, failing = time.monotonic() + SEARCH, []
    for row in range(len(asked.completions)):
        try:
            _call({"": function}, asked.alone(row), limit)
        except _Failed as again:
            if type(again.__cause__) is type(error):
                failing.append(row)
        except InputError:  # it took too long
            return None
        if time.monotonic() > end:
            return None
    return failing[0] if failing and len(failing) < len(asked.completions) else None


# ---- answers -------------------------------------------------------------------------------------


def _read(name: str, returned: Any, asked: Asked) -> list[Given]:
    count = len(asked.completions)
    try:
        if isinstance(returned, Mapping):  # {"reward": [...], "feedback": [...]}
            feedback = returned.get("feedback") or [""] * len(returned["reward"])
            returned = list(zip(returned["reward"], feedback, strict=True))
        if isinstance(returned, str | bytes | Set):  # a set has no order
            raise TypeError
        items = list(returned)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"task.reward: {name} returned {show(returned)}; {RULE}") from error
    if len(items) != count:
        raise InputError(
            f"task.reward: {name} returned {len(items)} rewards for {count} completions; {RULE}"
        )
    return [_given(name, item, asked.place(row)) for row, item in enumerate(items)]


def _given(name: str, item: Any, where: str) -> Given:
    reward: Any = item
    feedback, well_formed = "", True
    if isinstance(item, Mapping):
        reward, feedback = item.get("reward", ""), item.get("feedback", "")
        well_formed = bool(item.get("well_formed", True))
    elif isinstance(item, tuple | list) and len(item) == 2:
        reward, feedback = item
    feedback = "" if feedback is None else feedback
    try:
        text = isinstance(reward, str | bytes | bytearray)
        number = None if reward is None else math.nan if text else float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    usable = number is None or math.isfinite(number)
    if not usable or not isinstance(feedback, str) or not _is_unicode(feedback):
        raise InputError(f"task.reward: {name} returned {show(item)} for {where}; {RULE}")
    return Given(number, feedback, well_formed)


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer takes it: half of a surrogate pair is no character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
