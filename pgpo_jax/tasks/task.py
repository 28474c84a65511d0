"""Questions, tasks and the config section `task`.

Everything a task does is a plain function, so a task of your own is one call of `Task`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from pgpo_jax.errors import InputError, require
from pgpo_jax.tasks.answers import Outcome
from pgpo_jax.tasks.verifiers import VERIFIERS

Name = Literal["addition", "code", "sciknoweval", "reasoning_gym", "dataset"]
GROUP = "pgpo_jax.tasks"
"""The group of entry points by which an installed package brings tasks."""
Domain = Literal["biology", "chemistry", "materials", "physics"]
PROGRAMS = ("tests", "public_tests", "entry_point", "time_limit")
COLUMNS = ("prompt", "answer", "system", "feedback", "solution", "options", *PROGRAMS)
CHECKS = (*VERIFIERS, "code")
MOST_SECONDS = 24 * 3600
_SANDBOXED = ("sandbox", "partial_credit", "feedback_limit")
Verify = Callable[[Sequence["Question"], Sequence[str]], list[Outcome]]


@dataclass(frozen=True)
class Question:
    """One item of a task."""

    messages: tuple[Mapping[str, str], ...]
    """The conversation, `{"role", "content"}` each; the last message is the user's."""
    answer: str
    """What the verifier compares with; never shown to student or teacher."""
    key: str
    """A stable name, for errors, samples and evaluation."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The raw row, given to a user's reward function."""


class Example(NamedTuple):
    """A worked example for the supervised warm start."""

    question: Question
    demonstration: str | None
    """What the prompt shows, as the teacher's would; None for the plain question."""
    response: str
    """What the model shall answer (the end token follows it)."""
    feedback: str = ""
    """What the prompt says of an earlier attempt, as the teacher's would; empty for nothing."""
    attempt: str = ""
    """That attempt, where the prompt shows it."""


@dataclass(frozen=True)
class Task:
    """Questions and how their responses are judged."""

    name: str
    train: Sequence[Question]
    """Training questions; may be lazy and very long."""
    test: Sequence[Question]
    """Held-out questions; empty if there are none."""
    verify: Verify
    """(questions, responses), aligned, -> outcomes; one call may hold many groups."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """The task's own `reprompt`, `solution`, `feedback` templates; absent: METHOD's defaults."""
    examples: Callable[[np.random.Generator, int], list[Example]] | None = None
    """(generator, count) -> worked examples for the warm start; None: the task has none."""
    demonstration: Callable[[Question], str] | None = None
    """A correct response, for the pre-flight check; None: the task knows none."""
    solution: Callable[[Question], str | None] | None = None
    """The solution that the data give of a question, None where they give none, for
    `reprompt.source`; None: the task has no solutions."""
    tokenizer: Any = None
    """The task's own tokenizer, for a model made from scratch; None: the checkpoint's."""
    code: str = ""
    """Digest of the files of a user's reward functions; empty where there are none."""
    rewards: tuple[str, ...] = ()
    """What a user's reward functions are called in the metrics (`Outcome.parts`)."""
    file: str = ""
    """Digest of the file that made a task from outside; empty for those of the package."""
    notes: tuple[str, ...] = ()
    """What should be known of the questions before they are trained on, a sentence each."""


def digest(task: Task) -> dict[str, str]:
    """What a task's content is, so that a resumed run can tell whether it is still the same.

    Returns:
      `train`, `test` and, where they are a user's, `reward` and `task`, each 16 hexadecimal digits.
      Lists are hashed question by question (prompt, answer and every column, not the names of
      files); a lazy sequence by its `repr`, which must state its parameters.
    """
    found = {"train": _digest(task.train), "test": _digest(task.test)}
    files = {"reward": task.code[:16], "task": task.file[:16]}
    return found | {part: value for part, value in files.items() if value}


def _digest(questions: Sequence[Question]) -> str:
    found = hashlib.sha256()
    if isinstance(questions, list | tuple):
        for question in questions:
            content = (question.messages, question.answer, question.columns)
            found.update(json.dumps(content, default=str, sort_keys=True).encode() + b"\n")
    elif type(questions).__repr__ is object.__repr__:
        return ""  # an address in memory says nothing
    else:
        found.update(repr(questions).encode())
    return found.hexdigest()[:16]


def worked_examples(
    questions: Sequence[Question], worked: Callable[[Question], str]
) -> Callable[[np.random.Generator, int], list[Example]]:
    """Worked examples for the warm start: every other one shows its response as a demonstration."""

    def examples(rng: np.random.Generator, count: int) -> list[Example]:
        picks = [questions[index] for index in rng.integers(len(questions), size=count)]
        return [
            Example(question, worked(question) if row % 2 else None, worked(question))
            for row, question in enumerate(picks)
        ]

    return examples


def registered() -> list[str]:
    """The tasks that installed packages bring."""
    return sorted({entry.name for entry in metadata.entry_points(group=GROUP)})


def _from_outside(name: str) -> bool:
    return all(name.partition(":")) or name in registered()


