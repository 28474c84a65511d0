"""Reasoning Gym: procedural questions with their own scores as rewards (arXiv 2505.24760)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import workers
from pgpo_jax.tasks.answers import NO_TAGS, Outcome, tagged_answer
from pgpo_jax.tasks.task import Question, Task, TaskConfig, worked_examples

TRAIN, TEST = 10_000, 256
"""Questions of a run that states no number."""
LONGEST = 20_000
"""Characters; a longer answer is not scored."""
START = 30.0
"""Seconds for one question to be made."""
TAGS = "Give your final answer between <answer> and </answer>."


def load(config: TaskConfig) -> Task:
    """Questions of one data set of Reasoning Gym (Stojanovski et al., arXiv 2505.24760).

    The first are held out. A training question that is one of these, word for word, is left out:
    some data sets have few questions. The reward is the score that the data set gives to the text
    between the last answer tags, or to the whole response; many give a part of 1 to a wrong answer,
    so set `reprompt.threshold` to what a demonstration must reach.

    Raises:
      InputError: The package is not installed, it has no such data set, or that has no such option.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError(
            "task.name: got 'reasoning_gym', which needs that package: "
            "pip install 'pgpo-jax[reasoning-gym]'"
        )
    wanted = TEST if config.test_questions is None else config.test_questions
    count = TRAIN if config.train_questions is None else config.train_questions
    pool = _pool(config, wanted + count)
    made = _make(config, pool, wanted + count)
    test = made[:wanted]
    held_out = {question.messages[-1]["content"] for question, _ in test}
    train = [row for row in made[wanted:] if row[0].messages[-1]["content"] not in held_out]
    if not train:
        raise InputError(
            f"task.dataset: got {config.dataset!r}; its first {wanted + count} questions are only "
            f"{len(held_out)} different ones, all held out: choose fewer task.test_questions"
        )
    worked = all(score == 1 for _, score in made)
    questions = [question for question, _ in train]
    if config.reward is not None:
        pool.stop()  # it made the questions, another judges
    return Task(
        name=f"reasoning_gym/{config.dataset}",
        train=questions,
        test=[question for question, _ in test],
        verify=_Judge(config, pool),
        examples=worked_examples(questions, _answer) if worked else None,
        demonstration=_answer if worked else None,
        solution=_answer if worked else None,
        notes=tuple(_notes(config, len(made) - len(test) - len(train), worked)),
    )


def _pool(config: TaskConfig, size: int) -> workers.Pool:
    """The processes that make and score the questions of a data set.

    Reasoning Gym seeds question i with `seed + i`, so that nearby seeds share nearly all of their
    questions; a hash of the seed sets them apart.
    """
    seed = int.from_bytes(hashlib.sha256(str(config.seed).encode()).digest()[:4], "big") // 2
    arguments = (str(config.dataset), json.dumps(config.options), str(seed), str(size))
    return workers.Pool(workers.script("reasoning_gym_worker.py", *arguments))


def _make(config: TaskConfig, pool: workers.Pool, count: int) -> list[tuple[Question, float]]:
    """The first questions, each with the score of its own answer."""
    made = []
    for index in range(count):
        try:
            found = pool.ask([index, None], START)
        except ValueError as refused:
            raise InputError(str(refused)) from refused
        if found is None:
            raise InputError(
                f"task.dataset: got {config.dataset!r}; its question {index} could not be made "
                f"within {START:.0f} s and the worker's memory"
            )
        made.append(_question(config, index, *found))
    return made


def _question(
    config: TaskConfig, index: int, text: str, answer: Any, score: float
) -> tuple[Question, float]:
    system = [{"role": "system", "content": TAGS}] if config.require_tags else []
    messages = (*system, {"role": "user", "content": text.strip()})
    row = {"prompt": text.strip(), "answer": answer, "index": index}
    shown = answer if isinstance(answer, str) else json.dumps(answer)
    return Question(messages, shown, f"{config.dataset}/{index}", row), score


def _answer(question: Question) -> str:
    """A response that is right, in the form that is asked for."""
    asked = question.messages[0]["content"] == TAGS
    return f"<answer>{question.answer}</answer>" if asked else question.answer


def _notes(config: TaskConfig, left_out: int, worked: bool) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"{left_out} training questions of {config.dataset} were held out: left out")
    if not worked:
        notes.append(
            f"{config.dataset} does not give 1 to each of its own answers, so it has no worked "
            "examples: no warm start, no pre-flight"
        )
    return notes


class _Judge:
    """The data set's own scores, as a task's `verify`."""

    def __init__(self, config: TaskConfig, pool: workers.Pool) -> None:
        self._config, self._pool = config, pool

    def __call__(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Outcome]:
        if len(questions) != len(responses):
            raise ValueError(f"{len(questions)} questions and {len(responses)} responses")
        return workers.spread(self._judge, questions, responses, workers=self._config.workers)

    def _judge(self, question: Question, response: str) -> Outcome:
        given, tagged = tagged_answer(response)
        if self._config.require_tags and not tagged:
            return Outcome(0.0, NO_TAGS, well_formed=False)
        if len(given) > LONGEST:
            return Outcome(0.0, failed=True)
        score = self._pool.ask([question.columns["index"], given], self._config.time_limit)
        if score is None or not 0 <= score <= 1:
            return Outcome(0.0, failed=True)
        return Outcome(score)
