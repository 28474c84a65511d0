"""The update: what it computes, what it must not depend on, when it is skipped."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgpo_jax import fused, information, losses, methods, sharding
from pgpo_jax.data import Batch, DataConfig, Examples, pack
from pgpo_jax.data.batch import to_rows
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.methods import ObjectiveConfig, group_statistics
from pgpo_jax.methods import objective as rivals
from pgpo_jax.models import decoder
from pgpo_jax.optimizer import OptimizerConfig, make_optimizer
from pgpo_jax.state import init_train_state, train_state_shardings
from pgpo_jax.step import make_train_step
from pgpo_jax.teacher import TeacherConfig

ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
ROWS, SAMPLES, PROMPT, TEACHER_PROMPT, TIME = 8, 4, 5, 9, 6


def make_examples(seed=0, has_context=None) -> Examples:
    rng = np.random.default_rng(seed)

    def left(width):
        tokens = rng.integers(0, 20, (ROWS, width), np.int32)
        return tokens, np.arange(width)[None, :] >= rng.integers(0, width, (ROWS, 1))

    lengths = rng.integers(1, TIME + 1, (ROWS, 1))
    return Examples(
        prompts={"student": left(PROMPT), "teacher": left(TEACHER_PROMPT)},
        responses=rng.integers(0, 20, (ROWS, TIME), np.int32),
        response_mask=np.arange(TIME)[None, :] < lengths,
        has_context=rng.random(ROWS) < 0.6 if has_context is None else np.full(ROWS, has_context),
        sampler_log_probs=-rng.random((ROWS, TIME), np.float32) * 4,
    )


def place(examples: Examples, mesh, micro_batches=1, packing="never") -> Batch:
    """The examples laid out on a mesh."""
    settings = DataConfig(packing=packing, micro_batches=micro_batches)
    return sharding.to_global(pack(examples, settings, mesh), mesh)


def setup(*args, **kwargs):
    """Model, update, first state and mesh; what is asked for again is not built and compiled again.

    The state is the caller's own, for an update takes it.
    """
    graphdef, step, params, optimizer, mesh = build(*args, **kwargs)
    return graphdef, step, init_train_state(jax.tree.map(jnp.copy, params), optimizer), mesh


@functools.cache
def build(
    mesh=(1, 1, 1),
    alpha=1.0,
    learning_rate=1e-2,
    distillation=None,
    objective=None,
    teacher_config=None,
    estimators=("conditional_kl",),
    **options,
):
    mesh = sharding.make_mesh(sharding.MeshConfig(*mesh))
    config = decoder.ModelConfig.from_hf(ARCHITECTURE)
    graphdef, params = decoder.init(
        config, decoder.Options(dtype=jnp.float32, **options), jax.random.key(0), mesh
    )
    # Matrices of deviation 0.2: at 0.02 a tiny model's gradients are all rounding, and Adam's first
    # steps are the signs of the gradients.
    params = jax.tree.map_with_path(lambda path, p: p if "norm" in path[-1].key else 10 * p, params)
    # An eps of 1e-3: at 1e-8 Adam also turns the rounding of a gradient near 0 into a full step.
    optimizer = make_optimizer(
        OptimizerConfig(alpha, learning_rate=learning_rate, warmup_steps=0, eps=1e-3)
    )
    shardings = train_state_shardings(params, optimizer)
    step = make_train_step(
        graphdef,
        optimizer,
        fused.Options(distillation or DistillationConfig(top_k=None, chunk_size=8), estimators, 22),
        shardings,
        objective=methods.make_objective(objective or ObjectiveConfig()),
        teacher_config=teacher_config or TeacherConfig(),
    )
    return graphdef, step, params, optimizer, mesh


def run(batches, micro_batches=1, packing="never", **options):
    _, step, state, mesh = setup(**options)
    placed = [place(batch, mesh, micro_batches, packing) for batch in batches]
    before = step._cache_size()
    for batch in placed:
        state, measured = step(state, batch)
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(batch)) for batch in placed}
    assert step._cache_size() <= before + len(shapes)
    return jax.device_get(state), numbers(measured)


def numbers(measured):
    """The scalars among the measurements."""
    return {name: float(value) for name, value in measured.items() if np.ndim(value) == 0}


def assert_same(measured, expected):
    """All numbers but the padding, which is the layout's own."""
    for name in expected.keys() - {"padding_fraction"}:
        np.testing.assert_allclose(
            measured[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name
        )


BATCHES = [make_examples(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def single():
    """State and measurements after all batches on one device, in one piece."""
    return run(BATCHES)


def test_loss_and_information_are_those_of_the_definitions():
    graphdef, step, state, mesh = setup()
    # A first update, so that teacher and student differ.
    state, _ = step(state, place(BATCHES[0], mesh))
    batch = BATCHES[1]
    arrays = jax.tree.map(jnp.asarray, batch)

    def logits(params, prompts, prompt_mask):
        net = decoder.nnx.merge(graphdef, params)
        tokens = jnp.concatenate([prompts, arrays.responses], 1)
        mask = jnp.concatenate([prompt_mask, arrays.response_mask], 1)
        return net(tokens, mask)[:, prompts.shape[1] - 1 : -1, :22]

    student = logits(state.student, *arrays.prompts["student"])
    teacher = logits(state.teacher, *arrays.prompts["teacher"])
    token_log_probs = information.at_tokens(jax.nn.log_softmax(student), arrays.responses)
    weight = losses.importance_weight(token_log_probs, arrays.sampler_log_probs)
    masks = arrays.response_mask, arrays.has_context
    expected = {
        "loss": losses.aggregate(losses.divergence(student, teacher) * weight, *masks),
        "information": information.reduce(information.entropy_gap(student, teacher), *masks),
        "information/conditional_kl": information.reduce(
            information.conditional_kl(student, teacher), *masks
        ),
    }
    expected["multiplier"] = jnp.clip(jnp.exp(expected["information"]), 0, 2)
    _, measured = step(state, place(batch, mesh))
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    gap = measured["entropy/student"] - measured["entropy/teacher"]
    np.testing.assert_allclose(measured["information"], gap, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [((1, 1, 1), 1), pytest.param((2, 2, 1), 2, marks=pytest.mark.slow)],
)
def test_the_divergence_of_every_token_stands_in_its_row(mesh, micro_batches):
    graphdef, step, state, mesh = setup(mesh)
    batch = BATCHES[0]
    params = jax.device_get(state.student)
    student, teacher = (
        decoder.nnx.merge(graphdef, jax.device_put(params))(
            jnp.concatenate([prompts, batch.responses], 1),
            jnp.concatenate([prompt_mask, batch.response_mask], 1),
        )[:, prompts.shape[1] - 1 : -1, :22]
        for prompts, prompt_mask in (batch.prompts[view] for view in ("student", "teacher"))
    )
    expected = losses.divergence(student, teacher)
    placed = place(batch, mesh, micro_batches)
    _, measured = step(state, placed)
    rows = to_rows(placed, sharding.to_host(measured["token_divergence"]))
    for found, wanted, mask in zip(rows, expected, batch.response_mask, strict=True):
        np.testing.assert_allclose(found, wanted[mask], rtol=1e-4, atol=1e-6)


def test_micro_batches_change_nothing(single):
    whole, expected = single
    state, measured = run(BATCHES, micro_batches=4)
    chex.assert_trees_all_close(state, whole, rtol=1e-4, atol=1e-6)
    assert_same(measured, expected)


OTHER_MESHES = [
    pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((8, 1, 1), (1, 8, 1), (1, 1, 8))
]


@pytest.mark.parametrize("mesh", [(2, 2, 2), *OTHER_MESHES])
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(mesh, single):
    one, expected = single
    state, measured = run(BATCHES, mesh=mesh)
    # Only the order of float32 sums differs.
    chex.assert_trees_all_close(state, one, rtol=1e-4, atol=1e-6)
    assert_same(measured, expected)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_rematerialisation_changes_nothing(remat):
    whole, _ = run(BATCHES[:1])
    state, _ = run(BATCHES[:1], remat=remat)
    chex.assert_trees_all_close(state, whole, rtol=1e-4, atol=1e-6)


def test_teacher_starts_as_a_copy_and_moves_by_ema_rate_towards_the_student():
    _, step, state, mesh = setup(
        distillation=DistillationConfig(chunk_size=8), teacher_config=TeacherConfig(ema_rate=0.25)
    )
    chex.assert_trees_all_equal(state.student, state.teacher)
    for student, teacher in zip(*map(jax.tree.leaves, (state.student, state.teacher)), strict=True):
        assert student.unsafe_buffer_pointer() != teacher.unsafe_buffer_pointer()
    before = jax.device_get(state.teacher)
    state, measured = step(state, place(BATCHES[0], mesh))
    expected = jax.tree.map(lambda t, s: 0.75 * t + 0.25 * s, before, jax.device_get(state.student))
    chex.assert_trees_all_close(jax.device_get(state.teacher), expected, atol=1e-6)
    assert measured["teacher_student_distance"] > 0


def test_rows_are_aligned_when_the_teachers_prompt_is_padded_to_another_length():
    batch = BATCHES[0]
    wide = tuple(np.pad(x, ((0, 0), (4, 0))) for x in batch.prompts["student"])
    same = batch._replace(prompts={**batch.prompts, "teacher": wide})
    _, measured = run([same._replace(has_context=np.full(ROWS, True))])
    assert abs(measured["loss"]) < 1e-6
    assert abs(measured["information"]) < 1e-5


def test_padding_tokens_do_not_matter():
    batch = BATCHES[0]
    changed = batch._replace(
        prompts={
            view: (np.where(mask, tokens, 7), mask)
            for view, (tokens, mask) in batch.prompts.items()
        },
        responses=np.where(batch.response_mask, batch.responses, 7),
        sampler_log_probs=np.where(batch.response_mask, batch.sampler_log_probs, np.nan),
    )
    expected, _ = run([batch])
    state, measured = run([changed])
    chex.assert_trees_all_close(state, expected, rtol=1e-5, atol=1e-7)
    assert all(np.isfinite(value) for value in measured.values())


def with_rewards(batch: Examples, seed=0) -> Examples:
    rng = np.random.default_rng(seed)

    def left(width):
        tokens = rng.integers(0, 20, (ROWS, width), np.int32)
        return tokens, np.arange(width)[None, :] >= rng.integers(0, width, (ROWS, 1))

    return batch._replace(
        prompts={**batch.prompts, "right": left(PROMPT + 1), "wrong": left(PROMPT + 2)},
        group=group_statistics([[1, 0, 0, 1], [0, 1, 0, 0]]),
        has_wrong=np.repeat([True, False], SAMPLES),
    )


REWARDED = [with_rewards(batch, seed) for seed, batch in enumerate(BATCHES)]
# Everything at once: both terms, evidence, weights of questions and tokens, a mixed teacher, and a
# target that reads it without its context.
EVERYTHING = {
    "objective": ObjectiveConfig(
        distillation=0.5,
        distillation_end=0.0,
        target="demopsd",
        policy=0.5,
        advantage="contrast",
        question_weight="reward_std",
        token_weight="information",
        rehearsal=0.5,
    ),
    "teacher_config": TeacherConfig("trust_region", mix=0.25),
}


@pytest.fixture(scope="module")
def everything():
    return run(REWARDED, **EVERYTHING)


def test_a_rival_objective_does_not_depend_on_devices_or_micro_batches(everything):
    expected, measured = everything
    state, on_mesh = run(REWARDED, mesh=(2, 2, 2), micro_batches=2, **EVERYTHING)
    chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-6)
    assert_same(on_mesh, measured)


@pytest.mark.slow
def test_a_rival_objective_does_not_depend_on_packing(everything):
    expected, measured = everything
    state, in_rows = run(REWARDED, packing="always", **EVERYTHING)
    chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-6)
    assert_same(in_rows, measured)


def test_token_weights_read_the_multipliers_estimate_whatever_else_is_measured():
    """Estimates come in alphabetical order out of a scan, and `conditional_kl` is before it."""
    options = {"objective": ObjectiveConfig(token_weight="information")}
    alone, measured = run(BATCHES[:2], estimators=(), **options)
    beside, expected = run(BATCHES[:2], **options)
    assert_same(measured, {name: expected[name] for name in measured})
    chex.assert_trees_all_close(alone, beside, rtol=1e-5, atol=1e-7)


def test_rehearsal_is_a_cross_entropy_on_successes_after_the_teachers_prompt():
    graphdef, step, state, mesh = setup(objective=ObjectiveConfig(rehearsal=0.5))
    # Where both read one prompt they agree at first: all the gradient is the rehearsal's.
    prompts, prompt_mask = REWARDED[0].prompts["student"]
    batch = REWARDED[0]._replace(
        prompts=dict.fromkeys(("student", "teacher"), (prompts, prompt_mask))
    )
    arrays = jax.tree.map(jnp.asarray, batch)

    def loss(student):
        net = decoder.nnx.merge(graphdef, student)
        tokens = jnp.concatenate([prompts, arrays.responses], 1)
        mask = jnp.concatenate([prompt_mask, arrays.response_mask], 1)
        log_p = jax.nn.log_softmax(net(tokens, mask)[:, PROMPT - 1 : -1, :22])
        terms = -information.at_tokens(log_p, arrays.responses)
        successes = arrays.has_context & arrays.group.success
        return information.reduce(terms, arrays.response_mask, successes)

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.student)
    norm = 0.5 * optax.tree.norm(gradient)
    _, measured = step(state, place(batch, mesh))
    np.testing.assert_allclose(measured["loss/rehearsal"], value, rtol=1e-5)
    np.testing.assert_allclose(measured["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(measured["loss"], 0.5 * value, rtol=1e-4)


def test_grpo_is_the_policy_gradient_of_its_definition():
    objective = ObjectiveConfig(distillation=0.0, policy=1.0)
    graphdef, step, state, mesh = setup(objective=objective)
    batch = REWARDED[0]
    prompts, prompt_mask = batch.prompts["student"]
    arrays = jax.tree.map(jnp.asarray, batch)

    def loss(student):
        net = decoder.nnx.merge(graphdef, student)
        tokens = jnp.concatenate([prompts, arrays.responses], 1)
        mask = jnp.concatenate([prompt_mask, arrays.response_mask], 1)
        log_p = jax.nn.log_softmax(net(tokens, mask)[:, PROMPT - 1 : -1, :22])
        log_p = information.at_tokens(log_p, arrays.responses)
        advantages = jnp.broadcast_to(arrays.group.advantages[:, None], log_p.shape)
        terms = rivals.surrogate(log_p, arrays.sampler_log_probs, advantages)
        return losses.aggregate(terms, arrays.response_mask, jnp.ones(ROWS, bool))

    value, gradient = jax.value_and_grad(loss)(state.student)
    norm = optax.tree.norm(gradient)
    _, measured = step(state, place(batch, mesh))
    np.testing.assert_allclose(measured["loss"], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(measured["grad_norm"], norm, rtol=1e-4)


def test_grpo_skips_a_batch_in_which_every_group_has_one_reward():
    _, step, state, mesh = setup(objective=ObjectiveConfig(distillation=0.0, policy=1.0))
    same = REWARDED[0]._replace(group=group_statistics([[0.0] * SAMPLES, [1.0] * SAMPLES]))
    _, measured = step(state, place(same, mesh))
    assert measured["skipped"] == 1
    assert measured["loss"] == 0


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7])
def test_equal_fractional_rewards_are_exactly_nothing_to_learn(samples, reward):
    statistics = group_statistics([[reward] * samples] * (ROWS // samples))
    assert not statistics.advantages.any()
    _, step, state, mesh = setup(objective=ObjectiveConfig(distillation=0.0, policy=1.0))
    _, measured = step(state, place(REWARDED[0]._replace(group=statistics), mesh))
    assert (measured["skipped"], measured["update_norm"]) == (1, 0)


def test_a_coefficient_that_faded_to_0_leaves_nothing_to_learn():
    """Computed on the way down, its end would be a float near 0 and no batch be skipped."""
    faded = ObjectiveConfig(distillation=0.3, distillation_end=0.0, distillation_steps=2)
    _, step, state, mesh = setup(objective=faded)
    for done in range(4):
        state, measured = step(state, place(BATCHES[0], mesh))
        assert measured["skipped"] == (done >= 2)


def test_rehearsal_is_something_to_learn_where_nothing_else_is():
    alone = ObjectiveConfig(
        distillation=1.0, distillation_end=0.0, distillation_steps=1, rehearsal=1.0
    )
    _, step, state, mesh = setup(objective=alone)
    for _ in range(2):
        state, measured = step(state, place(REWARDED[0], mesh))
    assert measured["skipped"] == 0
    assert measured["update_norm"] > 0


def test_a_batch_without_any_context_leaves_everything_as_it_was():
    _, step, state, mesh = setup()
    state, _ = step(state, place(BATCHES[0], mesh))  # Adam has momentum now
    before = jax.device_get(state)
    state, measured = step(state, place(make_examples(has_context=False), mesh))
    after = jax.device_get(state)
    assert measured["skipped"] == 1
    assert measured["finite"] == 1
    assert after.step == before.step + 1
    chex.assert_trees_all_equal(after._replace(step=0), before._replace(step=0))


def test_a_gradient_that_is_not_finite_skips_the_update():
    _, step, state, mesh = setup()
    before = jax.device_get(state)
    broken = dict(before.teacher, norm=np.full_like(before.teacher["norm"], np.nan))
    where = jax.tree.map(lambda leaf: leaf.sharding, state.teacher)
    state = state._replace(teacher=jax.device_put(broken, where))
    state, measured = step(state, place(BATCHES[0], mesh))
    assert measured["skipped"] == 1
    assert measured["finite"] == 0
    chex.assert_trees_all_equal(jax.device_get(state.student), before.student)


def test_a_sampler_that_gave_no_number_skips_the_update():
    _, step, state, mesh = setup()
    before = jax.device_get(state)
    batch = BATCHES[0]
    broken = batch._replace(sampler_log_probs=np.full((ROWS, TIME), np.nan, np.float32))
    state, measured = step(state, place(broken, mesh))
    after = jax.device_get(state)
    assert (measured["finite"], measured["skipped"]) == (0, 1)
    chex.assert_trees_all_equal(after._replace(step=0), before._replace(step=0))


ROW = np.arange(ROWS)[:, None]


@pytest.mark.parametrize(
    ("change", "skipped"),
    [
        ({"has_context": np.full(ROWS, True)}, 0),
        ({"response_mask": np.full((ROWS, TIME), True)}, 0),
        ({"response_mask": (ROW % 2 == 0) & (np.arange(TIME) < 3)}, 0),
        ({"response_mask": np.full((ROWS, TIME), False)}, 1),
        ({"sampler_log_probs": np.full((ROWS, TIME), -np.inf, np.float32)}, 0),
    ],
    ids=[
        "all succeeded",
        "all cut off",
        "every other is empty",
        "all are empty",
        "the sampler's log-probs are infinite",
    ],
)
def test_odd_batches_give_finite_numbers(change, skipped):
    _, step, state, mesh = setup()
    state, _ = step(state, place(BATCHES[0], mesh))  # Adam has momentum now
    before = jax.device_get(state)
    batch = BATCHES[1]._replace(has_context=ROW[:, 0] < 6)._replace(**change)
    state, measured = step(state, place(batch, mesh))
    after = jax.device_get(state)
    unknown = {"sampler_mismatch"} if "sampler_log_probs" in change else set()
    measured = numbers(measured)
    finite = {name: np.isfinite(value) for name, value in measured.items() if name not in unknown}
    assert all(finite.values()), finite
    assert (measured["finite"], measured["skipped"]) == (1, skipped)
    chex.assert_tree_all_finite((after.student, after.teacher, after.opt_state))
    pairs = zip(*map(jax.tree.leaves, (after.student, before.student)), strict=True)
    moved = any(np.any(a != b) for a, b in pairs)
    assert moved != bool(skipped)


def test_alpha_scales_the_update_and_nothing_else():
    config = {"learning_rate": 1e-3}
    plain, without = run(BATCHES[:1], alpha=0.0, **config)
    scaled, measured = run(BATCHES[:1], alpha=-20.0, **config)
    assert without["multiplier"] == 1
    assert measured["multiplier"] != 1
    assert measured["loss"] == without["loss"]
    np.testing.assert_allclose(
        measured["update_norm"], without["update_norm"] * measured["multiplier"], rtol=1e-4
    )
    chex.assert_trees_all_close(plain.opt_state[1], scaled.opt_state[1])
