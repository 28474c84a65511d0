"""Questions of a run: those whose prompts fit its limits, and how many were left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from pgpo_jax import data, fields, tasks
from pgpo_jax.config import Config
from pgpo_jax.data import DataConfig
from pgpo_jax.errors import InputError
from pgpo_jax.evaluation import AlsoConfig
from pgpo_jax.reprompt import RepromptConfig, resolve_templates, teacher_messages
from pgpo_jax.tasks import Question, Task


class LeftOut(NamedTuple):
    """Questions that are left out of a set because their prompts are too long."""

    count: int = 0
    total: int = 0
    """Questions of the set, these included."""
    longest: int = 0
    """Tokens of the longest of them."""


class HeldOut(NamedTuple):
    """A set of held-out questions: a task's `test`, those that fit."""

    label: str
    """What stands before its metrics; empty for the run's own task."""
    task: Task
    left_out: LeftOut

    @property
    def name(self) -> str:
        """In words, after a number."""
        return f"held-out questions of {self.label}" if self.label else "held-out questions"

    @property
    def prefix(self) -> str:
        """Of its metrics."""
        return f"eval/{self.label}/" if self.label else "eval/"


class Questions(NamedTuple):
    """All questions of a run."""

    task: Task
    """The run's own, with the questions that fit."""
    left_out: LeftOut
    """Of its training questions."""
    held_out: tuple[HeldOut, ...]
    """The sets that evaluations ask: the task's own, then those of `evaluation.also`."""

    def notes(self, config: DataConfig) -> list[str]:
        """What was left out, a sentence for each set."""
        limit = config.max_prompt_length
        named = [("training questions", self.left_out)]
        named += [(each.name, each.left_out) for each in self.held_out]
        return [
            f"{count:,} of {total:,} {name} are left out: their prompts have more than "
            f"data.max_prompt_length = {limit} tokens, the longest {longest:,}"
            for name, (count, total, longest) in named
            if count
        ]


def load_questions(
    config: Config, task: Task, tokenizer: Any, reprompt: RepromptConfig
) -> Questions:
    """Leaves out the questions that are too long, and loads the further evaluation sets.

    Every question that stands in a list is tokenized; of a lazy sequence, which makes its questions
    when they are asked for, the first. What is left depends on the data, the tokenizer and the
    configuration alone, so hosts and resumed runs agree.

    Args:
      config: The run's.
      task: The run's own.
      tokenizer: The model's or the task's.
      reprompt: The teacher's prompt limit and templates.

    Raises:
      InputError: A question that is over-long where that is an error, or empty; nothing is left; a
        chat template that writes a question in two ways; no room for a demonstration.
    """

    def fit(questions: Sequence[Question], kind: str) -> tuple[Sequence[Question], LeftOut]:
        lengths, left_out = _measure(questions, kind, tokenizer, config.data)
        if len(lengths):
            longest = questions[int(np.argmax(lengths))]
            _check_room(longest, tokenizer, config.data, reprompt)
        if left_out.count:
            questions = [q for q, size in zip(questions, lengths, strict=True) if size > 0]
        return questions, left_out

    train, left_out = fit(task.train, "training questions")
    own = HeldOut("", task, LeftOut())
    sets = [own, *_load_also(config.evaluation.also)]
    for number, each in enumerate(sets):
        test, over = fit(each.task.test, each.name)
        sets[number] = HeldOut(each.label, dataclasses.replace(each.task, test=test), over)
    task = dataclasses.replace(sets[0].task, train=train)
    return Questions(task, left_out, tuple(sets))


def _load_also(sections: Sequence[AlsoConfig]) -> Iterator[HeldOut]:
    """The further evaluation sets, with all their questions."""
    for index, section in enumerate(sections):
        with fields.inside(f"evaluation.also[{index}]"):
            task = tasks.load(section)
            if not task.test:
                raise InputError(f"task: got no held-out question of {task.name}; must have some")
        yield HeldOut(section.label, task, LeftOut())


def _measure(
    questions: Sequence[Question], kind: str, tokenizer: Any, config: DataConfig
) -> tuple[Int[np.ndarray, " question"], LeftOut]:
    """Tokens of each question's prompt, 0 of those that are left out, and these counted."""
    listed = isinstance(questions, list)
    found = questions if listed else questions[:1]
    conversations = [question.messages for question in found]
    lengths = data.lengths(tokenizer, conversations, config.template_options)
    over = lengths > config.max_prompt_length
    refused = (lengths == 0) | (over if config.over_long == "error" or not listed else False)
    for index in np.flatnonzero(refused)[:1]:
        _encode(found[index], tokenizer, config)  # says what is wrong with it
    if len(found) and over.all():
        raise InputError(
            f"data.max_prompt_length: got {config.max_prompt_length}; all {len(found):,} {kind} "
            f"are longer, the shortest has {lengths.min()} tokens; raise the limit"
        )
    if len(found):
        _check_repeats(found[0], tokenizer, config)
    longest = int(lengths[over].max(initial=0))
    left_out = LeftOut(int(over.sum()), len(questions), longest)
    return np.where(over, 0, lengths), left_out


def _encode(question: Question, tokenizer: Any, config: DataConfig) -> None:
    """Refuses a question that is over-long or empty."""
    data.encode(
        tokenizer,
        [question.messages],
        max_length=config.max_prompt_length,
        template_options=config.template_options,
        names=[question.key],
    )


def _check_room(
    longest: Question, tokenizer: Any, config: DataConfig, reprompt: RepromptConfig
) -> None:
    """The longest prompt must leave the teacher room for a demonstration."""
    data.encode(
        tokenizer,
        [teacher_messages(longest.messages, "", "", resolve_templates(reprompt))],
        max_length=reprompt.max_length - 1,
        template_options={**config.template_options, **reprompt.template_options},
        names=[longest.key],
        field="reprompt.max_length",
    )


def _check_repeats(question: Question, tokenizer: Any, config: DataConfig) -> None:
    """A chat template must write the same prompt again, or a resumed run would ask another one."""
    once, again = (
        data.render(tokenizer, question.messages, config.template_options) for _ in range(2)
    )
    if once != again:
        raise InputError(
            f"model.path: the chat template writes question {question.key!r} in two ways; must "
            "give the same prompt each time, so take what is random out of it"
        )
