"""Logits at the end of what float32 holds, masked vocabularies, agreement: values and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgpo_jax import distributions, fused, information, losses
from pgpo_jax.losses import DistillationConfig

VOCAB = 7
INDEX = np.arange(VOCAB)
RANDOM = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
FINITE = {
    "random": RANDOM,
    "random, large": 1e4 * RANDOM,
    "all alike": np.zeros(VOCAB),
    "all large": np.full(VOCAB, 1e4),
    "one above": 1e4 * (INDEX == 0),
    "another above": 1e4 * (INDEX == 3),
    "one below": -1e4 * (INDEX == 0),
    "two groups": np.where(INDEX % 2, -1e4, 1e4),
    "the other way": np.where(INDEX % 2, 1e4, -1e4),
}
MASKED = {
    "the end masked": np.where(INDEX > 3, -np.inf, RANDOM),
    "the beginning masked": np.where(INDEX < 3, -np.inf, RANDOM),
    "all but one masked": np.where(INDEX != 2, -np.inf, RANDOM),
    "all but another masked": np.where(INDEX != 5, -np.inf, RANDOM),
    "padding": np.where(INDEX > 4, distributions.NEVER, RANDOM),
    "the end of float32": np.where(INDEX == 1, 3e38, -3e38),
}
KINDS = ["forward_kl", "reverse_kl", "jsd", "sampled"]
SUPPORTS = [(None, True), (1, True), (1, False), (3, True), (3, False)]


def pairs(cases):
    """Every case as the student's logits with every case as the teacher's, `[pair, vocab]`."""
    student, teacher = zip(*itertools.product(cases.values(), repeat=2), strict=True)
    return jnp.array(np.stack(student), jnp.float32), jnp.array(np.stack(teacher), jnp.float32)


def measure(student, teacher, tokens=None, vocab_size=None, **config):
    """Terms of each pair, and the gradient of the divergence for the student's logits."""
    if tokens is None:
        tokens = jnp.argmax(student, -1)  # a token that the student can have sampled

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_of(student, teacher):
        terms = fused.token_terms(
            student,
            teacher,
            fused.Tokens(tokens, jnp.ones(tokens.shape), jnp.full(tokens.shape, -1.0)),
            fused.Options(DistillationConfig(**config), information.ESTIMATORS, vocab_size),
        )
        return jnp.sum(terms.divergence), terms

    gradient, terms = gradient_of(student, teacher)
    return jax.device_get(terms), jax.device_get(gradient)


@functools.cache
def measure_all(kind, top_k, tail):
    """Of all pairs of `FINITE` and `MASKED`."""
    return measure(*pairs(FINITE | MASKED), kind=kind, top_k=top_k, tail=tail)


def all_finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k, tail", SUPPORTS)
def test_no_logits_break_a_divergence_an_estimator_or_a_gradient(kind, top_k, tail):
    student, _ = pairs(FINITE | MASKED)
    terms, gradient = measure_all(kind, top_k, tail)
    assert all_finite(terms)
    assert all_finite(gradient)
    assert np.all(gradient[~np.isfinite(student)] == 0)
    if kind != "sampled":
        assert np.all(terms.divergence >= -1e-5)
    if kind == "jsd":
        assert np.all(terms.divergence <= np.log(2) + 1e-5)


def test_the_values_at_large_logits_are_the_right_ones():
    student, teacher = pairs(FINITE)
    logits = (np.asarray(student, np.float64), np.asarray(teacher, np.float64))
    log_s, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in logits)
    s, q = np.exp(log_s), np.exp(log_q)
    m = np.logaddexp(log_s, log_q) - np.log(2)
    entropies = [-np.sum(p * log_p, -1) for p, log_p in ((s, log_s), (q, log_q))]
    jensen_shannon = (np.sum(s * (log_s - m), -1) + np.sum(q * (log_q - m), -1)) / 2
    expected = {
        "entropy_gap": entropies[0] - entropies[1],
        "conditional_kl": np.sum(q * (log_q - log_s), -1),
        "jensen_shannon": jensen_shannon,
    }
    terms, _ = measure(student, teacher, kind="reverse_kl", top_k=None)
    for name, value in expected.items():
        # 1e-3 of nats: float32 logits at 1e4 are spaced 1e-3 apart.
        np.testing.assert_allclose(
            terms.information[name], value, rtol=1e-5, atol=2e-3, err_msg=name
        )
    reverse = np.sum(s * (log_s - log_q), -1)
    np.testing.assert_allclose(terms.divergence, reverse, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k, tail", SUPPORTS)
def test_a_student_that_agrees_with_its_teacher_is_left_alone(kind, top_k, tail):
    terms, gradient = measure_all(kind, top_k, tail)
    same = slice(None, None, len(FINITE | MASKED) + 1)  # each case with itself
    for value in (terms.divergence, gradient, *terms.information.values()):
        np.testing.assert_allclose(value[same], 0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab, top_k", [(1, None), (1, 1), (4, 1)])
def test_a_vocabulary_of_one_token_has_nothing_to_learn(kind, vocab, top_k):
    student, teacher = jnp.full((3, vocab), 1e4), jnp.full((3, vocab), -1e4)
    tokens = jnp.zeros(3, int)
    terms, gradient = measure(student, teacher, tokens, vocab_size=1, kind=kind, top_k=top_k)
    for value in (terms.divergence, terms.student_entropy, gradient, *terms.information.values()):
        np.testing.assert_array_equal(np.abs(value), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_pass_stays_finite_where_the_logits_do(kind):
    cases = jnp.array(np.stack([*FINITE.values()]), jnp.float32)
    count = len(cases)
    config = DistillationConfig(kind=kind, top_k=3, chunk_size=32)
    # Hidden states that pick a column of the head, which holds a case.
    student, teacher = pairs(dict(enumerate(np.eye(count))))
    head = cases.T
    tokens = jnp.argmax(student @ cases, -1)
    weights = jnp.full(count**2, 1.0 / count**2)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss_fn(hidden, head):
        sides = fused.Side(hidden, head), fused.Side(teacher, cases.T)
        return fused.distill(*sides, fused.Tokens(tokens, weights), fused.Options(config))

    (loss, terms), gradients = loss_fn(student, head)
    assert all_finite((loss, terms, gradients))
    expected, _ = measure(student @ cases, teacher @ cases, tokens, kind=kind, top_k=3)
    np.testing.assert_allclose(terms.divergence, expected.divergence, rtol=1e-5, atol=1e-5)


def test_importance_weights_stay_between_zero_and_their_cap():
    values = jnp.array([0.0, -1e4, distributions.NEVER, -jnp.inf])
    weights = losses.importance_weight(
        *jnp.broadcast_arrays(values[:3, None], values[None, :]), cap=2.0
    )
    assert all_finite(weights)
    assert np.all((weights >= 0) & (weights <= 2))
