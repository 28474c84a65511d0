"""Targets between teacher and student: the formulas in numpy, their limits, and their gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgpo_jax import fused, sharding
from pgpo_jax.errors import InputError
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.methods import ObjectiveConfig, make_objective, targets
from pgpo_jax.objective import Forward, Weights

TOKENS, EMBED, VOCAB, REAL = 22, 6, 24, 21
RNG = np.random.default_rng(3)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


STUDENT, TEACHER = ({"hidden": normal(TOKENS, EMBED), "head": normal(VOCAB, EMBED)} for _ in "st")
PLAIN = TEACHER["hidden"] + 0.4 * normal(TOKENS, EMBED)
SAMPLED = jnp.asarray(RNG.integers(0, REAL, TOKENS))
WEIGHTS = jnp.where(jnp.arange(TOKENS) % 4 == 0, 0.0, 1 / TOKENS)


def log_softmax(logits):
    """In numpy and double precision."""
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def logits(side):
    return side["hidden"] @ side["head"].T


LOG_S, LOG_T, LOG_P = (
    log_softmax(logits(side)) for side in (STUDENT, TEACHER, TEACHER | {"hidden": PLAIN})
)


@pytest.mark.parametrize(("most", "slope"), [(0.15, 50.0), (0.15, 25.0), (1.0, 3.0)])
def test_demopsds_target_is_its_formula(most, slope):
    middle = np.log((np.exp(LOG_T) + np.exp(LOG_P)) / 2)
    d = sum((np.exp(log_p) * (log_p - middle)).sum(-1) / 2 for log_p in (LOG_T, LOG_P))
    a = 2 * most * (1 / (1 + np.exp(-slope * d)) - 1 / 2)
    assert a.min() > 0 and a.max() < most
    expected = log_softmax((1 - a[:, None]) * LOG_T + a[:, None] * LOG_P)
    target = jax.jit(functools.partial(targets.demopsd, most=most, slope=slope))
    got = target(*map(jnp.float32, (LOG_T, LOG_P)))
    np.testing.assert_allclose(jax.nn.log_softmax(got), expected, rtol=1e-5, atol=1e-5)


def test_demopsds_target_is_the_teacher_where_nothing_is_mixed_in_or_the_context_says_nothing():
    teacher, plain = jnp.float32(LOG_T), jnp.float32(LOG_P)
    np.testing.assert_array_equal(targets.demopsd(teacher, plain, most=0.0), teacher)
    same = targets.demopsd(teacher, teacher, most=1.0, slope=100.0)
    np.testing.assert_allclose(same, teacher, rtol=1e-6)
    opposed = jnp.log(jnp.array([[0.999, 0.001], [0.001, 0.999]]))  # a is `most`, if anywhere
    mixed = targets.demopsd(opposed, opposed[::-1], most=0.5, slope=100.0)
    np.testing.assert_allclose(jax.nn.softmax(mixed), 0.5, rtol=1e-5)


def test_vetos_target_is_its_formula_and_the_teacher_at_0():
    product = np.exp(LOG_T) * np.exp(LOG_S) ** 0.4
    got = targets.veto(jnp.float32(LOG_S), jnp.float32(LOG_T), 0.4)
    expected = product / product.sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(got), expected, rtol=1e-5, atol=1e-7)
    teacher = jnp.float32(LOG_T)
    np.testing.assert_array_equal(targets.veto(jnp.float32(LOG_S), teacher, 0.0), teacher)


def test_a_student_at_vetos_fixed_point_has_no_gradient():
    log_t = jnp.float32(LOG_T)
    rest = jax.nn.log_softmax(log_t / (1 - 0.4))

    def reverse_kl(student):
        log_s = jax.nn.log_softmax(student)
        target = jax.nn.log_softmax(targets.veto(jax.lax.stop_gradient(log_s), log_t, 0.4))
        return jnp.sum(jnp.exp(log_s) * (log_s - target))

    np.testing.assert_allclose(jax.grad(reverse_kl)(rest), 0, atol=1e-5)
    assert jnp.abs(jax.grad(reverse_kl)(log_t)).max() > 0.01


# ---- in the vocabulary pass ----------------------------------------------------------------------


@functools.cache
def distill(chosen=ObjectiveConfig(), mesh=None, **config):  # noqa: B008, it is frozen
    """Loss, terms, and gradients for the student's hidden states and head."""
    settings = DistillationConfig(**{"kind": "reverse_kl", "top_k": 7, "chunk_size": 5} | config)
    mesh = mesh and sharding.make_mesh(sharding.MeshConfig(*mesh))
    options = fused.Options(settings, (), REAL, mesh, target=make_objective(chosen).target)

    def loss(hidden, head):
        student, teacher = fused.Side(hidden, head), fused.Side(**TEACHER)
        rows = fused.Tokens(SAMPLED, WEIGHTS)
        return fused.distill(student, teacher, rows, options, PLAIN)

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)(*STUDENT.values())


def reverse_kl_to(chosen):
    """KL(student || target) from all logits at once, and its gradients, by the formulas alone."""

    def loss(hidden, head):
        log_s, log_t, log_p = (
            jax.nn.log_softmax((rows @ matrix.T)[:, :REAL])
            for rows, matrix in (
                (hidden, head),
                (TEACHER["hidden"], TEACHER["head"]),
                (PLAIN, TEACHER["head"]),
            )
        )
        if chosen.target == "demopsd":
            middle = jnp.log((jnp.exp(log_t) + jnp.exp(log_p)) / 2)
            d = (jnp.exp(log_t) * (log_t - middle) + jnp.exp(log_p) * (log_p - middle)).sum(-1) / 2
            a = 2 * chosen.target_most * (jax.nn.sigmoid(chosen.target_slope * d) - 0.5)
            target = (1 - a[:, None]) * log_t + a[:, None] * log_p
        else:
            target = log_t + chosen.target_power * jax.lax.stop_gradient(log_s)
        log_q = jax.nn.log_softmax(target)
        return jnp.sum(WEIGHTS * jnp.sum(jnp.exp(log_s) * (log_s - log_q), -1))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*STUDENT.values())


