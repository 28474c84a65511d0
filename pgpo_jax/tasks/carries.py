"""Addition by a tutor who drops the last carry, with feedback: no answer is right at first.

Two 3-digit numbers with a carry at the last of their digits, which stand least significant first. A
model that learned from this tutor, who writes 0 for it, fails every question, so no response has a
successful sibling, and without feedback nothing is ever learned. The feedback on a response marks
its wrong digits, as in `0001`, and does not say what is right; the tutor's other examples show how
to use such marks beside the attempt that they are of (`reprompt.show_attempt`), and how to use a
demonstration.

A task from outside, as yours may be: `task.name: pgpo_jax.tasks.carries:task`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pgpo_jax.tasks.addition import digits, make_tokenizer
from pgpo_jax.tasks.answers import Outcome
from pgpo_jax.tasks.task import Example, Question, Task

DIGITS = 3
TEMPLATES = {
    "reprompt": "{prompt}{solution}{feedback}",
    "solution": "#{demonstration}",
    "attempt": "+{attempt}",
    "feedback": "##{feedback}",
}


def task(seed: int = 0, train_questions: int = 4000, test_questions: int = 128) -> Task:
    """Questions of which none comes twice."""
    pairs = _pairs(np.random.default_rng(seed))
    found: dict[tuple[int, int], None] = {}
    while len(found) < train_questions + test_questions:
        found[next(pairs)] = None
    questions = [_question(*pair) for pair in found]
    return Task(
        name="carries",
        train=questions[test_questions:],
        test=questions[:test_questions],
        verify=_verify,
        templates=TEMPLATES,
        examples=_examples,
        demonstration=lambda question: question.answer,
        tokenizer=make_tokenizer(),
    )


def tutor_sum(first: int, second: int) -> str:
    """The sum but for its last carry."""
    return digits((first + second) % 10**DIGITS, DIGITS + 1)


def marks(response: str, answer: str) -> str:
    """`1` for every wrong digit, `0` for every right one."""
    return "".join(str(int(given != right)) for given, right in zip(response, answer, strict=True))


def _pairs(rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Addends with one carry, the last, without end."""
    while True:
        addends = rng.integers(0, 10, (2, DIGITS))
        if (addends.sum(axis=0) > 9).tolist() == [False] * (DIGITS - 1) + [True]:
            first, second = (addends @ 10 ** np.arange(DIGITS)).tolist()
            yield first, second


def _question(first: int, second: int) -> Question:
    text = f"{digits(first, DIGITS)}+{digits(second, DIGITS)}"
    answer = digits(first + second, DIGITS + 1)
    columns = {"prompt": text, "answer": answer}
    return Question(({"role": "user", "content": text},), answer, text, columns)


def _verify(questions: Sequence[Question], responses: Sequence[str]) -> list[Outcome]:
    return [_judge(*pair) for pair in zip(questions, responses, strict=True)]


def _judge(question: Question, response: str) -> Outcome:
    answer = question.answer
    if response == answer:
        return Outcome(1.0)
    if len(response) != len(answer) or not (response.isascii() and response.isdigit()):
        return Outcome(0.0, well_formed=False)
    return Outcome(0.0, marks(response, answer))


def _examples(rng: np.random.Generator, count: int) -> list[Example]:
    """By turns: the plain question with the tutor's sum, a demonstration with the right one, an
    attempt some of whose digits are one too low and its marks with the right one."""
    pairs, out = _pairs(rng), []
    for row in range(count):
        first, second = next(pairs)
        question = _question(first, second)
        lower = rng.random(DIGITS + 1) < 0.5
        places = zip(question.answer, lower, strict=True)
        attempt = "".join(str((int(digit) - low) % 10) for digit, low in places)
        told = marks(attempt, question.answer)
        if row % 3 == 0:
            out.append(Example(question, None, tutor_sum(first, second)))
        elif row % 3 == 1 or "1" not in told:
            out.append(Example(question, question.answer, question.answer))
        else:
            out.append(Example(question, None, question.answer, told, attempt))
    return out
