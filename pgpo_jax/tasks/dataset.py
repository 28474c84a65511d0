"""Questions of your own: files, folders, data sets of the hub."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import formats, programs, rows, sandbox
from pgpo_jax.tasks.rows import RowError, Rows, listed
from pgpo_jax.tasks.sources import Source, open_source
from pgpo_jax.tasks.task import Question, Task, TaskConfig, worked_examples
from pgpo_jax.tasks.verification import make_check, read_gold, verify_by
from pgpo_jax.tasks.verifiers import VERIFIERS

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def load(config: TaskConfig) -> Task:
    """Your own questions: rows with `prompt`, `answer` and what your reward function asks for.

    Columns: `prompt` (a string or a conversation), `answer` (for a verifier), and optionally
    `system`, `feedback` (shown to the teacher for a response that is not right) and `solution` (a
    worked response, for the warm start, the pre-flight check and `reprompt.source`);
    `task.columns` says which are meant where they have other names.
    """
    train, test, notes = _read(config)
    verifier = config.verifier
    check = None if verifier in (None, "code") else make_check(config, verifier)

    def question(where: str, item: tuple[str, dict[str, Any]]) -> Question:
        part, row = item
        record, key = _record(row, config.columns), f"{part}/{where}"
        if verifier == "code":
            programs.read_tests(record)
        if verifier is None or check is None:
            return make_question(record, key)
        if "options" not in config.columns:
            return make_question(record, key, read_gold(record, verifier, check))
        record = _with_options(record)
        return make_question(record, key, read_gold({"answer": record["answer"]}, verifier, check))

    parts = [("train", row) for _, row in train] + [("test", row) for _, row in test]
    places = [where for where, _ in (*train, *test)]
    questions = rows.read_each("task.path", list(zip(places, parts, strict=True)), question)
    asked, held_out = questions[: len(train)], questions[len(train) :]
    solved = [question for question in asked if question.columns.get("solution")]
    # A program is known only where a row gives one.
    known = check or (solved if verifier is None else _all_solved(questions))

    def worked(question: Question) -> str:
        solution = question.columns.get("solution")
        return str(solution or VERIFIERS[verifier or "exact"].worked(question.answer))

    return Task(
        name=str(config.path),
        train=asked,
        test=held_out,
        verify=verify_by(config, verifier or "exact"),  # or task.reward, see `registry.load`
        examples=worked_examples(solved, worked) if solved else None,
        demonstration=worked if known else None,
        solution=(lambda question: question.columns.get("solution") or None) if solved else None,
        notes=(*notes, *repeated(asked, held_out), *sandbox.notes(config.sandbox)),
    )


def _all_solved(questions: Sequence[Question]) -> bool:
    return all(question.columns.get("solution") for question in questions)


# --- which rows -----------------------------------------------------------------------------------


def _read(config: TaskConfig) -> tuple[Rows, Rows, list[str]]:
    """Training and held-out rows, and where they come from in words."""
    text = {config.columns.get(name, name) for name in ("prompt", "system", "feedback", "solution")}
    if config.verifier is not None:  # its golds are compared as they are written
        text.add(config.columns.get("answer", "answer"))
    source = open_source(str(config.path), config.subset, config.train_split, text)
    if "" in source.splits and config.train_split == "train":
        train = source.splits[""]()
    else:
        train = source.read(config.train_split, "task.train_split")
    found = len(train)
    train, test, origin = _hold_out(config, source, train, text)
    if not train:
        raise InputError(
            f"task.test_fraction: got {config.test_fraction}, which leaves no question of {found} "
            "for training; lower it or give task.test_path"
        )
    notes = [f"questions from {source.taken_for}; held out: {origin}"]
    for name, limit, part in (
        ("train_questions", config.train_questions, train),
        ("test_questions", config.test_questions, test),
    ):
        if limit is not None and limit > len(part):
            notes.append(f"task.{name}: got {limit:,}; there are {len(part):,}")
    return train[: config.train_questions], test[: config.test_questions], notes


def _hold_out(
    config: TaskConfig, source: Source, train: Rows, text: set[str]
) -> tuple[Rows, Rows, str]:
    """Training rows, held-out rows, and where the latter come from in words."""
    if config.test_path is not None:
        test = formats.read_file(Path(config.test_path), "task.test_path", text)
        return train, test, f"the file {config.test_path}"
    split = config.test_split
    if split is None and "test" in source.splits:
        split = "test"
        if config.test_fraction not in (0, TaskConfig.test_fraction):
            raise InputError(
                f"task.test_fraction: got {config.test_fraction}; {source.taken_for} has a split "
                "`test`, which is held out: leave task.test_fraction out"
            )
    if split is not None:
        return train, source.read(split, "task.test_split"), f"the split {split}"
    count = round(len(train) * config.test_fraction)
    order = np.random.default_rng(config.seed).permutation(len(train))
    test = [train[index] for index in sorted(order[:count])]
    rest = [train[index] for index in sorted(order[count:])]
    origin = f"{count:,} of {len(train):,} (task.test_fraction {config.test_fraction:g})"
    return rest, test, origin if count else "nothing"


# --- one row --------------------------------------------------------------------------------------


def _record(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with the columns that `task.columns` names under the names they are used by."""
    return row | {name: rows.column(row, theirs) for name, theirs in columns.items()}


