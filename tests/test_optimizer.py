"""Contract of `scale_by_information` and its relatives, and of the wrappers around them."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgpo_jax import OptimizerConfig, make_optimizer, scale_by_information
from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.errors import InputError
from pgpo_jax.optimizer import (
    information_state,
    learning_rate,
    read_multipliers,
    scale_by_relative_information,
    scale_by_sequence,
)
from pgpo_jax.step import abstract_train_state, init_train_state

PARAMS = {"a": jnp.linspace(-1.0, 1.0, 8), "b": {"c": jnp.ones((2, 3), jnp.bfloat16)}}
GRADS = jax.tree.map(lambda p: (p * 3 + 0.5).astype(p.dtype), PARAMS)


def run(optimizer, information, params=PARAMS, grads=GRADS, steps=3):
    """`steps` jitted updates; returns parameters, state and the last updates."""

    @jax.jit
    def step(params, state, information):
        updates, state = optimizer.update(grads, state, params, information=information)
        return optax.apply_updates(params, updates), state, updates

    state, updates = jax.jit(optimizer.init)(params), None
    for _ in range(steps):
        params, state, updates = step(params, state, information)
    assert step._cache_size() == 1
    return params, state, updates


@given(
    alpha=st.floats(-3, 3),
    information=st.floats(-5, 5),
    bounds=st.tuples(st.floats(0, 4), st.floats(0.01, 4)).map(sorted),
)
def test_multiplier_is_the_clipped_exponential(alpha, information, bounds):
    rho_min, rho_max = bounds
    transform = scale_by_information(alpha, rho_max, rho_min)
    updates, state = transform.update(
        {"w": jnp.array([2.0])}, transform.init({}), information=information
    )
    expected = np.clip(np.exp(np.float32(alpha) * np.float32(information)), rho_min, rho_max)
    np.testing.assert_allclose(state.multiplier, expected, rtol=1e-5)
    np.testing.assert_allclose(updates["w"], 2.0 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    "information, expected", [(np.inf, 2.0), (-np.inf, 0.25), (1e30, 2.0), (0.0, 1.0)]
)
def test_infinite_information_gives_the_bound(information, expected):
    _, state, _ = run(scale_by_information(1.0, 2.0, 0.25), information)
    assert state.multiplier == expected


def test_nan_information_propagates_into_every_update():
    _, state, updates = run(scale_by_information(1.0), jnp.nan)
    assert jnp.isnan(state.multiplier)
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("information", [0.7, np.inf, np.nan])
def test_alpha_zero_is_bitwise_the_chain_without_it(information):
    config = OptimizerConfig(alpha=0.0, learning_rate=1e-2, warmup_steps=2)
    without = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate(config), weight_decay=0.01)
    )
    ours, _, _ = run(make_optimizer(config), information)
    theirs, _, _ = run(optax.with_extra_args_support(without), information)
    chex.assert_trees_all_equal(ours, theirs)


def test_dtypes_and_structure_are_kept():
    _, _, updates = run(scale_by_information(1.0), 0.3)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, GRADS)


def test_bfloat16_updates_are_scaled_in_float32():
    transform = scale_by_information(1.0)
    rho = 1.00390625  # between two bfloat16 numbers
    updates, _ = transform.update(
        jnp.array([129.0], jnp.bfloat16), transform.init(None), information=np.log(rho)
    )
    assert updates[0] == jnp.bfloat16(129.0 * rho)


def test_missing_information_is_a_type_error_that_names_it():
    optimizer = optax.chain(optax.sgd(0.1), scale_by_information(1.0))
    with pytest.raises(TypeError, match="information"):
        optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)


def test_information_per_token_is_refused():
    transform = scale_by_information(1.0)
    with pytest.raises(ValueError, match=r"\(8,\); must be a scalar"):
        transform.update(PARAMS, transform.init(PARAMS), information=jnp.ones(8))


def test_other_extra_arguments_are_ignored():
    transform = scale_by_information(1.0)
    updates, _ = transform.update(GRADS, transform.init(PARAMS), information=0.0, value=3.0, step=1)
    chex.assert_trees_all_equal(updates, GRADS)


def test_alpha_may_be_a_schedule_of_the_update_count():
    transform = scale_by_information(optax.linear_schedule(0.0, 2.0, 2))
    state = transform.init(PARAMS)
    seen = []
    for _ in range(3):
        _, state = transform.update(GRADS, state, information=0.25)
        seen.append(float(state.multiplier))
    np.testing.assert_allclose(seen, np.exp([0.0, 0.25, 0.5]), rtol=1e-6)
    assert state.count == 3


def multipliers(optimizer, informations):
    """The multiplier of each of a row of jitted updates."""
    step = jax.jit(lambda state, i: optimizer.update(GRADS, state, PARAMS, information=i)[1])
    state, seen = jax.jit(optimizer.init)(PARAMS), []
    for information in informations:
        state = step(state, information)
        seen.append(float(information_state(state).multiplier))
    assert step._cache_size() == 1
    return np.array(seen)


def test_alpha_goes_linearly_to_its_end_and_stays_there():
    config = OptimizerConfig(2.0, alpha_schedule="linear", alpha_end=-1.0, alpha_steps=3)
    seen = multipliers(make_optimizer(config), [0.2] * 5)
    np.testing.assert_allclose(seen, np.exp(0.2 * np.array([2, 1, 0, -1, -1])), rtol=1e-6)


def test_the_relative_multiplier_is_rho_over_its_bias_corrected_mean():
    transform = scale_by_relative_information(1.0, rho_max=4.0, decay=0.5)
    rho = np.array([2.0, 4.0, 1.0])
    mean = np.array([2.0, (2 + 2 * 4) / 3, (2 + 2 * 4 + 4 * 1) / 7])  # weights 1, 2, 4
    seen = multipliers(transform, np.log([2.0, 9.0, 1.0]))  # 9 is cut to 4
    np.testing.assert_allclose(seen, rho / mean, rtol=1e-6)
    updates, _ = transform.update(GRADS, transform.init(PARAMS), information=0.7)
    chex.assert_trees_all_equal(updates, GRADS)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("information", [0.7, -0.3, np.inf])
def test_a_constant_information_leaves_the_relative_step_exactly_alone(decay, information):
    transform = scale_by_relative_information(1.5, decay=decay)
    assert (multipliers(transform, [information] * 30) == 1.0).all()


def test_the_relative_multiplier_keeps_a_mean_of_1_where_rho_wanders():
    noise = np.random.default_rng(0).normal(0.3, 0.15, 400)
    seen = multipliers(scale_by_relative_information(1.0, decay=0.95), noise)
    assert abs(seen.mean() - 1.0) < 0.01
    assert 0.1 < seen.std() < 0.2
    assert multipliers(scale_by_information(1.0), noise).mean() > 1.3


@pytest.mark.parametrize("informations", [[-np.inf, -np.inf], [0.0, np.nan]])
def test_no_mean_gives_a_multiplier_of_1_and_nan_stays_nan(informations):
    last = multipliers(scale_by_relative_information(1.0), informations)[-1]
    assert np.isnan(last) if np.isnan(informations[-1]) else last == 1.0


@pytest.mark.parametrize("wrong", [{}, {"information": jnp.ones(8)}])
def test_the_relative_multiplier_has_the_errors_of_the_other(wrong):
    transform = scale_by_relative_information(1.0)
    with pytest.raises((TypeError, ValueError), match="information"):
        transform.update(PARAMS, transform.init(PARAMS), **wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_schedule": "linear", "alpha_end": 0.0},
        {"multiplier": "relative"},
        {"multiplier": "replayed"},
    ],
    ids=str,
)
def test_alpha_zero_or_a_replay_of_ones_is_bitwise_the_chain_without_them(settings, tmp_path):
    if settings.get("multiplier") == "replayed":
        (tmp_path / "ones.json").write_text("[1.0]")
        settings = {**settings, "replay": str(tmp_path / "ones.json")}
    config = OptimizerConfig(alpha=0.0, learning_rate=1e-2, warmup_steps=2, **settings)
    plain = OptimizerConfig(alpha=0.0, learning_rate=1e-2, warmup_steps=2)
    ours, _, _ = run(make_optimizer(config), 0.7)
    theirs, _, _ = run(make_optimizer(plain), 0.7)
    chex.assert_trees_all_equal(ours, theirs)


def test_a_sequence_is_applied_in_order_whatever_the_information_and_begins_again():
    seen = multipliers(scale_by_sequence([0.5, 2.0, 1.0]), [9.0, np.nan, -9.0, 0.0])
    assert seen.tolist() == [0.5, 2.0, 1.0, 0.5]


def test_replay_reads_the_multipliers_of_a_runs_updates_and_shuffles_them_by_its_seed(tmp_path):
    rows = [{"step": 0, "eval/avg@16": 0.2}]
    rows += [{"step": k, "multiplier": 1 + k / 8, "skipped": float(k == 3)} for k in range(1, 7)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [1.125, 1.25, 1.5, 1.625, 1.75]  # the skipped update changed nothing
    assert read_multipliers(str(path)) == expected

    def replayed(seed, count=5):
        config = OptimizerConfig(multiplier="replayed", replay=str(path), replay_seed=seed)
        return multipliers(make_optimizer(config), [0.0] * count).tolist()

    assert replayed(None, 7) == [*expected, 1.125, 1.25]
    assert replayed(0) == replayed(0)
    assert sorted(replayed(0)) == expected
    assert replayed(0) != expected
    assert replayed(1) != replayed(0)


@pytest.mark.parametrize(
    "name, text",
    [
        ("none.json", None),
        ("broken.json", "[1, "),
        ("empty.json", "[]"),
        ("object.json", '{"multiplier": 1}'),
        ("text.json", '["1"]'),
        ("negative.json", "[-1]"),
        ("infinite.json", "[Infinity]"),
        ("no_update.jsonl", '{"step": 0}\n'),
        ("lists.jsonl", "[1]\n"),
        ("null.jsonl", '{"step": 1, "skipped": 0.0, "multiplier": null}\n'),
        ("other.jsonl", '{"step": 1, "skipped": 0.0}\n'),
    ],
)
def test_a_replay_that_cannot_be_is_one_line(name, text, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    config = OptimizerConfig(multiplier="replayed", replay=str(tmp_path / name))
    with pytest.raises(InputError, match=rf"optimizer\.replay: .*{name}") as error:
        make_optimizer(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"multiplier": "relative"}, {"multiplier": "replayed"}])
def test_a_restored_optimizer_goes_on_bitwise(settings, tmp_path):
    if settings["multiplier"] == "replayed":
        (tmp_path / "rho.json").write_text("[0.5, 2.0, 1.0, 1.5]")
        settings = {**settings, "replay": str(tmp_path / "rho.json")}
    optimizer = make_optimizer(OptimizerConfig(1.0, learning_rate=1e-2, **settings))
    one = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    params = jax.device_put({"w": jnp.linspace(-1.0, 1.0, 8)}, NamedSharding(one, PartitionSpec()))

    @jax.jit
    def step(state, information):
        updates, opt_state = optimizer.update(
            state.student, state.opt_state, state.student, information=information
        )
        return state._replace(
            student=optax.apply_updates(state.student, updates), opt_state=opt_state
        )

    state = step(step(init_train_state(params, optimizer), 0.3), 0.1)
    with Checkpoints(str(tmp_path / "run")) as checkpoints:
        checkpoints.save(2, state)
        restored, _ = checkpoints.restore(abstract_train_state(params, optimizer))
    chex.assert_trees_all_equal(step(restored, 0.2), step(state, 0.2))
    assert information_state(restored.opt_state).count == 2


def test_masked_scales_only_what_the_mask_selects():
    mask = {"a": True, "b": {"c": False}}
    _, _, updates = run(optax.masked(scale_by_information(1.0, 2.0), mask), np.log(2.0))
    chex.assert_trees_all_close(updates["a"], 2 * GRADS["a"])
    chex.assert_trees_all_equal(updates["b"], GRADS["b"])


@pytest.mark.parametrize("name", ["multi_transform", "partition"])
def test_partitions_give_each_label_its_own_multiplier(name):
    optimizer = getattr(optax, name)(
        {"fast": scale_by_information(2.0, 4.0), "plain": scale_by_information(0.0)},
        {"a": "fast", "b": {"c": "plain"}},
    )
    _, _, updates = run(optimizer, np.log(1.5))
    np.testing.assert_allclose(updates["a"], 2.25 * GRADS["a"], rtol=1e-6)
    chex.assert_trees_all_equal(updates["b"], GRADS["b"])


def test_inject_hyperparams_exposes_alpha_and_bounds_under_jit():
    optimizer = optax.inject_hyperparams(scale_by_information)(alpha=1.0, rho_max=1.25)
    state = optimizer.init(PARAMS)

    @jax.jit
    def step(state):
        return optimizer.update(GRADS, state, PARAMS, information=jnp.log(2.0))[1]

    state = step(step(state))
    assert state.inner_state.multiplier == 1.25
    compiled = step._cache_size()
    state.hyperparams["rho_max"] = jnp.float32(8.0)
    state.hyperparams["alpha"] = jnp.float32(2.0)
    np.testing.assert_allclose(step(state).inner_state.multiplier, 4.0, rtol=1e-6)
    assert step._cache_size() == compiled


def test_apply_if_finite_skips_bad_gradients_and_passes_information_on():
    optimizer = optax.apply_if_finite(optax.chain(optax.sgd(0.1), scale_by_information(1.0)), 5)
    broken = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    params, state, _ = run(optimizer, 0.5, grads=broken)
    chex.assert_trees_all_equal(params, PARAMS)
    assert state.total_notfinite == 3
    _, state, updates = run(optimizer, np.log(1.5))
    np.testing.assert_allclose(updates["a"], -0.15 * GRADS["a"], rtol=1e-6)
    assert state.inner_state[-1].count == 3


def test_nnx_optimizer_passes_information_through():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    before = model.kernel[...]
    optimizer = nnx.Optimizer(
        model, optax.chain(optax.sgd(1.0), scale_by_information(1.0)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, information):
        grads = nnx.grad(lambda m: jnp.sum(m.kernel[...]))(model)
        optimizer.update(model, grads, information=information)

    step(model, optimizer, jnp.log(1.5))
    np.testing.assert_allclose(model.kernel[...], before - 1.5, rtol=1e-5)


def test_sharded_and_donated_updates_equal_the_plain_ones():
    optimizer = make_optimizer(OptimizerConfig(alpha=1.0, learning_rate=1e-2, warmup_steps=0))
    start = {"w": np.arange(64, dtype=np.float32).reshape(8, 8) / 64}

    def descend(params, **jit_options):
        def step(params, state):
            updates, state = optimizer.update(params, state, params, information=0.4)
            return optax.apply_updates(params, updates), state

        step, state = jax.jit(step, **jit_options), jax.jit(optimizer.init)(params)
        for _ in range(3):
            params, state = step(params, state)
        return params

    split = NamedSharding(
        jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,)), PartitionSpec("fsdp")
    )
    sharded = descend(jax.device_put(start, split), donate_argnums=(0, 1))
    assert sharded["w"].sharding.spec == split.spec
    chex.assert_trees_all_close(sharded, descend(jax.device_put(start)), rtol=1e-6)


def test_before_adam_it_does_nothing_and_after_adam_it_scales_the_step():
    before = optax.chain(scale_by_information(1.0), optax.scale_by_adam())
    after = optax.chain(optax.scale_by_adam(), scale_by_information(1.0))
    params = {"w": jnp.array([1.0, -2.0])}
    plain = run(optax.with_extra_args_support(optax.scale_by_adam()), 0.5, params, params)[2]
    chex.assert_trees_all_close(run(before, 0.5, params, params)[2], plain, rtol=1e-4)
    expected = jax.tree.map(lambda u: u * np.exp(0.5), plain)
    chex.assert_trees_all_close(run(after, 0.5, params, params)[2], expected, rtol=1e-6)


def test_weight_decay_is_scaled_with_the_update():
    config = OptimizerConfig(alpha=1.0, learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    params = {"w": jnp.array([2.0])}
    zero = {"w": jnp.array([0.0])}
    updates = run(make_optimizer(config), np.log(2.0), params, zero, steps=1)[2]
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 2.0 * 2.0, rtol=1e-6)


def test_first_update_of_the_warm_up_is_zero_and_the_multiplier_can_be_read():
    optimizer = make_optimizer(OptimizerConfig(alpha=1.0, learning_rate=1e-2, warmup_steps=10))
    params, state, _ = run(optimizer, 0.2, steps=1)
    chex.assert_trees_all_equal(params, PARAMS)
    np.testing.assert_allclose(information_state(state).multiplier, np.exp(0.2), rtol=1e-6)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rho_max", 0.0),
        ("rho_min", -1.0),
        ("rho_min", 3.0),
        ("learning_rate", 0.0),
        ("alpha", float("nan")),
        ("alpha_end", float("inf")),
        ("alpha_steps", 0),
        ("alpha_schedule", "cosine"),
        ("multiplier", "adaptive"),
        ("multiplier", "replayed"),
        ("replay", "metrics.jsonl"),
        ("replay_seed", -1),
        ("mean_decay", 1.0),
    ],
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(InputError, match=r"optimizer\.\w+: got .*; must be"):
        OptimizerConfig(**{field: value})
