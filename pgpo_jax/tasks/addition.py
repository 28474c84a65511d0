"""Addition by a tutor who forgets to carry: the built-in task.

Two 5-digit numbers, digits least significant first, as in `12345+67890=`; the response is the six
digits of the sum in the same order and the end token. The tutor's worked examples drop each carry
with probability 1/2, so that a perfect imitator of plain questions is right 25.8 % of the time and
no lower temperature sharpens its way out, while the examples that show a demonstration carry the
true sum: a model that can use a demonstration, and has much to learn from it.

Two settings (`task.options`) make questions that are hard for one attempt and an environment that
says what is wrong with it: a tutor who forgets more carries, and feedback on one wrong digit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgpo_jax import fields
from pgpo_jax.errors import InputError
from pgpo_jax.tasks.answers import Outcome
from pgpo_jax.tasks.procedural import Questions, word_tokenizer
from pgpo_jax.tasks.task import Example, Question, Task, TaskConfig

DIGITS = 5
COUNT = 10**DIGITS  # values of one addend; COUNT * COUNT questions
TEMPLATES = {
    "reprompt": "{prompt}{solution}{feedback}",
    "solution": "#{demonstration}",
    "feedback": "#{feedback}",
}
"""A vocabulary of 16 has no words: the demonstration follows the question after a `#`."""

VOCABULARY = ("<pad>", "<end>", "<unk>", *"0123456789", "+", "=", "#")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}<end>"
    "{%- elif not loop.last or add_generation_prompt -%}={%- endif -%}{%- endfor -%}"
)


class Settings(NamedTuple):
    """What `task.options` may change."""

    forgets: float = 0.5
    """Probability that the tutor forgets a carry."""
    feedback: bool = False
    """Whether a wrong response is told one of its wrong digits, and worked examples show how that
    is used."""


PLAIN = Settings()


def digits(value: int, count: int) -> str:
    """`count` decimal digits of `value`, least significant first."""
    return f"{value:0{count}d}"[::-1]


def prompt(first: int, second: int) -> str:
    """The question's text, without the `=` that the chat template adds."""
    return f"{digits(first, DIGITS)}+{digits(second, DIGITS)}"


def true_sum(first: int, second: int) -> str:
    """The right response: six digits, least significant first."""
    return digits(first + second, DIGITS + 1)


def tutor_sum(first: int, second: int, rng: np.random.Generator, forgets: float = 0.5) -> str:
    """The tutor's response: at every carry, a coin decides whether it is forgotten."""
    forgotten = rng.random(DIGITS) < forgets
    carry, out = 0, []
    for position in range(DIGITS):
        carry, digit = divmod(first % 10 + second % 10 + carry, 10)
        carry = 0 if forgotten[position] else carry
        first, second = first // 10, second // 10
        out.append(str(digit))
    return "".join(out) + str(carry)


def well_formed(response: str) -> bool:
    """Whether a response is any six digits, right or wrong."""
    return len(response) == DIGITS + 1 and response.isascii() and response.isdigit()


def feedback(response: str, answer: str) -> str:
    """What is said of a wrong response: its first wrong digit, at its place, as `+6++++`; nothing
    of one that is no six digits. Not which digit is right, and not whether others are wrong."""
    if response == answer or not well_formed(response):
        return ""
    place = next(i for i, digit in enumerate(response) if digit != answer[i])
    return "".join(digit if i == place else "+" for i, digit in enumerate(response))


def corrected_sum(
    first: int, second: int, told: str, rng: np.random.Generator, forgets: float
) -> str:
    """What the tutor responds where feedback tells a wrong digit: without it, else as ever."""
    place = next((i for i, digit in enumerate(told) if digit != "+"), None)
    while True:
        response = tutor_sum(first, second, rng, forgets)
        if place is None or response[place] != told[place]:
            return response


def operands(index: int, seed: int) -> tuple[int, int]:
    """The `index`-th of 10^10 questions in the order that `seed` gives; no question comes twice.

    Four Feistel rounds on the pair of addends: each round adds to one half a hash of the other,
    which can be undone, so distinct indices give distinct questions. Training and held-out
    questions are ranges of indices and therefore disjoint, and nothing is stored.
    """
    left, right = divmod(index, COUNT)
    for round_ in range(4):
        left, right = right, (left + _hash(right, seed, round_)) % COUNT
    return left, right


