"""Estimators: their definitions, bounds and reduction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgpo_jax import distributions, information

FROM_LOGITS = ["entropy_gap", "conditional_kl", "jensen_shannon"]


def logits(seed, shape=(2, 3, 7), scale=3.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def softmax(x):
    x = np.asarray(x, np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 20))
def test_estimators_follow_their_definitions(seed, scale):
    student, teacher = logits(seed, scale=scale), logits(seed + 1, scale=scale)
    s, q = softmax(student), softmax(teacher)
    m = (s + q) / 2

    def kl(p, r):
        return np.sum(p * np.log(np.maximum(p, 1e-300) / np.maximum(r, 1e-300)), -1)

    def entropy(p):
        return -np.sum(p * np.log(np.maximum(p, 1e-300)), -1)

    expected = {
        "entropy_gap": entropy(s) - entropy(q),
        "conditional_kl": kl(q, s),
        "jensen_shannon": (kl(s, m) + kl(q, m)) / 2,
    }
    for name, value in expected.items():
        ours = getattr(information, name)(student, teacher)
        np.testing.assert_allclose(ours, value, rtol=1e-4, atol=1e-5)
    assert np.all(information.conditional_kl(student, teacher) >= -1e-5)
    assert np.all(information.jensen_shannon(student, teacher) <= np.log(2) + 1e-5)


def test_pointwise_reads_the_sampled_tokens_and_its_expectation_is_minus_the_reverse_kl():
    student, teacher = logits(0), logits(1)
    tokens = jnp.array([[0, 1, 2], [3, 4, 6]])
    gap = np.log(softmax(teacher)) - np.log(softmax(student))
    expected = np.take_along_axis(gap, np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(information.pointwise(student, teacher, tokens), expected, rtol=1e-4)
    every = [information.pointwise(student, teacher, jnp.full((2, 3), v)) for v in range(7)]
    mean = np.sum(softmax(student) * np.stack(every, -1), -1)
    log_s, log_q = distributions.log_probs(student), distributions.log_probs(teacher)
    np.testing.assert_allclose(mean, -distributions.kl(log_s, log_q), rtol=1e-4)
    assert np.all(mean <= 0)


@pytest.mark.parametrize("name", information.ESTIMATORS)
def test_identical_distributions_carry_no_information(name):
    same = logits(3)
    np.testing.assert_allclose(
        information.terms(name, same, same, jnp.zeros((2, 3), jnp.int32)), 0, atol=1e-6
    )


@pytest.mark.parametrize("padding", [-jnp.inf, distributions.NEVER, -1e9])
@pytest.mark.parametrize("name", FROM_LOGITS)
def test_padded_vocabulary_rows_do_not_matter(name, padding):
    student, teacher = logits(4), logits(5)
    tail = jnp.full((2, 3, 2), padding)
    wide = [jnp.concatenate([x, tail], -1) for x in (student, teacher)]
    estimate = getattr(information, name)
    np.testing.assert_allclose(estimate(*wide), estimate(student, teacher), rtol=1e-6)


def test_mask_padding_hides_whatever_stands_in_padded_rows():
    student = logits(6)
    wide = jnp.concatenate([student, jnp.full((2, 3, 2), 50.0)], -1)
    masked = distributions.log_probs(distributions.mask_padding(wide, 7))
    np.testing.assert_allclose(masked[..., :7], distributions.log_probs(student), rtol=1e-6)
    assert np.all(np.exp(masked[..., 7:]) == 0)


@pytest.mark.parametrize("name", information.ESTIMATORS)
def test_no_gradient_flows_through_the_information(name):
    def total(student, teacher):
        return jnp.sum(information.terms(name, student, teacher, jnp.zeros((2, 3), jnp.int32)))

    for gradient in jax.grad(total, argnums=(0, 1))(logits(7), logits(8)):
        assert np.all(gradient == 0)


def test_estimates_are_float32_for_bfloat16_logits():
    student = logits(9).astype(jnp.bfloat16)
    assert information.entropy_gap(student, student).dtype == jnp.float32


def test_reduce_is_the_mean_over_tokens_then_over_responses():
    terms = jnp.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [7.0, 7.0, 7.0]])
    mask = jnp.array([[True, True, False], [True, False, False], [True, True, True]])
    counts = jnp.array([True, True, False])
    assert information.reduce(terms, mask, counts) == pytest.approx((1.5 + 4.0) / 2)


def test_reduce_is_zero_when_no_response_counts_and_ignores_nan_outside_the_masks():
    terms = jnp.array([[1.0, jnp.nan], [jnp.nan, jnp.nan]])
    mask = jnp.array([[True, False], [True, True]])
    assert information.reduce(terms, mask, jnp.array([False, False])) == 0
    assert information.reduce(terms, mask, jnp.array([True, False])) == 1
    empty = jnp.zeros((2, 2), bool)
    assert information.reduce(terms, empty, jnp.array([True, True])) == 0