DEMOPSD = ObjectiveConfig(target="demopsd", target_slope=25.0)
VETO = ObjectiveConfig(target="veto", target_power=0.5)


@pytest.mark.parametrize(
    ("chosen", "mesh"),
    [
        (DEMOPSD, None),
        (VETO, None),
        (DEMOPSD, (2, 2, 2)),
        pytest.param(VETO, (2, 2, 2), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "target", str(value)),
)
def test_the_fused_gradient_is_that_of_the_reverse_kl_to_the_target(chosen, mesh):
    (loss, _), gradients = distill(chosen, mesh, top_k=None)
    expected, expected_gradients = reverse_kl_to(chosen)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "off", [{"target": "demopsd", "target_most": 0.0}, {"target": "veto", "target_power": 0.0}]
)
def test_a_target_turned_off_is_plain_distillation(off):
    chex.assert_trees_all_close(distill(ObjectiveConfig(**off)), distill(), rtol=1e-5, atol=1e-6)


def test_with_top_k_a_target_is_that_of_the_whole_vocabulary_at_the_students_largest():
    whole, largest = (float(distill(DEMOPSD, top_k=k)[0][0]) for k in (None, 7))
    assert 0 < largest < whole  # with the rest in one bucket a divergence can only shrink


def test_a_target_leaves_information_and_entropies_those_of_the_teacher():
    found, plain = (distill(*chosen)[0][1] for chosen in ((DEMOPSD,), ()))
    assert jnp.abs(found.divergence - plain.divergence).max() > 1e-3
    chex.assert_trees_all_close(found._replace(divergence=0), plain._replace(divergence=0))


@pytest.mark.parametrize("chosen", [DEMOPSD, VETO], ids=["demopsd", "veto"])
def test_a_target_keeps_no_logits_beyond_a_chunks(chosen):
    tokens, vocab, chunk = 64, 512, 16
    shape = jax.ShapeDtypeStruct((tokens, EMBED), jnp.float32)
    heads = jax.ShapeDtypeStruct((vocab, EMBED), jnp.float32)
    config = DistillationConfig("reverse_kl", top_k=None, chunk_size=chunk)
    options = fused.Options(config, target=make_objective(chosen).target)
    rows = fused.Tokens(jnp.zeros(tokens, int), jnp.ones(tokens))

    def loss(hidden, head, teacher, plain):
        sides = fused.Side(hidden, head), fused.Side(teacher, head)
        return fused.distill(*sides, rows, options, plain)[0]

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(shape, heads, shape, shape)
    assert f"tensor<{chunk}x{vocab}xf32>" in lowered.as_text()
    assert f"tensor<{tokens}x{vocab}xf32>" not in lowered.as_text()


def test_only_demopsd_runs_the_teacher_without_its_context():
    side = fused.Side(jnp.zeros((3, 1)), jnp.zeros((2, 1)))
    terms = fused.Terms(
        *[jnp.zeros(3)] * 5, information={}, weight=jnp.ones(3), policy=None, clipped=None
    )
    for chosen, views in ((DEMOPSD, ["teacher", "student"]), (VETO, ["teacher"])):
        asked, given = [], []
        forward = Forward(
            student=lambda view: side,
            teacher=lambda view, asked=asked: asked.append(view) or side,
            distill=lambda *them, given=given: given.extend(them) or (jnp.zeros([]), terms),
            score=None,
            cross_entropy=None,
            to_mean_1=None,
            estimator="entropy_gap",
        )
        make_objective(chosen).loss(forward, Weights(jnp.ones(3)))
        assert asked == views
        assert (given[-1] is None) == (chosen is VETO)


def test_hidden_states_of_another_shape_are_refused():
    side, rows = fused.Side(**TEACHER), fused.Tokens(SAMPLED, WEIGHTS)
    with pytest.raises(InputError, match=r"distill\.plain: got shape \(22, 5\); \(22, 6\) fits"):
        fused.distill(side, side, rows, fused.Options(DistillationConfig()), PLAIN[:, :5])


# ---- the clip ------------------------------------------------------------------------------------


def test_a_clipped_token_counts_the_clip_and_has_no_gradient():
    (_, plain), (whole, _) = distill(DEMOPSD)
    most = float(jnp.median(plain.divergence))
    (loss, terms), (hidden, _) = distill(DEMOPSD, token_clip=most)
    np.testing.assert_array_equal(terms.divergence, jnp.minimum(plain.divergence, most))
    np.testing.assert_allclose(loss, jnp.sum(WEIGHTS * terms.divergence), rtol=1e-6)
    above = plain.divergence > most
    assert above.any() and not above.all()
    np.testing.assert_array_equal(hidden[above], 0)
    np.testing.assert_allclose(hidden[~above], whole[~above], rtol=1e-5, atol=1e-7)


def test_a_cross_entropy_knows_neither_clip_nor_target():
    side = fused.Side(**STUDENT)
    options = fused.Options(
        DistillationConfig(token_clip=1e-3), target=make_objective(DEMOPSD).target
    )
    found = fused.cross_entropy(side, SAMPLED, WEIGHTS, options)
    log_p = log_softmax(logits(STUDENT))[np.arange(TOKENS), SAMPLED]
    np.testing.assert_allclose(found, -jnp.sum(WEIGHTS * log_p), rtol=1e-5)