@dataclass(frozen=True)
class TaskConfig:
    """What is asked and how it is judged (config section `task`)."""

    name: str = "addition"
    """`addition`, `code` (small programs, judged by tests): built in, no files. `sciknoweval`: four
    science domains of multiple-choice questions. `reasoning_gym`: one of the hundred procedural
    data sets of that package. `dataset`: your files, folder or Hugging Face data set. A task of
    your own: `module:function`, which returns a `Task`, or what an installed package calls one
    (entry points `pgpo_jax.tasks`)."""

    path: str | None = None
    """`sciknoweval`: a folder with `<domain>/{train,test}.jsonl` (default: the hub data set).
    `dataset`: a file (`.jsonl`, `.json` with a list, `.csv`, `.tsv`, `.parquet`, also `.gz`), a
    folder of them, a folder of `save_to_disk`, or a hub id; what is local comes first."""

    test_path: str | None = None
    """`dataset`: a file of held-out questions (default: `test_split`)."""

    subset: str | None = None
    """`dataset`: the configuration name of a data set, such as `main`."""

    train_split: str = "train"
    """`dataset`: the split to train on; in a folder, `train.jsonl` or another format is `train`."""

    test_split: str | None = None
    """`dataset`: the split to hold out (default: `test` if there is one, else `test_fraction`)."""

    test_fraction: float = 0.1
    """`dataset`: the part of the training questions held out where there is no test part."""

    columns: dict[str, str] = field(default_factory=dict)
    """`dataset`: which columns are meant, such as `{prompt: question, answer: target}`. Besides
    these two: `system`, `feedback`, `solution`, and for `multiple_choice` the column of `options`
    (a list, or `text` and `label`), which are then shown below the prompt as `A: text`; the answer
    may be a label, an option's text or an index from 0. For `code`, in place of the answer:
    `tests`, `public_tests`, `entry_point`, `time_limit`."""

    domain: Domain = "chemistry"
    """`sciknoweval`: which domain."""

    dataset: str | None = None
    """`reasoning_gym`: which of its data sets, such as `word_sequence_reversal`."""

    options: dict[str, Any] = field(default_factory=dict)
    """`reasoning_gym`: the settings of that data set, such as `{max_words: 5}`. `addition`:
    `forgets`, the probability that the tutor forgets a carry (default 0.5), and `feedback`, whether
    a wrong response is told one of its wrong digits (default false). A task of your own: the
    keyword arguments of its function."""

    verifier: Literal["multiple_choice", "math", "exact", "numeric", "tool_use", "code"] | None = (
        None
    )
    """`dataset`: how a response is compared with the column `answer` (or set `reward`). `code`: the
    last fenced block of the response, or all of it, is a program that the column `tests` tests."""

    reward: str | tuple[str, ...] | None = None
    """Your own reward, `module:function`, called as in TRL: `f(prompts, completions, **columns)`
    returns one number a completion, or (number, feedback text), or {"reward", "feedback"}; what
    counts as a success is `reprompt.threshold`. Several, as `[a:f, b:g]`, are summed; each is
    logged, as `reward/f`; None does not judge that completion; async ones run together."""

    reward_weights: tuple[float, ...] = ()
    """The factor of each reward function in the sum (default: 1 each)."""

    reward_limit: float = 600.0
    """Seconds for one call of a reward function, for all responses of a step, or of all async ones
    together; a call that takes longer ends the run."""

    require_tags: bool = False
    """Accept an answer only between `<answer>` and `</answer>`, not a bare one."""

    time_limit: float = 5.0
    """Seconds for one comparison by the verifier math or one score of `reasoning_gym`; a longer one
    counts as failed (reward 0). Seconds for one test of a program, if its row states none."""

    workers: int | None = None
    """Processes that compare by math-verify, score for `reasoning_gym` or run programs at the same
    time (null: as many as this process may use cores)."""

    sandbox: Literal["bubblewrap", "none"] = "bubblewrap"
    """Where programs of the model run: in a sandbox of `bubblewrap`, without network and files, or,
    with `none`, unprotected, as you: only where the whole machine is a sandbox."""

    partial_credit: bool = False
    """The reward of a program is the part of its tests that it passes, not 1 for all of them."""

    feedback_limit: int = 2000
    """Most characters of the feedback on a program."""

    train_questions: int | None = None
    """Use only the first so many training questions (default: all; `addition`: 1,000,000;
    `reasoning_gym`: 10,000)."""

    test_questions: int | None = None
    """Use only the first so many held-out questions (default: all; `addition`, `code` and
    `reasoning_gym`: 256)."""

    seed: int = 0
    """Chooses the questions of `addition`, `code` and `reasoning_gym`, and those that
    `test_fraction` holds out."""

    def __post_init__(self) -> None:
        counts = (self.train_questions, self.test_questions)
        weights = self.reward_weights
        require(
            "task",
            self,
            name=(
                self.name in get_args(Name) or _from_outside(self.name),
                f"one of {', '.join([*get_args(Name), *registered()])}, or `module:function`",
            ),
            domain=(self.domain in get_args(Domain), f"one of {', '.join(get_args(Domain))}"),
            verifier=(
                self.verifier in (None, *CHECKS),
                f"null or one of {', '.join(CHECKS)}",
            ),
            workers=(self.workers is None or self.workers >= 1, "at least 1, or null (all cores)"),
            sandbox=(self.sandbox in ("bubblewrap", "none"), "bubblewrap or none"),
            feedback_limit=(self.feedback_limit >= 1, "at least 1 (characters)"),
            time_limit=(0 < self.time_limit < MOST_SECONDS, "positive (seconds), a day at most"),
            reward_limit=(
                0 < self.reward_limit < MOST_SECONDS,
                "positive (seconds), a day at most",
            ),
            test_fraction=(0 <= self.test_fraction < 1, "at least 0 and below 1"),
            train_questions=(counts[0] is None or counts[0] > 0, "positive or null"),
            test_questions=(counts[1] is None or counts[1] >= 0, "not negative, or null"),
            seed=(self.seed >= 0, "not negative"),
            reward=(
                self.reward != () and all(all(name.partition(":")) for name in self.rewards),
                "`module:function`, such as `my_rewards:accuracy`, or a list of them",
            ),
            reward_weights=(
                not weights
                or (
                    len(weights) == len(self.rewards)
                    and all(map(math.isfinite, weights))
                    and any(weights)
                ),
                f"a finite number for each of {len(self.rewards)} reward functions, not all 0",
            ),
            columns=(
                all(n in COLUMNS and v and isinstance(v, str) for n, v in self.columns.items()),
                f"names of columns for {', '.join(COLUMNS)}",
            ),
        )
        if len({*self.rewards}) < len(self.rewards):
            raise InputError(
                f"task.reward: got {', '.join(self.rewards)}; must be different functions"
            )
        if self.name == "reasoning_gym" and not self.dataset:
            raise InputError(
                "task.dataset: got nothing; `reasoning_gym` needs the name of one of its data sets"
            )
        if self.name == "dataset" and not self.path:
            raise InputError("task.path: got nothing; `dataset` needs a file, a folder or a hub id")
        if self.name == "dataset" and (self.verifier is None) == (self.reward is None):
            raise InputError(
                f"task.verifier: got verifier {self.verifier!r} and reward {self.reward!r}; "
                "`dataset` needs exactly one of them"
            )
        for name, reason in self._idle().items():
            value, initial = getattr(self, name), getattr(TaskConfig, name, {})
            if value != initial:
                raise InputError(f"task.{name}: got {value!r}; {reason}, so leave it out")

    @property
    def rewards(self) -> tuple[str, ...]:
        """The reward functions, `module:function` each."""
        if self.reward is None:
            return ()
        return (self.reward,) if isinstance(self.reward, str) else tuple(self.reward)

    def _idle(self) -> dict[str, str]:
        """Fields that would be read by nothing, and why."""
        names = {entry.name for entry in fields(TaskConfig)}
        own = {"name", "reward", "reward_weights", "reward_limit"}
        common = own | {"train_questions", "test_questions"}
        read = {
            "addition": common | {"seed", "options"},
            "code": common | {"seed", "time_limit", "workers", *_SANDBOXED},
            "sciknoweval": common | {"path", "domain", "require_tags"},
            "reasoning_gym": common
            | {"seed", "dataset", "options", "require_tags", "time_limit", "workers"},
            "dataset": names - {"domain", "dataset", "options"},
        }.get(self.name, own | {"options"})
        verifier = self.verifier
        if self.name == "sciknoweval":
            verifier = "multiple_choice"
            if self.verifier == verifier:  # stating the only one there is does no harm
                read = read | {"verifier"}
        found = dict.fromkeys(names - read, f"task.name = {self.name} does not read it")
        if self.reward is None:
            found |= dict.fromkeys(("reward_limit", "reward_weights"), "there is no task.reward")
        tagged = ("multiple_choice", "exact", "numeric")
        if self.reward or (verifier not in tagged and self.name != "reasoning_gym"):
            judge = "task.reward" if self.reward else f"the verifier {verifier}"
            found.setdefault("require_tags", f"{judge} does not read it")
        runs = self.reward is None and (self.name == "code" or verifier == "code")
        if verifier != "math" and not runs and (self.reward or self.name != "reasoning_gym"):
            for name in ("time_limit", "workers"):
                reason = "it is for the verifiers math and code and for reasoning_gym"
                found.setdefault(name, reason)
        if not runs:
            found |= dict.fromkeys(_SANDBOXED, "no program of the model is run")
        if self.test_path is not None:
            found["test_split"] = "task.test_path says what is held out"
        named = [name for name in ("test_path", "test_split") if getattr(self, name) is not None]
        if named and self.test_fraction != 0:
            found["test_fraction"] = f"task.{named[0]} says what is held out"
        if verifier != "multiple_choice" and "options" in self.columns:
            found["columns"] = "`options` are for the verifier multiple_choice"
        if verifier != "code" and self.columns.keys() & set(PROGRAMS):
            found["columns"] = f"{', '.join(PROGRAMS)} are for the verifier code"
        return found
