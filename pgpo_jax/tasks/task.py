"""A task = questions + a way to verify answers: built in, SciKnowEval, data sets, own rewards.

:func:`load` turns the config section ``task`` into a :class:`Task`. Everything a task does is a
plain function, so a task of your own is one call of :class:`Task`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pgpo_jax.errors import InputError, require
from pgpo_jax.tasks import addition, mathematics, rewards, rows
from pgpo_jax.tasks.answers import Outcome
from pgpo_jax.tasks.verifiers import VERIFIERS

Domain = Literal["biology", "chemistry", "materials", "physics"]
MOST_SECONDS = 24 * 3600
Check = Callable[[str, str], Outcome]
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
    returns one float in [0, 1] a completion, or (float, feedback text), or {"reward", "feedback"}.
    """

    reward_limit: float = 600.0
    """Seconds for one call of your reward function, for all responses of a step; a call that takes
    longer ends the run."""

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
            name=(self.name in TASKS, f"one of {', '.join(TASKS)}"),
            domain=(self.domain in rows.SCIKNOWEVAL_SIZES, "a domain of SciKnowEval"),
            verifier=(
                self.verifier in (None, *VERIFIERS),
                f"null or one of {', '.join(VERIFIERS)}",
            ),
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
    """The built-in task of `addition.py`: 10^10 questions, so all of them are fresh."""
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
        verify=_reward(config.reward, config.reward_limit) if config.reward else _addition_outcomes,
        templates=addition.TEMPLATES,
        examples=_addition_examples,
        demonstration=lambda question: question.answer,
        tokenizer=addition.make_tokenizer(),
    )


# --- verification --------------------------------------------------------------------------


def _reward(name: str, limit: float) -> Verify:
    """A user's reward function as a task's `verify`."""
    function = rewards.import_function(name)

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
        return rewards.call_reward(name, function, prompts, completions, columns, limit)

    return verify


def _verify(config: TaskConfig, name: str | None) -> Verify:
    """The user's reward function if there is one, else the check of that name as a task's `verify`.

    A row's own feedback replaces the check's.
    """
    if config.reward:
        return _reward(config.reward, config.reward_limit)
    assert name is not None
    check = _check(config, name)

    def judge(question: Question, response: str) -> Outcome:
        outcome = check(response, question.answer)
        feedback = question.columns.get("feedback")
        return outcome._replace(feedback=feedback) if feedback and outcome.reward < 1 else outcome

    def verify(questions: Sequence[Question], responses: Sequence[str]) -> list[Outcome]:
        if len(questions) != len(responses):
            raise ValueError(f"{len(questions)} questions and {len(responses)} responses")
        if name != "math":
            return list(map(judge, questions, responses))
        with ThreadPoolExecutor(mathematics.PROCESSES) as threads:
            return list(threads.map(judge, questions, responses))

    return verify


def _check(config: TaskConfig, name: str) -> Check:
    """A check by name."""
    check = VERIFIERS[name].check
    if name == "math":
        mathematics.require_math_verify()
        return partial(check, time_limit=config.time_limit)
    return check if name == "tool_use" else partial(check, require_tags=config.require_tags)


# --- SciKnowEval ---------------------------------------------------------------------------


def load_sciknoweval(config: TaskConfig) -> Task:
    """Level-3 multiple-choice questions of SciKnowEval (Feng et al., arXiv 2406.09098).

    With `task.path`: ``<path>/<domain>/{train,test}.jsonl`` with the fields `idx`, `system`,
    `prompt`, `answer`. Without: the hub data set, filtered, in the split that the SDPO authors
    published. That split is drawn by position, so it is theirs as long as the hub's list is the one
    they had; another number of questions is a warning that says so.

    There is no feedback, as in SDPO.
    """
    if config.path is not None:
        folder = Path(config.path) / config.domain
        train, test = (rows.read_jsonl(folder / f"{part}.jsonl") for part in ("train", "test"))
    else:
        hub, size = rows.SCIKNOWEVAL, rows.SCIKNOWEVAL_SIZES[config.domain]
        splits = rows.read_datasets(hub)
        whole = [row for name in splits for row in rows.split_rows(splits, name, hub, "task.path")]
        found = rows.sciknoweval_rows(whole, config.domain)
        if not found:
            raise InputError(f"task.domain: got {config.domain!r}; {hub} has no such questions")
        if len(found) != size:
            warnings.warn(
                f"{hub} has {len(found)} {config.domain} questions, the published split was drawn "
                f"from {size}: this split is drawn the same way, but is not theirs",
                stacklevel=2,
            )
        train, test = (
            [found[index] for index in part] for part in rows.published_split(len(found))
        )

    def question(where: str, row: dict[str, Any]) -> Question:
        answer = str(rows.column(row, "answer", where)).strip()
        record = {"system": rows.SCIKNOWEVAL_SYSTEM, **row, "answer": answer}
        key = f"{config.domain}/{rows.column(row, 'idx', where)}"
        return _question(where, record, key)

    def worked(question: Question) -> str:
        return VERIFIERS["multiple_choice"].worked(question.answer)

    questions = [question(*row) for row in train[: config.train_questions]]
    return Task(
        name=f"sciknoweval/{config.domain}",
        train=questions,
        test=[question(*row) for row in test[: config.test_questions]],
        verify=_verify(config, "multiple_choice"),
        examples=_examples(questions, worked),
        demonstration=worked,
    )


