"""Scores of held-out answers: means, majority, and an interval over questions."""

import numpy as np
import pytest

from pgpo_jax.data import DataConfig
from pgpo_jax.evaluation import Answered, question_rewards, scores, verify, within_training
from pgpo_jax.sampler import Policy, SamplingConfig
from pgpo_jax.tasks import Outcome, Question, Task


def question(key):
    return Question(({"role": "user", "content": key},), "A", key)


def answered(rewards, texts=None, well_formed=True):
    texts = texts or [[f"text {i}{j}" for j in range(len(row))] for i, row in enumerate(rewards)]
    outcomes = [[Outcome(float(r), well_formed=well_formed) for r in row] for row in rewards]
    questions = [question(str(i)) for i in range(len(rewards))]
    return Answered(questions, texts, outcomes, np.full((len(rewards), len(rewards[0])), 3))


def test_avg_and_pass_at_k_are_means_over_questions():
    values = scores(answered([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), 3)
    assert values["avg@4"] == pytest.approx(0.5)
    assert values["pass@4"] == pytest.approx(2 / 3)
    assert values["format"] == 1
    assert values["response_length"] == 3


def test_the_rewards_of_the_questions_keep_their_order():
    rewards = question_rewards(answered([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), 3)
    assert rewards == [0.5, 0.0, 1.0]


def test_the_interval_is_clustered_by_question():
    # Sixteen samples of two questions are two observations, not thirty-two.
    values = scores(answered([[1] * 16, [0] * 16]), 2)
    assert (values["avg@16/low"], values["avg@16/high"]) == (0, 1)
    half = scores(answered([[1, 0] * 8, [1, 0] * 8]), 2)
    assert half["avg@16/low"] == half["avg@16/high"] == 0.5


def test_majority_counts_answers_not_texts():
    texts = [["I think <answer>A</answer>", "So <answer>A</answer>", "<answer>B</answer>"]]
    assert scores(answered([[1, 1, 0]], texts), 1)["maj@3"] == 1
    assert scores(answered([[0, 0, 1]], texts), 1)["maj@3"] == 0


def test_one_call_of_the_verifier_gets_every_response_with_its_question():
    seen = []

    def check(questions, responses):
        seen.append([(q.key, r) for q, r in zip(questions, responses, strict=True)])
        return [Outcome(float(r == "b")) for r in responses]

    task = Task("letters", [], [], check)
    outcomes = verify(task, [question("x"), question("y")], [["a", "b"], ["b", "c"]])
    assert seen == [[("x", "a"), ("x", "b"), ("y", "b"), ("y", "c")]]
    assert [[o.reward for o in group] for group in outcomes] == [[0, 1], [1, 0]]


@pytest.mark.parametrize("slots, expected", [(None, 256), (40, 40)])
def test_no_more_is_decoded_at_a_time_than_in_a_step_of_training(slots, expected):
    sampling = SamplingConfig(num_samples=8, slots=slots)
    policy = Policy(None, None, None, sampling, DataConfig(questions_per_step=32))
    assert within_training(policy).sampling.slots == expected
