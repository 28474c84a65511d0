"""What the parts of a run must have in common, where it depends on what a teacher is shown."""

import dataclasses

import pytest

from pgpo_jax import tasks
from pgpo_jax.errors import InputError
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.run import checks
from pgpo_jax.sampler import SamplingConfig

ONE = SamplingConfig(num_samples=1)
TASK = tasks.load(tasks.TaskConfig(name="addition", train_questions=4))


@pytest.mark.parametrize("source", ["solution", "both"])
def test_a_single_response_has_a_given_solution_to_learn_from(source):
    assert checks.check_siblings(ONE, RepromptConfig(source=source, use_feedback="never")) == ()
    with pytest.raises(
        InputError, match=r"sampling\.num_samples: got 1; a response has no sibling"
    ):
        checks.check_siblings(ONE, RepromptConfig(use_feedback="never"))


def test_questions_without_a_solution_are_counted():
    task = dataclasses.replace(TASK, train=TASK.train[:4])
    assert checks.check_solutions(task, RepromptConfig(source="solution")) == ()
    first = task.train[0].key
    some = dataclasses.replace(
        task, solution=lambda question: None if question.key == first else "7"
    )
    assert checks.check_solutions(some, RepromptConfig()) == ()
    (note,) = checks.check_solutions(some, RepromptConfig(source="both"))
    assert note == (
        f"reprompt.source = both: 1 of 4 training questions have no solution ({first!r}, for one), "
        "so their teacher is shown a sibling's success only"
    )
