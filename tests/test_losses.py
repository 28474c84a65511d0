"""Divergences, weights and aggregation of SDPO."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgpo_jax import distributions, losses
from pgpo_jax.errors import InputError
from pgpo_jax.losses import DistillationConfig, aggregate, divergence, importance_weight

KINDS = ["forward_kl", "reverse_kl", "jsd"]


def logits(seed, shape=(2, 3, 7), scale=2.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def softmax(x):
    p = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(p * np.log(p / q), -1)


@given(seed=st.integers(0, 10_000), weight=st.floats(0.05, 0.95))
def test_divergences_follow_their_definitions(seed, weight):
    student, teacher = logits(seed), logits(seed + 1)
    s, q = softmax(student), softmax(teacher)
    m = (1 - weight) * s + weight * q
    expected = {
        "forward_kl": kl(q, s),
        "reverse_kl": kl(s, q),
        "jsd": (1 - weight) * kl(s, m) + weight * kl(q, m),
    }
    for kind, value in expected.items():
        ours = divergence(student, teacher, kind=kind, jsd_weight=weight)
        np.testing.assert_allclose(ours, value, rtol=1e-4, atol=1e-6)


# Beyond a scale of about 5 the top k can hold all but 1e-7, where float32 no longer resolves the
# tail.
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 5), top_k=st.integers(1, 7))
def test_jsd_is_at_most_ln_2_and_top_k_with_tail_is_at_most_the_full_value(seed, scale, top_k):
    student, teacher = logits(seed, scale=scale), logits(seed + 1, scale=scale)
    assert np.all(divergence(student, teacher) <= np.log(2) + 1e-5)
    for kind in KINDS:
        full = divergence(student, teacher, kind=kind)
        coarse = divergence(student, teacher, kind=kind, top_k=top_k)
        assert np.all(coarse <= full * (1 + 1e-4) + 1e-4)


def test_renormalised_top_k_can_exceed_the_full_value_so_the_tail_is_not_decoration():
    # Student and teacher differ inside the student's top 2 only by a little of their mass:
    # renormalising inflates it.
    student = jnp.log(jnp.array([[[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]]]))
    teacher = jnp.log(jnp.array([[[0.02, 0.2, 0.38, 0.1, 0.1, 0.1, 0.1]]]))
    full = divergence(student, teacher, kind="forward_kl")
    without = divergence(student, teacher, kind="forward_kl", top_k=2, tail=False)
    assert without > full


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(kind, tail):
    student, teacher = logits(0), logits(1)
    full = divergence(student, teacher, kind=kind)
    np.testing.assert_allclose(divergence(student, teacher, kind=kind, top_k=7, tail=tail), full)
    np.testing.assert_allclose(divergence(student, teacher, kind=kind, top_k=99, tail=tail), full)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_with_tail_is_the_divergence_of_the_merged_distributions(kind):
    student, teacher = logits(2), logits(3)
    s, q = softmax(student), softmax(teacher)
    top = np.argsort(-s, -1)[..., :3]

    def merged(p):
        inside = np.take_along_axis(p, top, -1)
        return np.concatenate([inside, 1 - inside.sum(-1, keepdims=True)], -1)

    expected = divergence(jnp.log(merged(s)), jnp.log(merged(q)), kind=kind)
    np.testing.assert_allclose(
        divergence(student, teacher, kind=kind, top_k=3), expected, rtol=1e-4, atol=1e-6
    )


def test_near_agreement_jsd_is_a_quarter_of_either_kl():
    student = logits(4)
    teacher = student + 0.01 * logits(5)
    jsd = divergence(student, teacher)
    for kind in ("forward_kl", "reverse_kl"):
        np.testing.assert_allclose(4 * jsd, divergence(student, teacher, kind=kind), rtol=0.03)


@pytest.mark.parametrize("weight", [0.3, 0.5])
def test_jsd_gradient_is_the_closed_form(weight):
    student, teacher = logits(6), logits(7)
    gradient = jax.grad(lambda s: divergence(s, teacher, jsd_weight=weight).sum())(student)
    s, q = softmax(student), softmax(teacher)
    ratio = np.log(s / ((1 - weight) * s + weight * q))
    expected = (1 - weight) * s * (ratio - np.sum(s * ratio, -1, keepdims=True))
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k, tail", [(None, True), (3, True), (3, False)])
def test_gradients_agree_with_finite_differences(kind, top_k, tail):
    student, teacher = logits(8, (1, 2, 7)), logits(9, (1, 2, 7))

    def total(student):
        student = jnp.asarray(student)  # check_grads passes NumPy's
        return divergence(student, teacher, kind=kind, top_k=top_k, tail=tail).sum()

    # A step of 1e-2: smaller ones drown in float32, and the top k must not change on the way.
    jax.test_util.check_grads(total, (student,), 1, ["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_gets_no_gradient(kind):
    student, teacher = logits(10), logits(11)
    gradient = jax.grad(lambda t: divergence(student, t, kind=kind, top_k=3).sum())(teacher)
    assert np.all(gradient == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("padding", [-jnp.inf, distributions.NEVER])
def test_padded_vocabulary_rows_do_not_matter_in_value_or_gradient(kind, top_k, padding):
    student, teacher = logits(12), logits(13)
    wide = [jnp.concatenate([x, jnp.full((2, 3, 2), padding)], -1) for x in (student, teacher)]

    def total(student, teacher):
        return divergence(student, teacher, kind=kind, top_k=top_k).sum()

    value, gradient = jax.value_and_grad(total)(*wide)
    expected, expected_gradient = jax.value_and_grad(total)(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[..., :7], expected_gradient, rtol=1e-4, atol=1e-6)
    assert np.all(gradient[..., 7:] == 0)


def test_saturated_top_k_stays_finite():
    student, teacher = logits(14, scale=200.0), logits(15, scale=200.0)
    for kind in KINDS:
        value, gradient = jax.value_and_grad(
            lambda s, kind=kind: divergence(s, teacher, kind=kind, top_k=2).sum()
        )(student)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_sampled_divergence_has_the_reverse_kl_gradient_in_expectation():
    student, teacher = logits(16, (1, 1, 5)), logits(17, (1, 1, 5))

    def expected(student):
        log_s, log_q = distributions.log_probs(student), distributions.log_probs(teacher)
        weight = jax.lax.stop_gradient(jnp.exp(log_s))
        return jnp.sum(weight * losses.sampled_divergence(log_s, log_q))

    reverse = jax.grad(lambda s: divergence(s, teacher, kind="reverse_kl").sum())(student)
    np.testing.assert_allclose(jax.grad(expected)(student), reverse, rtol=1e-4, atol=1e-6)


def test_importance_weight_is_one_on_policy_capped_and_without_gradient():
    log_probs = jnp.array([[-1.0, -2.0, -50.0, 0.0]])
    np.testing.assert_array_equal(importance_weight(log_probs, log_probs), 1.0)
    old = jnp.array([[-1.5, -4.0, 0.0, -1e4]])
    np.testing.assert_allclose(
        importance_weight(log_probs, old, cap=2.0),
        [[np.exp(0.5), 2.0, np.exp(-20.0), 2.0]],
        rtol=1e-6,
    )
    assert np.all(jax.grad(lambda x: importance_weight(x, old).sum())(log_probs) == 0)


MASK = jnp.array([[True, True, False], [True, False, False], [True, True, True]])
TERMS = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.nan, jnp.nan], [7.0, 7.0, 7.0]])
CONTEXT = jnp.array([True, True, False])


def test_sequence_mean_divides_by_all_responses_masked_ones_included():
    assert aggregate(TERMS, MASK, CONTEXT) == pytest.approx((1.5 + 4.0) / 3)


def test_token_mean_divides_by_the_tokens_that_count():
    assert aggregate(TERMS, MASK, CONTEXT, mode="token_mean") == pytest.approx(7.0 / 3)


@pytest.mark.parametrize("mode", ["sequence_mean", "token_mean"])
def test_nothing_to_learn_from_is_a_loss_of_zero_with_zero_gradient(mode):
    value, gradient = jax.value_and_grad(
        lambda x: aggregate(x, MASK, jnp.zeros(3, bool), mode=mode)
    )(TERMS)
    assert value == 0 and np.all(gradient == 0)


@pytest.mark.parametrize("mode", ["sequence_mean", "token_mean"])
def test_the_loss_does_not_depend_on_the_split_into_micro_batches(mode):
    terms = jnp.nan_to_num(TERMS)
    weights = losses.loss_weights(MASK, CONTEXT, mode)
    parts = [jnp.sum(terms[i : i + 1] * weights[i : i + 1]) for i in range(3)]
    assert sum(parts) == pytest.approx(float(aggregate(terms, MASK, CONTEXT, mode=mode)))


@pytest.mark.parametrize(
    "field, value", [("jsd_weight", 1.0), ("top_k", 0), ("temperature", 0.0), ("chunk_size", 0)]
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(InputError, match=rf"distillation\.{field}: got .*; must be"):
        DistillationConfig(**{field: value})


@given(
    hnp.arrays(np.float32, (3, 64), elements=st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0])),
    st.integers(1, 20),
)
def test_the_search_in_blocks_finds_what_one_search_finds(logits, k):
    wanted = jax.lax.top_k(logits, k)[1]
    np.testing.assert_array_equal(distributions.top_k_indices(jnp.array(logits), k, 4), wanted)
