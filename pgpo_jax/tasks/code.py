"""Arithmetic as a program, by a tutor who forgets brackets: the built-in task `code`.

Four steps in words, as in `plus 3, times 2, minus 4, times 5`; the response is a Python function
of `x` that takes them in this order, `((x+3)*2-4)*5`. It is judged by its tests, as every program
is. The tutor's worked examples forget each pair of brackets with probability 1/2, so that a perfect
imitator of plain questions is right a quarter of the time; the examples that show a demonstration
are right. So a model of 100,000 parameters can learn it from its own better-informed self.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import programs, sandbox
from pgpo_jax.tasks.procedural import Questions, word_tokenizer
from pgpo_jax.tasks.task import Example, Question, Task, TaskConfig

ASKED = "Write a Python function f(x) that takes these steps: "
HEAD = "def f(x): return "
WORDS = ("plus", "minus", "times")
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
NUMBERS = range(2, 10)
COUNT = (2 * len(NUMBERS) * len(NUMBERS)) ** 2
"""Questions: plus or minus a number, times a number, and both again."""
TEST = 256
POINTS = (1, -2, 7, 12)
"""Where a function is tested, the first of them publicly."""
AGAIN = "\nNow write f(x)."
RIGHT = "\nA right program:\n"
REMARK = "\nYour earlier attempt was wrong:\n"
TEMPLATES = {
    "reprompt": "{prompt}{solution}{feedback}" + AGAIN,
    "solution": RIGHT + "{demonstration}",
    "feedback": REMARK + "{feedback}",
}

WHOLE = (ASKED, HEAD, AGAIN, RIGHT, REMARK, *WORDS)
VOCABULARY = ("<pad>", "<end>", "<unk>", *WHOLE, *string.printable[:95], "\n")
"""Phrases that always stand as they are, and every printable character."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}<end>"
    "{%- elif not loop.last or add_generation_prompt -%}{{- '\\n' -}}{%- endif -%}{%- endfor -%}"
)

Steps = Sequence[Sequence[Any]]  # words and numbers


def prompt(steps: Steps) -> str:
    """The question's text."""
    return ASKED + ", ".join(f"{word} {number}" for word, number in steps)


def worked(steps: Steps, forgotten: Sequence[bool] = ()) -> str:
    """The program that takes the steps.

    Args:
      steps: Words and numbers.
      forgotten: Whether each pair of brackets, in the order in which it is needed, is left out.
    """
    text, left_out, sum_before = "x", [*forgotten], False
    for word, number in steps:
        if word == "times" and sum_before and not (left_out.pop(0) if left_out else False):
            text = f"({text})"
        text += f"{SIGNS[word]}{number}"
        sum_before = word != "times"
    return HEAD + text


def value(steps: Steps, x: int) -> int:
    """What the function gives for `x`."""
    for word, number in steps:
        x = {"plus": x + number, "minus": x - number, "times": x * number}[word]
    return x


def steps_of(index: int, seed: int) -> list[tuple[str, int]]:
    """The steps of the `index`-th of `COUNT` questions in the order that `seed` gives; no question
    comes twice."""
    # An odd factor permutes the residues of a power of two, and so does a turn of their bits.
    place = index
    for factor, shift in _rounds(seed):
        place = (place * (2 * factor + 1) + shift) % COUNT
        place = (place >> 7) | ((place & 127) << 7)
    steps = []
    for _ in range(2):
        place, sign = divmod(place, 2)
        place, first = divmod(place, len(NUMBERS))
        place, second = divmod(place, len(NUMBERS))
        steps += [(WORDS[sign], NUMBERS[first]), ("times", NUMBERS[second])]
    return steps


@functools.cache
def _rounds(seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(COUNT, size=(3, 2)).tolist()


def make_tokenizer() -> Any:
    """The task's tokenizer: its words and the printable characters, a token each."""
    whole = "|".join(map(re.escape, WHOLE))
    return word_tokenizer(VOCABULARY, rf"{whole}|[\s\S]", CHAT_TEMPLATE)


def _numbered(index: int, seed: int) -> Question:
    return _question(steps_of(index, seed))


def _question(steps: Steps) -> Question:
    text = prompt(steps)
    public, *hidden = (f"assert f({x}) == {value(steps, x)}" for x in POINTS)
    row = {
        "prompt": text,
        "tests": ["\n".join(hidden)],
        "public_tests": [public],
        "steps": [list(step) for step in steps],
    }
    return Question(({"role": "user", "content": text},), "", text, row)


def _solution(question: Question) -> str:
    return worked(question.columns["steps"])


def _examples(rng: np.random.Generator, count: int) -> list[Example]:
    """Worked examples: every other one shows a demonstration and is right."""
    found = []
    for row in range(count):
        steps = [
            (str(rng.choice(WORDS[:2])) if place % 2 == 0 else "times", int(rng.choice(NUMBERS)))
            for place in range(4)
        ]
        question, right = _question(steps), worked(steps)
        shown = bool(row % 2)
        response = right if shown else worked(steps, (rng.random(2) < 0.5).tolist())
        found.append(Example(question, right if shown else None, response))
    return found


def load(config: TaskConfig) -> Task:
    """Programs of four steps: 16,384 questions in the seed's order, the first 256 held out."""
    test = TEST if config.test_questions is None else config.test_questions
    train = COUNT - test if config.train_questions is None else config.train_questions
    if train + test > COUNT or train < 1:
        raise InputError(
            f"task.train_questions: got {train} and {test} held out; code has {COUNT} questions"
        )
    return Task(
        name="code",
        train=Questions("code", _numbered, range(test, test + train), config.seed),
        test=Questions("code", _numbered, range(test), config.seed),
        verify=programs.verify_programs(config),
        templates=TEMPLATES,
        examples=_examples,
        demonstration=_solution,
        solution=_solution,
        tokenizer=make_tokenizer(),
        notes=sandbox.notes(config.sandbox),
    )
