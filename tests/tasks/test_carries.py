"""Addition without a success at first: what is wrong is marked, and marks are enough to learn."""

import numpy as np
import pytest

from pgpo_jax import data, reprompt
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.sampler import Policy, SamplingConfig
from pgpo_jax.tasks import carries

TASK = carries.task(train_questions=40, test_questions=8)


def tutored(question):
    """The response of a student who learned from the tutor."""
    first, second = (int(text[::-1]) for text in question.key.split("+"))
    return carries.tutor_sum(first, second)


def repaired(attempt, told):
    return "".join(str((int(a) + int(b)) % 10) for a, b in zip(attempt, told, strict=True))


def test_the_tutor_is_always_wrong_and_its_marks_say_where():
    questions = [*TASK.train, *TASK.test]
    assert len({question.key for question in questions}) == 48
    attempts = [tutored(question) for question in questions]
    outcomes = TASK.verify(questions, attempts)
    assert not any(outcome.reward for outcome in outcomes)
    for question, attempt, outcome in zip(questions, attempts, outcomes, strict=True):
        assert repaired(attempt, outcome.feedback) == question.answer
    (right,) = TASK.verify(TASK.test[:1], [TASK.test[0].answer])
    assert (right.reward, right.feedback) == (1, "")
    for text in ("", "12", "12a4", "١٢٣٤"):
        (other,) = TASK.verify(TASK.test[:1], [text])
        assert (other.reward, other.feedback, other.well_formed) == (0, "", False)


def test_the_examples_teach_the_mistake_and_the_use_of_marks():
    assert TASK.examples is not None
    examples = TASK.examples(np.random.default_rng(0), 60)
    plain = [e for e in examples if e.demonstration is None and not e.feedback]
    marked = [e for e in examples if e.feedback]
    assert (len(plain), len(marked) > 10) == (20, True)
    assert all(e.response == tutored(e.question) != e.question.answer for e in plain)
    assert all(repaired(e.attempt, e.feedback) == e.response == e.question.answer for e in marked)


@pytest.mark.parametrize(("mode", "context"), [("without_demonstration", True), ("never", False)])
def test_only_feedback_gives_the_teacher_a_context(mode, context):
    questions = TASK.train[:3]
    texts = [[tutored(question)] * 2 for question in questions]
    verified = [TASK.verify([q] * 2, group) for q, group in zip(questions, texts, strict=True)]
    config = RepromptConfig(use_feedback=mode, show_attempt=True)
    config = reprompt.with_templates(config, TASK.templates)
    policy = Policy(None, TASK.tokenizer, None, SamplingConfig(), data.DataConfig())
    rows = data.encode(TASK.tokenizer, [q.messages for q in questions], max_length=8)
    prompts, mask = data.left_pad(rows, 8)
    zeros = np.zeros((3, 2, 1), np.int32)
    rollouts = data.Rollouts(prompts, mask, zeros, zeros == 0, zeros.astype(np.float32), texts)
    rng = np.random.default_rng(0)
    shown = reprompt.reprompt(policy, questions, rollouts, verified, rng, config)
    assert set(shown.has_context.tolist()) == {context}
    question, told = questions[0], verified[0][0].feedback
    addition = f"+{texts[0][0]}##{told}" if context else ""
    assert shown.texts[0] == f"{question.key}{addition}="