def make_question(row: dict[str, Any], key: str, gold: str | None = None) -> Question:
    """A row with `prompt` (string or conversation), optional `system`, `feedback`, `solution`.

    Args:
      row: its columns.
      key: the question's name.
      gold: what a check compares with; without one, `answer` as text.
    """
    messages = rows.conversation(row)
    for name in ("feedback", "solution"):
        if row.get(name) is not None:
            rows.check_text(name, row[name])
    answer = "" if row.get("answer") is None else row["answer"]
    written = answer if isinstance(answer, str) else json.dumps(answer, default=str)
    return Question(messages, written if gold is None else gold, key, row)


def _with_options(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose prompt shows its options as `A: text` and whose answer is one of the letters.

    Raises:
      RowError: options that are none, or an answer that does not name exactly one of them.
    """
    labels, texts = _options(row["options"])
    answer = rows.column(row, "answer")
    position = _position(answer, labels, texts)
    shown = "\n".join(f"{letter}: {text}" for letter, text in zip(LETTERS, texts, strict=False))
    prompt = rows.column(row, "prompt")
    if isinstance(prompt, str):
        prompt = f"{prompt}\n\n{shown}"
    else:
        *before, last = (dict(message) for message in rows.conversation({"prompt": prompt}))
        prompt = [*before, last | {"content": f"{last['content']}\n\n{shown}"}]
    return row | {"prompt": prompt, "answer": LETTERS[position]}


def _options(value: Any) -> tuple[list[str], list[str]]:
    """The labels and texts of options."""
    texts, labels = value, None
    if isinstance(value, Mapping):
        texts, labels = value.get("text"), value.get("label")
    if (
        not isinstance(texts, list)
        or not 2 <= len(texts) <= len(LETTERS)
        or not all(type(text) in (str, int, float) for text in texts)
    ):
        raise RowError(
            f"got the options {str(value)[:80]}; must be a list of 2 to {len(LETTERS)} texts, or "
            "`text` and `label` with one"
        )
    labels = list(LETTERS[: len(texts)]) if labels is None else labels
    if not isinstance(labels, list) or not len(texts) == len(labels) == len({*map(str, labels)}):
        raise RowError(f"got the labels {str(labels)[:80]} for {len(texts)} options")
    return [str(label) for label in labels], [str(text).strip() for text in texts]


def _position(answer: Any, labels: Sequence[str], texts: Sequence[str]) -> int:
    """The option that an answer names by its label, its text or its index from 0."""
    named: set[int] = set()
    if type(answer) is int:
        named = {answer} & set(range(len(texts)))
    elif isinstance(answer, str):
        plain = re.fullmatch(r"\(?([A-Za-z0-9])[).:]?", answer.strip())
        label = plain[1] if plain else answer.strip()
        named = {labels.index(label)} if label in labels else set()
        named |= {index for index, text in enumerate(texts) if text == answer.strip()}
        if not named and re.fullmatch("[0-9]+", answer.strip()) and not labels[0].isdigit():
            named = {int(answer)} & set(range(len(texts)))
    if len(named) != 1:
        problem = "more than one" if named else "none"
        raise RowError(
            f"got the answer {str(answer)[:80]!r}, which names {problem} of {len(texts)} options "
            f"({', '.join(labels)}); must be a label, an option's text or an index from 0"
        )
    return named.pop()


# --- what is there twice --------------------------------------------------------------------------


def repeated(train: Sequence[Question], test: Sequence[Question]) -> list[str]:
    """What is said of questions that stand there more than once, white space aside."""
    asked: dict[tuple[tuple[str, str], ...], list[Question]] = defaultdict(list)
    for question in train:
        asked[_asked(question)].append(question)
    notes = []
    known = [question.key for question in test if _asked(question) in asked]
    if known:
        notes.append(
            f"{len(known):,} of {len(test):,} held-out questions are training questions too: "
            f"{listed(known)}"
        )
    several = [found for found in asked.values() if len(found) > 1]
    if several:
        extra = sum(len(found) - 1 for found in several)
        notes.append(
            f"{extra:,} of {len(train):,} training questions repeat another: "
            f"{listed(f'{found[1].key} is {found[0].key}' for found in several)}"
        )
    differ = [found for found in several if len({question.answer for question in found}) > 1]
    if differ:
        places = (" and ".join(question.key for question in found[:3]) for found in differ)
        notes.append(
            f"{len(differ):,} training questions stand there with different answers: "
            f"{listed(places)}"
        )
    return notes


def _asked(question: Question) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], " ".join(m["content"].split())) for m in question.messages)
