"""Supervised steps: what is left out of them, and that they go on as if nothing had happened."""

import itertools

import jax
import numpy as np
import pytest
from refusal import ARCHITECTURE

from pgpo_jax import hf, sharding
from pgpo_jax.data import DataConfig
from pgpo_jax.errors import InputError
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.sampler import Policy, SamplingConfig
from pgpo_jax.tasks import Example, Question, Task, addition
from pgpo_jax.warm_start import WarmStartConfig, begin, warm_start

CONFIG = WarmStartConfig(steps=4, examples_per_step=2, learning_rate=1e-2)
REPROMPT = RepromptConfig(max_length=12)


def task(*kinds):
    """Examples with the prompts of each step: one of 4 tokens or a long one of 16."""
    steps = iter(kinds)

    def examples(rng, count):
        texts = [text * (5 if long else 1) for text, long in zip("123", next(steps), strict=False)]
        asked = [Question(({"role": "user", "content": t * 3},), t[0], t) for t in texts]
        return [Example(question, None, question.answer) for question in asked]

    return Task("letters", [], [], lambda q, r: [], examples=examples)


@pytest.fixture(scope="module")
def model():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1))
    section = hf.ModelSection(architecture=ARCHITECTURE, dtype="float32")
    graphdef, params, *_ = hf.from_section(section, mesh, jax.random.key(0))
    return graphdef, mesh, jax.device_get(params)


def train(model, asked, *, config=CONFIG, over_long="drop", now=None):
    graphdef, mesh, params = model
    sampling = SamplingConfig(end_tokens=(1,), vocab_size=16)
    prompts = DataConfig(max_prompt_length=12, over_long=over_long)
    policy = Policy(graphdef, addition.make_tokenizer(), mesh, sampling, prompts)
    start = now or begin(config, jax.device_put(params, jax.NamedSharding(mesh, jax.P())))
    for done in warm_start(policy, start, asked, config, REPROMPT, 0):
        yield done, jax.device_get(done.state.student)


FIT, ONE, NONE = (False, False), (False, True), (True, True)


def test_an_example_that_is_too_long_is_left_out_as_if_it_were_not_there(model):
    *_, (now, student) = train(model, task(FIT, ONE, ONE, FIT))
    assert (now.steps, now.left_out, now.longest) == (4, 2, 16)
    *_, (_, alone) = train(model, task(FIT, (False,), (False,), FIT))
    # Other rows, summed in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), student, alone)


def test_a_step_without_an_example_changes_nothing(model):
    (_, before), (now, after) = itertools.islice(train(model, task(FIT, NONE)), 2)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert (now.steps, now.left_out) == (2, 2)


def test_examples_that_are_all_too_long_are_one_line(model):
    line = r"reprompt\.max_length: got 12; the prompts of all 2 worked examples so far are longer"
    with pytest.raises(InputError, match=line):
        next(train(model, task(NONE)))
    with pytest.raises(InputError, match=r"reprompt\.max_length: question .* has 16 tokens"):
        next(train(model, task(ONE), over_long="error"))


def test_a_task_without_worked_examples_is_refused(model):
    with pytest.raises(InputError, match=r"warm_start\.steps: got 4; task none has no worked exam"):
        next(train(model, Task("none", [], [], lambda q, r: [])))


def test_supervised_steps_go_on_bit_by_bit(model):
    *_, (_, whole) = train(model, task(FIT, FIT, FIT, FIT))
    for now, _ in train(model, task(FIT, FIT)):
        if now.steps == 2:
            break
    *_, (_, halves) = train(model, task(FIT, FIT), now=now)
    jax.tree.map(np.testing.assert_array_equal, whole, halves)