def _examples(
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


# --- data sets -----------------------------------------------------------------------------


def _question(where: str, row: dict[str, Any], key: str) -> Question:
    """A row with `prompt` (string or conversation), optional `system` and `answer`."""
    messages = rows.conversation(row, where)
    for name in ("feedback", "solution"):
        if row.get(name) is not None:
            rows.check_text(name, row[name], where)
    answer = "" if row.get("answer") is None else row["answer"]
    return Question(
        messages=messages,
        answer=answer if isinstance(answer, str) else json.dumps(answer, default=str),
        key=key,
        columns=row,
    )


def _gold(where: str, row: dict[str, Any], verifier: str, check: Check) -> str:
    """The answer that the check compares with.

    Raises:
        InputError: where no response could be right: a night of rewards of 0 has an earlier sign.
    """
    answer = rows.column(row, "answer", where)
    if verifier != "tool_use" and type(answer) not in (str, int, float):
        raise InputError(
            f"task.path: {where}: got the answer {str(answer)[:80]}, a {type(answer).__name__}; "
            "must be a string or a number"
        )
    answer = answer if isinstance(answer, str) else json.dumps(answer, default=str)
    rows.check_text("answer", answer, where)
    try:
        gold = VERIFIERS[verifier].read_gold(answer, row)
        if check(VERIFIERS[verifier].worked(gold), gold).reward != 1:
            raise ValueError("a text that no response can give")
    except ValueError as error:
        raise InputError(
            f"task.path: {where}: got the answer {answer[:80]!r}, {error}, which no response can "
            f"match by task.verifier = {verifier}; correct the row or choose another verifier"
        ) from error
    return gold


def _dataset_rows(config: TaskConfig) -> tuple[rows.Rows, rows.Rows]:
    """Training and held-out rows from a file, a folder or the hub."""
    path = str(config.path)
    local, test = Path(path), None
    if local.is_file() or local.suffix in (".jsonl", ".json"):
        train = rows.read_jsonl(local)
    elif (local / "train.jsonl").is_file():
        train = rows.read_jsonl(local / "train.jsonl")
        if (local / "test.jsonl").is_file():
            test = rows.read_jsonl(local / "test.jsonl")
    else:
        splits = rows.read_datasets(path, config.subset)
        train = rows.split_rows(splits, config.train_split, path, "task.train_split")
        if config.test_split in splits:
            test = rows.split_rows(splits, config.test_split, path, "task.test_split")
    if config.test_path is not None:
        test = rows.read_jsonl(Path(config.test_path), "task.test_path")
    if test is None:
        held_out = round(len(train) * config.test_fraction)
        order = np.random.default_rng(config.seed).permutation(len(train))
        test = [train[index] for index in sorted(order[:held_out])]
        train = [train[index] for index in sorted(order[held_out:])]
        if not train:
            raise InputError(
                f"task.test_fraction: got {config.test_fraction}, which leaves no question of "
                f"{held_out} for training; lower it or give task.test_path"
            )
    return train[: config.train_questions], test[: config.test_questions]


def load_dataset(config: TaskConfig) -> Task:
    """Your own questions: rows with `prompt`, `answer` and what your reward function asks for.

    Columns: `prompt` (a string or a conversation), `answer` (for a verifier), and optionally
    `system`, `feedback` (shown to the teacher for a response that is not right) and `solution` (a
    worked response, for the warm start and the pre-flight check).
    """
    train, test = _dataset_rows(config)
    check = None if config.verifier is None else _check(config, config.verifier)

    def question(where: str, row: dict[str, Any], part: str) -> Question:
        gold = _gold(where, row, str(config.verifier), check) if check else None
        asked = _question(where, row, f"{part}/{where}")
        return asked if gold is None else replace(asked, answer=gold)

    questions = [
        [question(where, row, part) for where, row in found]
        for part, found in (("train", train), ("test", test))
    ]
    solved = [question for question in questions[0] if question.columns.get("solution")]

    def examples(rng: np.random.Generator, count: int) -> list[Example]:
        picks = [solved[index] for index in rng.integers(len(solved), size=count)]
        return [
            Example(
                question,
                str(question.columns["solution"]) if row % 2 else None,
                str(question.columns["solution"]),
            )
            for row, question in enumerate(picks)
        ]

    def worked(question: Question) -> str:
        solution = question.columns.get("solution")
        return (
            str(solution)
            if solution
            else VERIFIERS[config.verifier or "exact"].worked(question.answer)
        )

    return Task(
        name=str(config.path),
        train=questions[0],
        test=questions[1],
        verify=_verify(config, config.verifier),
        examples=examples if solved else None,
        demonstration=worked if solved or config.verifier else None,
    )


TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "addition": load_addition,
    "sciknoweval": load_sciknoweval,
    "dataset": load_dataset,
}
