"""Evaluation: avg@k, pass@k and maj@k on held-out questions."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from pgpo_jax import sharding
from pgpo_jax.errors import InputError, require
from pgpo_jax.sampler import Conversation, Policy, rollout
from pgpo_jax.tasks import Outcome, Question, Task, TaskConfig, given_answer

LARGEST = 1e30
"""A reward's size: float32 holds it and sums of many of them."""
Tell = Callable[[int, int], None]
"""Hears how many of how many questions of all hosts are answered, before the first and after each
batch, on all hosts alike; what it raises ends the evaluation."""


@dataclass(frozen=True)
class AlsoConfig(TaskConfig):
    """A further evaluation set: a task, of which only the held-out questions are asked."""

    label: str = ""
    """What its metrics are called: `eval/<label>/avg@16`."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How often, and with how many samples, held-out questions are answered."""

    every: int = 5
    """Updates between evaluations, besides those before the first and after the last; 0 = never."""
    num_samples: int = 16
    """k: responses per question."""
    temperature: float = 0.6
    """Sampling temperature."""
    top_p: float = 0.95
    """Nucleus of the sampling distribution."""
    questions: int | None = None
    """Use only the first so many held-out questions of each set, over-long ones not counted; null
    uses all."""
    also: tuple[AlsoConfig, ...] = ()
    """Further sets, out of distribution say, asked whenever the first is and alike: sections with
    the fields of `task` and a `label`, as `[{label: physics, name: sciknoweval, domain: physics}]`.
    Their training questions are not used; the best student is chosen by the first set."""
    questions_per_batch: int = 64
    """Questions answered at a time."""
    preflight_questions: int = 32
    """Held-out questions asked with and without a demonstration before training; 0 = none."""
    untrained: bool = False
    """The command `evaluate` asks the model as it comes, whatever checkpoints there are; without it
    a run that has none is an error."""
    teacher_questions: int = 0
    """Held-out questions that the teacher answers at every evaluation with a right answer in its
    prompt (`eval/teacher_with_demonstration`): whether it can still use one; 0 = none."""

    def __post_init__(self):
        require(
            "evaluation",
            self,
            every=(self.every >= 0, "at least 0"),
            num_samples=(self.num_samples >= 1, "at least 1"),
            temperature=(self.temperature >= 0, "at least 0"),
            top_p=(0 < self.top_p <= 1, "above 0 and at most 1"),
            questions=(self.questions is None or self.questions >= 1, "at least 1, or null"),
            questions_per_batch=(self.questions_per_batch >= 1, "at least 1"),
            preflight_questions=(self.preflight_questions >= 0, "at least 0"),
            teacher_questions=(self.teacher_questions >= 0, "at least 0"),
        )
        for index, section in enumerate(self.also):
            name, label = f"evaluation.also[{index}].label", section.label
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", label):
                raise InputError(
                    f"{name}: got {label!r}; must be a letter, then letters, digits, _ and -"
                )
            if label in [other.label for other in self.also[:index]]:
                raise InputError(f"{name}: got {label!r} twice; must be a name of its own")


class Answered(NamedTuple):
    """Questions with their responses and outcomes, `[question][sample]`."""

    questions: list[Question]
    texts: list[list[str]]
    outcomes: list[list[Outcome]]
    lengths: np.ndarray
    """Response tokens, `[question, sample]`."""


def evaluate(
    policy: Policy,
    params: Any,
    task: Task,
    key: jax.Array,
    config: EvaluationConfig,
    threshold: float = 0.5,
    tell: Tell = lambda done, total: None,
) -> tuple[dict[str, float], Answered]:
    """Answers the held-out questions and scores the answers.

    Every host answers its share; the metrics are the same on all, the answers are the host's own.

    Args:
      policy: As in training; the length limit and the end tokens of its sampling are taken.
      params: The parameters.
      task: Its `test` questions are asked.
      key: Random key; the same key gives the same answers.
      config: Number of samples, temperature, how many questions.
      threshold: Least reward of a success (`reprompt.threshold`).
      tell: Hears how far it is.

    Returns:
      The metrics of `scores`, and this host's answers.

    Raises:
      InputError: The task has no held-out question.
    """
    policy = within_training(policy)
    sampling = dataclasses.replace(
        policy.sampling,
        num_samples=config.num_samples,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=None,
    )
    questions = held_out(task, config)
    pace = Pace(config.questions_per_batch, tell)
    policy = policy._replace(sampling=sampling)
    answered = answer(policy, params, task, questions, key, pace=pace)
    return scores(answered, len(questions), threshold), answered


def within_training(policy: Policy) -> Policy:
    """The policy that decodes no more responses at a time than one step of training does.

    So whatever is asked, and with however many samples, takes no more memory than an update's
    responses.
    """
    sampling = policy.sampling
    at_once = policy.prompts.questions_per_step * sampling.num_samples
    slots = sampling.slots or at_once
    return policy._replace(sampling=dataclasses.replace(sampling, slots=slots))


def held_out(task: Task, config: EvaluationConfig) -> list[Question]:
    """The questions that an evaluation asks.

    Raises:
      InputError: There are none.
    """
    questions = list(task.test[: config.questions])
    if not questions:
        raise InputError(
            f"evaluation.every: got {config.every}, but {task.name} has no held-out question; set "
            "it to 0, or give some (task.test_path, task.test_fraction, task.test_questions)"
        )
    return questions


