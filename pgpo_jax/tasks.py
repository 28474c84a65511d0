"""A task = questions + a way to verify answers: built in, SciKnowEval, data sets, own rewards.

:func:`load` turns the config section ``task`` into a :class:`Task`. Everything a task does is a
plain function, so a task of your own is one call of :class:`Task`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from pgpo_jax import addition
from pgpo_jax.errors import InputError, require
from pgpo_jax.verifiers import Outcome

Domain = Literal["biology", "chemistry", "materials", "physics"]
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
    tokenizer: Any = None
    """The task's own tokenizer, for a model made from scratch; None: the checkpoint's."""


@dataclass(frozen=True)
class TaskConfig:
    """What is asked and how it is judged (config section ``task``)."""

    name: Literal["addition", "sciknoweval", "dataset"] = "addition"
    """`addition`: built in, no files. `sciknoweval`: four science domains of multiple-choice
    questions. `dataset`: your JSONL files, folder or Hugging Face data set."""

    path: str | None = None
    """`sciknoweval`: a folder with `<domain>/{train,test}.jsonl` (default: the hub data set).
    `dataset`: a `.jsonl` file, a folder with `train.jsonl`, or a hub id."""

    test_path: str | None = None
    """`dataset`: a `.jsonl` file of held-out questions (default: `test.jsonl` of the folder, the
    hub's `test_split`, else `test_fraction` of the training questions)."""

    subset: str | None = None
    """`dataset`: the configuration name of a hub data set, such as `main`."""

    train_split: str = "train"
    """`dataset`: the hub's split to train on."""

    test_split: str = "test"
    """`dataset`: the hub's split to hold out."""

    test_fraction: float = 0.1
    """`dataset`: the part of the training questions held out where there is no test part."""

    domain: Domain = "chemistry"
    """`sciknoweval`: which domain."""

    verifier: Literal["multiple_choice", "math", "exact", "numeric", "tool_use"] | None = None
    """`dataset`: how a response is compared with the column `answer` (or set `reward`)."""

    reward: str | None = None
    """Your own reward, `module:function`, called as in TRL: `f(prompts, completions, **columns)`
    returns one float a completion, or (float, feedback text), or {"reward", "feedback"}."""

    require_tags: bool = False
    """Accept an answer only between `<answer>` and `</answer>`, not a bare one."""

    time_limit: float = 5.0
    """Seconds for one mathematical comparison; a longer one counts as failed (reward 0)."""

    train_questions: int | None = None
    """Use only the first so many training questions (default: all; `addition`: 1,000,000)."""

    test_questions: int | None = None
    """Use only the first so many held-out questions (default: all; `addition`: 256)."""

    seed: int = 0
    """Chooses the questions of `addition` and those that `test_fraction` holds out."""

    def __post_init__(self) -> None:
        counts = (self.train_questions, self.test_questions)
        require(
            "task",
            self,
            time_limit=(self.time_limit > 0, "positive (seconds)"),
            test_fraction=(0 <= self.test_fraction < 1, "at least 0 and below 1"),
            train_questions=(counts[0] is None or counts[0] > 0, "positive or null"),
            test_questions=(counts[1] is None or counts[1] >= 0, "not negative, or null"),
            seed=(self.seed >= 0, "not negative"),
            reward=(
                self.reward is None or all(self.reward.partition(":")),
                "`module:function`, such as `my_rewards:accuracy`",
            ),
        )
        if self.name != "dataset":
            return
        if not self.path:
            raise InputError(
                "task.path: got nothing; `dataset` needs a .jsonl file, a folder or a hub id"
            )
        if (self.verifier is None) == (self.reward is None):
            raise InputError(
                f"task.verifier: got verifier {self.verifier!r} and reward {self.reward!r}; "
                "`dataset` needs exactly one of them"
            )


def load(config: TaskConfig) -> Task:
    """Builds the task that the config names.

    Raises:
        InputError: a missing file or column, a bad line (file:line), an empty data set, an
            unknown domain, or a reward function that cannot be imported.
    """
    return TASKS[config.name](config)


# --- addition ------------------------------------------------------------------------------


class AdditionQuestions(Sequence[Question]):
    """Questions `start` to `start + count` in the seed's order, made when they are asked for."""

    def __init__(self, start: int, count: int, seed: int):
        self._indices, self._seed = range(start, start + count), seed

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return _addition_question(*addition.operands(self._indices[index], self._seed))


def _addition_question(first: int, second: int) -> Question:
    text, answer = addition.prompt(first, second), addition.true_sum(first, second)
    return Question(
        messages=({"role": "user", "content": text},),
        answer=answer,
        key=text,
        columns={"prompt": text, "answer": answer},
    )


def _addition_outcomes(questions: Sequence[Question], responses: Sequence[str]) -> list[Outcome]:
    return [
        Outcome(float(response == question.answer), well_formed=addition.well_formed(response))
        for question, response in zip(questions, responses, strict=True)
    ]


def _addition_examples(rng: np.random.Generator, count: int) -> list[Example]:
    return [
        Example(_addition_question(first, second), demonstration, response)
        for first, second, demonstration, response in addition.worked_examples(rng, count)
    ]


def load_addition(config: TaskConfig) -> Task:
    """The built-in task of :mod:`pgpo_jax.addition`: 10^10 questions, so all of them are fresh."""
    train = 1_000_000 if config.train_questions is None else config.train_questions
    test = 256 if config.test_questions is None else config.test_questions
    if train + test > addition.COUNT**2:
        raise InputError(
            f"task.train_questions: got {train} and {test} held out; addition has "
            f"{addition.COUNT**2} questions"
        )
    return Task(
        name="addition",
        train=AdditionQuestions(test, train, config.seed),
        test=AdditionQuestions(0, test, config.seed),
        verify=_addition_outcomes,
        templates=addition.TEMPLATES,
        examples=_addition_examples,
        demonstration=lambda question: question.answer,
        tokenizer=addition.make_tokenizer(),
    )


TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "addition": load_addition,
}