def _hash(value: int, seed: int, round_: int) -> int:
    # splitmix64 (Steele, Lea, Flood, OOPSLA 2014): cheap, and the same on every machine.
    word = 2**64 - 1
    mixed = (value + (seed * 4 + round_ + 1) * 0x9E3779B97F4A7C15) & word
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & word
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & word
    return mixed ^ (mixed >> 31)


def worked_examples(
    rng: np.random.Generator, count: int, settings: Settings = PLAIN
) -> Iterator[tuple[int, int, str | None, str, str]]:
    """Warm-start rows as (first, second, demonstration or None, feedback, response).

    Half the rows are plain with the tutor's response, the others show a demonstration and carry
    the true sum. In every other row of each kind the addends have a random length of 1 to 5 digits
    (zero padded): without this curriculum some seeds stay on a plateau. With feedback, every other
    row with a demonstration shows instead what is said of a response of the tutor's, and responds
    as the tutor who knows that.
    """
    for row in range(count):
        length = int(rng.integers(1, DIGITS + 1)) if row // 2 % 2 else DIGITS
        first, second = (int(value) for value in rng.integers(0, 10**length, 2))
        answer = true_sum(first, second)
        if row % 2 == 0:
            yield first, second, None, "", tutor_sum(first, second, rng, settings.forgets)
        elif settings.feedback and row // 4 % 2:
            told = feedback(tutor_sum(first, second, rng, settings.forgets), answer)
            response = corrected_sum(first, second, told, rng, settings.forgets)
            yield first, second, None, told, response
        else:
            yield first, second, answer, "", answer


def make_tokenizer() -> Any:
    """The task's character tokenizer as a Hugging Face fast tokenizer (16 tokens)."""
    return word_tokenizer(VOCABULARY, ".", CHAT_TEMPLATE)


def _numbered(index: int, seed: int) -> Question:
    return _question(*operands(index, seed))


def _question(first: int, second: int) -> Question:
    text, answer = prompt(first, second), true_sum(first, second)
    return Question(
        messages=({"role": "user", "content": text},),
        answer=answer,
        key=text,
        columns={"prompt": text, "answer": answer},
    )


def _verify(
    settings: Settings, questions: Sequence[Question], responses: Sequence[str]
) -> list[Outcome]:
    return [
        Outcome(
            float(response == question.answer),
            feedback(response, question.answer) if settings.feedback else "",
            well_formed(response),
        )
        for question, response in zip(questions, responses, strict=True)
    ]


def _examples(settings: Settings, rng: np.random.Generator, count: int) -> list[Example]:
    return [
        Example(_question(first, second), demonstration, response, told)
        for first, second, demonstration, told, response in worked_examples(rng, count, settings)
    ]


def _settings(options: Mapping[str, Any]) -> Settings:
    """The settings that `task.options` states.

    Raises:
      InputError: An unknown one, or a value that it cannot have.
    """
    if unknown := [name for name in options if name not in Settings._fields]:
        known = ", ".join(Settings._fields)
        raise InputError(f"task.options: got {unknown[0]}; addition has {known}")
    settings = Settings(**options)
    number = type(settings.forgets) in (int, float) and math.isfinite(settings.forgets)
    if not number or not 0 <= settings.forgets < 1:
        got = fields.show(settings.forgets)
        raise InputError(f"task.options: got forgets {got}; must be at least 0 and below 1")
    if type(settings.feedback) is not bool:
        got = fields.show(settings.feedback)
        raise InputError(f"task.options: got feedback {got}; must be true or false")
    return settings


def load(config: TaskConfig) -> Task:
    """Addition: 10^10 questions, so all of them are fresh."""
    train = 1_000_000 if config.train_questions is None else config.train_questions
    test = 256 if config.test_questions is None else config.test_questions
    if train + test > COUNT**2:
        raise InputError(
            f"task.train_questions: got {train} and {test} held out; addition has "
            f"{COUNT**2} questions"
        )
    settings = _settings(config.options)
    return Task(
        name="addition",
        train=Questions("addition", _numbered, range(test, test + train), config.seed),
        test=Questions("addition", _numbered, range(test), config.seed),
        verify=functools.partial(_verify, settings),
        templates=TEMPLATES,
        examples=functools.partial(_examples, settings),
        demonstration=lambda question: question.answer,
        solution=lambda question: question.answer,
        tokenizer=make_tokenizer(),
    )