class Pace(NamedTuple):
    """How many questions are answered at a time, and who hears of it."""

    batch: int
    tell: Tell


AT_ONCE = Pace(64, lambda done, total: None)


def answer(
    policy: Policy,
    params: Any,
    task: Task,
    questions: Sequence[Question],
    key: jax.Array,
    show: Callable[[Question], Conversation] = lambda question: question.messages,
    pace: Pace = AT_ONCE,
) -> Answered:
    """This host's share of the questions, answered and verified.

    Args:
      policy: How responses are drawn.
      params: The parameters.
      task: Verifies the responses.
      questions: Those of all hosts.
      key: Random key; consumed.
      show: What the model is shown of a question; its own conversation by default.
      pace: Questions answered at a time, and who hears of it.
    """
    batch, total = pace.batch, len(questions)
    mine = list(questions[sharding.host_rows(total)])
    (rounds,) = sharding.agree_max([-(-len(mine) // batch)])
    texts, lengths = [], []
    pace.tell(0, total)
    for index in range(rounds):
        now = mine[index * batch : (index + 1) * batch]
        rollouts = rollout(
            policy,
            params,
            [show(question) for question in now],
            jax.random.fold_in(key, index),
            names=[question.key for question in now],
            rows=min(batch, len(mine)),  # the last batch has the shape of those before it
        )
        texts += rollouts.texts
        lengths.append(rollouts.response_mask.sum(-1))
        pace.tell(min((index + 1) * batch * jax.process_count(), total), total)
    outcomes = verify(task, mine, texts)
    none = np.zeros((0, policy.sampling.num_samples), int)
    return Answered(mine, texts, outcomes, np.concatenate([none, *lengths]))


def verify(
    task: Task, questions: Sequence[Question], texts: Sequence[Sequence[str]]
) -> list[list[Outcome]]:
    """Outcomes `[question][sample]` of responses `[question][sample]`.

    Raises:
      InputError: A task of the user's gives too few, or a reward that is no finite float32.
    """
    repeated = [question for question, group in zip(questions, texts, strict=True) for _ in group]
    found = task.verify(repeated, [text for group in texts for text in group])
    if len(found) != len(repeated):
        raise InputError(
            f"task: {task.name} gave {len(found)} outcomes for {len(repeated)} responses; must be "
            "one each"
        )
    for question, outcome in zip(repeated, found, strict=True):
        if not abs(outcome.reward) <= LARGEST:  # true for nan
            raise InputError(
                f"task: {task.name} gave the reward {outcome.reward} for a response to "
                f"{question.key!r}; must be a finite number, {LARGEST:g} at most"
            )
    outcomes = iter(found)
    return [[next(outcomes) for _ in group] for group in texts]


def scores(answered: Answered, questions: int, threshold: float = 0.5) -> dict[str, float]:
    """avg@k with a 95 % interval clustered by question, pass@k, maj@k, format, response length.

    avg@k is the mean over questions of a question's mean reward; the samples of one question are
    not independent, so the interval comes from the spread between questions. pass@k is the share of
    questions with a success among their answers, maj@k that of questions whose most frequent answer
    is one. Where rewards leave [0, 1], so may the interval, and `reward_min` and `reward_max` say
    how far.

    Args:
      answered: This host's answers.
      questions: Number of questions over all hosts.
      threshold: Least reward of a success.
    """
    rewards = [[outcome.reward for outcome in group] for group in answered.outcomes]
    per_question = np.array(
        [
            (
                np.mean(group),
                np.max(group) >= threshold,
                _majority(group, [given_answer(text) for text in texts]) >= threshold,
                np.mean([outcome.well_formed for outcome in outcomes]),
                np.mean(lengths),
                np.min(group),
                np.max(group),
            )
            for group, texts, outcomes, lengths in zip(
                rewards, answered.texts, answered.outcomes, answered.lengths, strict=True
            )
        ],
        np.float32,
    ).reshape(-1, 7)
    per_question = sharding.gather_rows(per_question, questions)
    average, best, majority, well_formed, length, *_ = per_question.mean(axis=0)
    within = per_question[:, 5].min() >= 0 and per_question[:, 6].max() <= 1
    least, most = (0.0, 1.0) if within else (-np.inf, np.inf)
    error = 1.96 * per_question[:, 0].std(ddof=1) / np.sqrt(questions) if questions > 1 else 0.0
    k = answered.lengths.shape[1]
    values = {
        f"avg@{k}": average,
        f"avg@{k}/low": max(average - error, least),
        f"avg@{k}/high": min(average + error, most),
        f"pass@{k}": best,
        f"maj@{k}": majority,
        "format": well_formed,
        "response_length": length,
    }
    if not within:  # who reads the others is told that they are no shares
        values |= {"reward_min": per_question[:, 5].min(), "reward_max": per_question[:, 6].max()}
    return {name: float(value) for name, value in values.items()}


def question_rewards(answered: Answered, questions: int) -> list[float]:
    """The mean reward of each of `questions` over all hosts, in the order they were asked in."""
    means = np.array(
        [np.mean([outcome.reward for outcome in group]) for group in answered.outcomes], np.float32
    )
    return sharding.gather_rows(means.reshape(-1, 1), questions)[:, 0].tolist()


def _majority(rewards: Sequence[float], answers: Sequence[str]) -> float:
    """The reward of the most frequent answer."""
    winner, _ = Counter(answers).most_common(1)[0]
    return rewards[answers.index(winner)]
