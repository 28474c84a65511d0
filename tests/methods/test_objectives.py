"""Rival objectives: what their theory says must hold, exactly where it says exactly."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgpo_jax import data, fused, losses, sharding
from pgpo_jax.data.batch import to_mean_1, to_rows
from pgpo_jax.methods import ObjectiveConfig, make_objective, objective
from pgpo_jax.methods.objective import Policy
from pgpo_jax.objective import Responses

TOKENS, EMBED, VOCAB = 24, 6, 20
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


LOG_PROBS = -jnp.abs(normal(TOKENS))
OLD = LOG_PROBS + 0.3 * normal(TOKENS)
AT_ARGMAX = -jnp.abs(normal(TOKENS))
POLICY = Policy(
    weights=jnp.ones(TOKENS) / TOKENS,
    advantages=normal(TOKENS),
    advantage_weight=jnp.full(TOKENS, 0.5),
    with_right=-jnp.abs(normal(TOKENS)),
    with_wrong=-jnp.abs(normal(TOKENS)),
    has_wrong=jnp.asarray(RNG.random(TOKENS) < 0.5),
)


def terms(policy=POLICY, **config):
    config = ObjectiveConfig(policy=1.0, **config)
    return objective.policy_terms(LOG_PROBS, OLD, AT_ARGMAX, policy, config)


def test_advantages_are_relative_to_the_group():
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    statistics = objective.group_statistics(rewards)
    expected = [0.75 / (0.5 + 1e-4), *[-0.25 / (0.5 + 1e-4)] * 3, 0, 0, 0, 0]
    np.testing.assert_allclose(statistics.advantages, expected, rtol=1e-5)
    assert statistics.success.tolist() == [True, False, False, False, True, True, True, True]
    assert statistics.success_rate.tolist() == [0.25] * 4 + [1.0] * 4
    plain = objective.group_statistics(rewards, threshold=1.5, scale_advantage=False)
    np.testing.assert_allclose(plain.advantages, [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0])
    assert not plain.success.any()


def test_the_surrogate_is_that_of_ppo():
    ratios = jnp.array([0.5, 0.9, 1.1, 1.5])
    for advantage, expected in ((1.0, [0.5, 0.9, 1.1, 1.28]), (-1.0, [-0.8, -0.9, -1.1, -1.5])):
        got = objective.surrogate(jnp.log(ratios), jnp.zeros(4), jnp.full(4, advantage))
        np.testing.assert_allclose(got, -np.array(expected), rtol=1e-6)


def test_the_gradient_stops_where_the_ratio_is_clipped_and_is_reinforces_elsewhere():
    log_ratios = jnp.log(jnp.array([0.5, 1.0, 1.0, 1.5]))
    advantages = jnp.array([-1.0, 2.0, -3.0, 1.0])
    gradient = jax.grad(lambda x: jnp.sum(objective.surrogate(x, jnp.zeros(4), advantages)))(
        log_ratios
    )
    np.testing.assert_allclose(gradient, [0, -2, 3, 0], rtol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_what_counts_as_clipped_is_what_has_no_gradient_by_numpy(sign):
    log_ratios = np.linspace(-1, 1, 41).astype(np.float32)
    advantages = jnp.full(41, 2 * sign)
    clipped = objective.is_clipped(jnp.asarray(log_ratios), jnp.zeros(41), advantages)
    ratios = np.exp(log_ratios)
    expected = {1.0: ratios > 1.28, -1.0: ratios < 0.8, 0.0: np.full(41, False)}[sign]
    np.testing.assert_array_equal(clipped, expected)
    surrogate = jax.vmap(jax.grad(objective.surrogate))
    gradient = surrogate(jnp.asarray(log_ratios), jnp.zeros(41), advantages)
    flows = -2 * sign * ratios
    np.testing.assert_allclose(gradient, np.where(expected, 0, flows), rtol=1e-5)


def test_equal_evidence_is_grpo_exactly():
    same = POLICY._replace(with_wrong=POLICY.with_right, has_wrong=jnp.ones(TOKENS, bool))
    chex.assert_trees_all_equal(terms(same, advantage="contrast"), terms())


def test_the_student_in_place_of_the_wrong_answer_is_rlsd_exactly():
    itself = POLICY._replace(with_wrong=LOG_PROBS, has_wrong=jnp.ones(TOKENS, bool))
    chex.assert_trees_all_equal(terms(itself, advantage="contrast"), terms(advantage="evidence"))


def test_a_group_without_a_wrong_response_falls_back_as_asked():
    none = POLICY._replace(has_wrong=jnp.zeros(TOKENS, bool))
    student = terms(none, advantage="contrast", without_wrong="student")
    chex.assert_trees_all_equal(student, terms(advantage="evidence"))
    chex.assert_trees_all_equal(terms(none, advantage="contrast", without_wrong="none"), terms())


def test_the_weight_of_the_evidence_fades_to_grpo():
    faded = POLICY._replace(advantage_weight=jnp.zeros(TOKENS))
    for advantage in ("contrast", "evidence", "teacher_argmax"):
        chex.assert_trees_all_equal(terms(faded, advantage=advantage), terms())
    config = ObjectiveConfig(advantage_weight=0.5, advantage_steps=25)
    weights = [float(objective.advantage_weight(config, jnp.int32(k))) for k in (0, 5, 25, 90)]
    np.testing.assert_allclose(weights, [0.5, 0.4, 0, 0], atol=1e-7)


ADVANTAGES = st.floats(-5, 5, width=32).filter(lambda a: a == 0 or abs(a) > 1e-30)  # no underflow


@hypothesis.given(
    ADVANTAGES, st.floats(-300, 300, width=32), st.floats(0, 1, width=32), st.floats(0, 0.875)
)
def test_evidence_keeps_the_sign_of_an_advantage(advantage, evidence, weight, clip):
    got = objective.weigh_by_evidence(
        *(jnp.asarray(x, jnp.float32) for x in (advantage, evidence, weight)), clip
    )
    assert np.sign(got) == np.sign(np.float32(advantage))
    assert abs(got) <= abs(advantage) * (1 + clip) * (1 + 1e-6)


def test_the_teachers_likeliest_token_raises_an_advantage_by_its_probability():
    plain, _ = objective.policy_terms(
        LOG_PROBS, None, AT_ARGMAX, POLICY, ObjectiveConfig(policy=1.0)
    )
    config = ObjectiveConfig(policy=1.0, advantage="teacher_argmax")
    raised, _ = objective.policy_terms(LOG_PROBS, None, AT_ARGMAX, POLICY, config)
    np.testing.assert_allclose(plain - raised, 0.5 * jnp.exp(AT_ARGMAX), rtol=1e-5, atol=1e-6)


def test_low_probability_punishes_unlikely_tokens_alone_whatever_the_rewards_say():
    chosen = {"advantage": "low_probability", "low_probability": 0.3}
    got, _ = terms(**chosen)
    unlikely = np.exp(LOG_PROBS) < 0.3
    assert unlikely.any() and not unlikely.all()
    ratio = np.exp(LOG_PROBS - OLD)
    np.testing.assert_allclose(got, np.where(unlikely, np.maximum(ratio, 0.8), 0), rtol=1e-5)
    other = POLICY._replace(advantages=-POLICY.advantages)
    np.testing.assert_array_equal(terms(other, **chosen)[0], got)
    config = ObjectiveConfig(policy=1.0, **chosen)
    gradient = jax.grad(
        lambda x: jnp.sum(objective.policy_terms(x, None, AT_ARGMAX, POLICY, config)[0])
    )(LOG_PROBS)
    np.testing.assert_allclose(gradient, unlikely.astype(float), rtol=1e-6)  # likelier is worse


@pytest.mark.parametrize(("advantage", "learned"), [("low_probability", True), ("group", False)])
def test_a_fixed_advantage_learns_from_groups_of_one_reward_too(advantage, learned):
    group = objective.group_statistics([[1.0, 1.0], [0.0, 0.0]])
    nobody = jnp.zeros(4, bool)
    responses = Responses(jnp.full(4, 3), nobody, jax.tree.map(jnp.asarray, group))
    chosen = make_objective(ObjectiveConfig(distillation=0.0, policy=1.0, advantage=advantage))
    weights, learns = chosen.weights(responses, jnp.int32(0), "sequence_mean")
    assert bool(learns) == learned
    np.testing.assert_allclose(weights.policy.weights, 1 / 12, rtol=1e-6)


def test_the_router_sends_every_row_at_most_one_way():
    success = jnp.array([True, True, False, False])
    context = jnp.array([True, False, True, False])
    config = ObjectiveConfig(policy=1.0, route="by_outcome")
    routes = objective.route(config, success, context)
    assert routes.policy.tolist() == [True, True, False, False]
    assert routes.distillation.tolist() == [False, False, True, False]
    kept = objective.route(ObjectiveConfig(policy=1.0, route="with_context"), success, context)
    assert kept.policy.tolist() == kept.distillation.tolist() == context.tolist()
    both = objective.route(ObjectiveConfig(policy=0.5, distillation=0.5), success, context)
    assert both.policy.all()
    assert both.distillation.tolist() == context.tolist()
    only = objective.route(ObjectiveConfig(policy=1.0, distillation=0.0), success, context)
    assert not only.distillation.any()
    assert not objective.route(ObjectiveConfig(), success, context).policy.any()


def test_question_weights_have_mean_1_and_favour_what_is_half_solved():
    share = jnp.repeat(jnp.array([1.0, 0.5, 0.25]), 4)
    config = ObjectiveConfig(question_weight="reward_std")
    raw = np.sqrt([0, 0.25, 0.1875])
    expected = np.repeat(raw / raw.mean(), 4)
    np.testing.assert_allclose(objective.question_weights(config, share), expected, rtol=1e-6)
    assert objective.question_weights(config, jnp.zeros(8)).tolist() == [0] * 8
    assert objective.question_weights(ObjectiveConfig(), share).tolist() == [1] * 12


@pytest.mark.parametrize("kind", ["teacher_entropy", "information"])
def test_token_weights_have_mean_1_over_every_response(kind):
    lengths = np.array([[6], [1], [3], [0]])
    mask = np.arange(6)[None] < lengths
    entropy, gaps = jnp.abs(normal(4, 6)), normal(4, 6).at[0, 5].set(1e6)
    config = ObjectiveConfig(token_weight=kind, token_alpha=2.0)
    raw = objective.token_weights(config, entropy, gaps)
    assert np.isfinite(raw).all()
    exponent = -entropy if kind == "teacher_entropy" else 2 * gaps
    ratio = jnp.exp(exponent[0, 1] - exponent[0, 0])
    np.testing.assert_allclose(raw[0, 1] / raw[0, 0], ratio, rtol=1e-5)
    blank = np.zeros((4, 2), np.int32), np.ones((4, 2), bool)
    prompts = {"student": blank, "teacher": blank}
    examples = data.Examples(prompts, np.zeros((4, 6), np.int32), mask, mask * 1.0, mask.any(1))
    batch = data.pack(examples, data.DataConfig(), sharding.make_mesh(sharding.MeshConfig(1)))
    order = [raw[row][mask[row]] for row in range(4)]
    values = jnp.zeros(batch.responses.size).at[: mask.sum()].set(jnp.concatenate(order))
    weights = np.asarray(to_mean_1(batch, values)).reshape(batch.responses.shape)
    for row, own in enumerate(to_rows(batch, weights)):
        np.testing.assert_allclose(own.sum(), lengths[row, 0], rtol=1e-5)
    assert not weights[~batch.response_mask].any()


def test_the_coefficient_of_the_distillation_fades_linearly():
    config = ObjectiveConfig(distillation=0.002, distillation_end=0.0, distillation_steps=200)
    values = [float(objective.distillation_coefficient(config, k)) for k in (0, 100, 200, 999)]
    np.testing.assert_allclose(values, [0.002, 0.001, 0, 0], atol=1e-8)
    assert float(objective.distillation_coefficient(ObjectiveConfig(), 7)) == 1


# ---- in the vocabulary pass ----------------------------------------------------------------------

HIDDEN, HEAD = normal(TOKENS, EMBED), normal(VOCAB, EMBED)
TEACHER = fused.Side(normal(TOKENS, EMBED), normal(VOCAB, EMBED))
SAMPLED = jnp.asarray(RNG.integers(0, VOCAB, TOKENS))
# Some tokens get both terms, some one, some none.
WEIGHTS = jnp.where(jnp.arange(TOKENS) % 3 == 0, 0.0, 1 / TOKENS)
MIXED = POLICY._replace(weights=jnp.where(jnp.arange(TOKENS) % 2 == 0, 0.0, 0.5))


@pytest.mark.parametrize("advantage", ["group", "contrast", "evidence", "teacher_argmax"])
@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_the_fused_gradient_is_that_of_all_logits_at_once(advantage, mesh):
    config = losses.DistillationConfig(top_k=5, chunk_size=5)
    terms = make_objective(ObjectiveConfig(policy=1.0, advantage=advantage)).policy_terms
    where = mesh and sharding.make_mesh(sharding.MeshConfig(*mesh))
    rows = fused.Tokens(SAMPLED, WEIGHTS, OLD, MIXED)

    def fused_loss(hidden, head):
        options = fused.Options(config, mesh=where, policy_terms=terms)
        return fused.distill(fused.Side(hidden, head), TEACHER, rows, options)

    def plain_loss(hidden, head):
        found = fused.token_terms(
            fused.logits(hidden, head),
            fused.logits(*TEACHER),
            rows,
            fused.Options(config, policy_terms=terms),
        )
        loss = jnp.sum(WEIGHTS * found.weight * found.divergence)
        return loss + jnp.sum(MIXED.weights * found.policy), found

    both = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(HIDDEN, HEAD)
        for f in (fused_loss, plain_loss)
    )
    (got, got_terms), gradients = next(both)
    (expected, expected_terms), expected_gradients = next(both)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_terms.policy, expected_terms.policy, rtol=1e-5, atol=1e-6)


def test_the_argmax_of_the_teacher_is_a_cross_entropy_with_its_likeliest_token():
    config = losses.DistillationConfig(kind="teacher_argmax", importance_cap=None, chunk_size=7)
    gradient = jax.grad(
        lambda hidden: fused.distill(
            fused.Side(hidden, HEAD), TEACHER, fused.Tokens(SAMPLED, WEIGHTS), fused.Options(config)
        )[0]
    )(HIDDEN)
    likeliest = jnp.argmax(TEACHER.hidden @ TEACHER.head.T, axis=1)
    error = jax.nn.softmax(HIDDEN @ HEAD.T) - jax.nn.one_hot(likeliest, VOCAB)
    np.testing.assert_allclose(gradient, WEIGHTS[:, None] * (error @ HEAD), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_scores_are_log_probs_of_the_tokens(mesh):
    options = fused.Options(
        losses.DistillationConfig(chunk_size=5, temperature=0.5),
        vocab_size=VOCAB,
        mesh=mesh and sharding.make_mesh(sharding.MeshConfig(*mesh)),
    )
    got = jax.jit(functools.partial(fused.score, options=options))(
        fused.Side(HIDDEN, HEAD), SAMPLED
    )
    log_p = jax.nn.log_softmax(HIDDEN @ HEAD.T / 0.5)
    np.testing.assert_allclose(got, log_p[jnp.arange(TOKENS), SAMPLED], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_a_cross_entropy_is_that_of_all_logits_at_once(mesh):
    options = fused.Options(
        losses.DistillationConfig(chunk_size=5, temperature=0.5),
        mesh=mesh and sharding.make_mesh(sharding.MeshConfig(*mesh)),
    )

    def ours(hidden, head):
        return fused.cross_entropy(fused.Side(hidden, head), SAMPLED, WEIGHTS, options)

    def plain(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head.T / 0.5)
        return -jnp.sum(WEIGHTS * log_p[jnp.arange(TOKENS), SAMPLED])

    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(HIDDEN, HEAD) for f in (ours, plain))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
