"""Addition by a tutor who forgets to carry: the built-in task.

Two 5-digit numbers, digits least significant first, as in `12345+67890=`; the response is the six
digits of the sum in the same order and the end token. The tutor's worked examples drop each carry
with probability 1/2, so that a perfect imitator of plain questions is right 25.8 % of the time and
no lower temperature sharpens its way out, while the examples that show a demonstration carry the
true sum: a model that can use a demonstration, and has much to learn from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pgpo_jax.errors import InputError
from pgpo_jax.tasks.answers import Outcome
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


def digits(value: int, count: int) -> str:
    """`count` decimal digits of `value`, least significant first."""
    return f"{value:0{count}d}"[::-1]


def prompt(first: int, second: int) -> str:
    """The question's text, without the `=` that the chat template adds."""
    return f"{digits(first, DIGITS)}+{digits(second, DIGITS)}"


def true_sum(first: int, second: int) -> str:
    """The right response: six digits, least significant first."""
    return digits(first + second, DIGITS + 1)


def tutor_sum(first: int, second: int, rng: np.random.Generator) -> str:
    """The tutor's response: at every carry, a coin decides whether it is forgotten."""
    forgotten = rng.random(DIGITS) < 0.5
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
    rng: np.random.Generator, count: int
) -> Iterator[tuple[int, int, str | None, str]]:
    """Warm-start rows as (first, second, demonstration or None, response).

    Half the rows are plain with the tutor's response, the others show a demonstration and carry
    the true sum. In every other row of each kind the addends have a random length of 1 to 5 digits
    (zero padded): without this curriculum some seeds stay on a plateau.
    """
    for row in range(count):
        length = int(rng.integers(1, DIGITS + 1)) if row // 2 % 2 else DIGITS
        first, second = (int(value) for value in rng.integers(0, 10**length, 2))
        if row % 2:
            answer = true_sum(first, second)
            yield first, second, answer, answer
        else:
            yield first, second, None, tutor_sum(first, second, rng)


def make_tokenizer() -> Any:
    """The task's character tokenizer as a Hugging Face fast tokenizer (16 tokens)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


class Questions(Sequence[Question]):
    """Questions `start` to `start + count` in the seed's order, made when they are asked for."""

    def __init__(self, start: int, count: int, seed: int):
        self._indices, self._seed = range(start, start + count), seed

    def __repr__(self) -> str:
        """The parameters, which are all that its digest needs."""
        return f"addition {self._indices.start}:{self._indices.stop} seed {self._seed}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return _question(*operands(self._indices[index], self._seed))


def _question(first: int, second: int) -> Question:
    text, answer = prompt(first, second), true_sum(first, second)
    return Question(
        messages=({"role": "user", "content": text},),
        answer=answer,
        key=text,
        columns={"prompt": text, "answer": answer},
    )


def _verify(questions: Sequence[Question], responses: Sequence[str]) -> list[Outcome]:
    return [
        Outcome(float(response == question.answer), well_formed=well_formed(response))
        for question, response in zip(questions, responses, strict=True)
    ]


def _examples(rng: np.random.Generator, count: int) -> list[Example]:
    return [
        Example(_question(first, second), demonstration, response)
        for first, second, demonstration, response in worked_examples(rng, count)
    ]


def load(config: TaskConfig) -> Task:
    """Addition: 10^10 questions, so all of them are fresh."""
    train = 1_000_000 if config.train_questions is None else config.train_questions
    test = 256 if config.test_questions is None else config.test_questions
    if train + test > COUNT**2:
        raise InputError(
            f"task.train_questions: got {train} and {test} held out; addition has "
            f"{COUNT**2} questions"
        )
    return Task(
        name="addition",
        train=Questions(test, train, config.seed),
        test=Questions(0, test, config.seed),
        verify=_verify,
        templates=TEMPLATES,
        examples=_examples,
        demonstration=lambda question: question.answer,
        solution=lambda question: question.answer,
        tokenizer=make_tokenizer(),
    )
