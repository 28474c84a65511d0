"""Contract of `scale_by_information` and its relatives, and of the wrappers around them."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgpo_jax import OptimizerConfig, make_optimizer, scale_by_information
from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.errors import InputError
from pgpo_jax.logs import read_multipliers
from pgpo_jax.methods import scale_by_relative_information, scale_by_sequence
from pgpo_jax.optimizer import information_state, init_state, learning_rate
from pgpo_jax.state import abstract_train_state, init_train_state

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
def test_alpha_zero_or_a_replay_of_ones_is_bitwise_the_chain_without_them(settings):
    if settings.get("multiplier") == "replayed":
        settings = {**settings, "replay": "ones.json"}
    config = OptimizerConfig(alpha=0.0, learning_rate=1e-2, warmup_steps=2, **settings)
    plain = OptimizerConfig(alpha=0.0, learning_rate=1e-2, warmup_steps=2)
    ours, _, _ = run(make_optimizer(config, [1.0]), 0.7)
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
        optimizer = make_optimizer(config, read_multipliers(str(path)))
        return multipliers(optimizer, [0.0] * count).tolist()

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
    with pytest.raises(InputError, match=rf"optimizer\.replay: .*{name}") as error:
        read_multipliers(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"multiplier": "relative"}, {"multiplier": "replayed"}])
def test_a_restored_optimizer_goes_on_bitwise(settings, tmp_path):
    if settings["multiplier"] == "replayed":
        settings = {**settings, "replay": "rho.json"}
    config = OptimizerConfig(1.0, learning_rate=1e-2, **settings)
    optimizer = make_optimizer(config, [0.5, 2.0, 1.0, 1.5])
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


LEAVES = {
    "Python float": 3.0,
    "Python int": 3,
    "bool": True,
    "NumPy int": np.arange(4),
    "NumPy float64": np.linspace(0, 1, 4),
    "NumPy scalar": np.float32(0.7),
    "int32": jnp.arange(4),
    "int8": jnp.arange(4, dtype=jnp.int8),
    "bfloat16": jnp.arange(4, dtype=jnp.bfloat16),
    "float16": jnp.arange(4, dtype=jnp.float16),
    "float8": jnp.arange(4).astype(jnp.float8_e4m3fn),
    "complex": jnp.array([1 + 2j]),
    "empty": jnp.zeros((0, 3)),
    "None": None,
    "masked": optax.MaskedNode(),
    "no state": optax.EmptyState(),
}


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize("jitted", [False, True])
def test_leaves_are_scaled_as_by_optax_scale(leaf, jitted):
    ours, theirs = scale_by_information(1.0, 4.0), optax.scale(1.5)
    tree = {"a": leaf, "b": jnp.ones(2)}

    def both(tree):
        state = ours.init(tree)
        scaled, _ = ours.update(tree, state, information=jnp.log(jnp.float32(1.5)))
        return scaled, theirs.update(tree, theirs.init(tree))[0]

    scaled, expected = (jax.jit(both) if jitted else both)(tree)
    assert jax.tree.structure(scaled) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (scaled, expected)), strict=True):
        assert a.dtype == jnp.result_type(b)
        wide = [np.asarray(jnp.asarray(x).astype(jnp.complex64)) for x in (a, b)]
        np.testing.assert_allclose(*wide, rtol=1e-6)


TRANSFORMS = [scale_by_information, scale_by_relative_information]


@pytest.mark.parametrize("make", TRANSFORMS)
@pytest.mark.parametrize(
    "information",
    [None, 0.5j, jnp.complex64(1), np.complex128(0)],
    ids=["None", "0.5j", "c64", "0j"],
)
def test_no_information_and_a_complex_one_are_type_errors_that_name_it(make, information):
    transform = make(1.0)
    with pytest.raises(TypeError, match=r"information: got .*; must be a real scalar"):
        transform.update(GRADS, transform.init(PARAMS), information=information)


@pytest.mark.parametrize("make", TRANSFORMS)
@pytest.mark.parametrize(
    "settings, error, match",
    [
        (
            {"rho_max": 0.5, "rho_min": 1.0},
            ValueError,
            "rho_max: got 0.5; must be at least rho_min",
        ),
        ({"rho_max": np.nan}, ValueError, "rho_max: got nan"),
        ({"rho_max": -1.0, "rho_min": -2.0}, ValueError, r"rho_max: got -1.0; .* not negative"),
        ({"rho_max": jnp.float32(0.5), "rho_min": 1}, ValueError, "rho_max"),
        ({"rho_min": jnp.ones(2)}, ValueError, r"rho_min: got shape \(2,\)"),
        ({"alpha": jnp.ones(8)}, ValueError, r"alpha: got shape \(8,\); must be a scalar"),
        ({"alpha": [1.0]}, ValueError, r"alpha: got shape \(1,\)"),
        ({"alpha": None}, TypeError, "alpha: got None"),
        ({"alpha": 1j}, TypeError, "alpha"),
        ({"rho_max": None}, TypeError, "rho_max: got None"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_settings_without_a_meaning_are_refused_when_the_transformation_is_made(
    make, settings, error, match
):
    with pytest.raises(error, match=match):
        make(**{"alpha": 1.0, **settings})


def test_a_schedule_that_gives_no_scalar_is_refused():
    transform = scale_by_information(lambda count: jnp.ones(3) * count)
    with pytest.raises(ValueError, match=r"alpha: got shape \(3,\)"):
        transform.update(GRADS, transform.init(PARAMS), information=0.1)


def test_settings_that_are_traced_are_refused_by_their_shape_and_else_the_upper_bound_holds():
    def multiplier(alpha, rho_max, rho_min):
        transform = scale_by_information(alpha, rho_max, rho_min)
        return transform.update(GRADS, transform.init(PARAMS), information=0.0)[1].multiplier

    with pytest.raises(ValueError, match=r"alpha: got shape \(2,\)"):
        jax.jit(multiplier)(jnp.ones(2), 2.0, 0.0)
    assert jax.jit(multiplier)(1.0, 0.5, 3.0) == 0.5
    with pytest.raises(ValueError, match=r"alpha: got shape \(2,\)"):
        optax.inject_hyperparams(scale_by_information)(alpha=jnp.ones(2)).init(PARAMS)


@pytest.mark.parametrize("make", TRANSFORMS)
@pytest.mark.parametrize("mapped", ["pmap", "shard_map"])
def test_an_axis_name_makes_one_multiplier_of_the_information_of_all_devices(make, mapped):
    informations = jnp.linspace(-0.5, 0.3, 8)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def multipliers(axis_name):
        optimizer = make(1.0, 4.0, axis_name=axis_name)

        def step(information):
            state = optimizer.init(GRADS)
            for _ in range(2):  # the relative one's first is always 1
                scale = information.reshape(()) * (
                    1 + state[0].count if make is not TRANSFORMS[0] else 1
                )
                _, state = optimizer.update(GRADS, state, information=scale)
            return information_state(state).multiplier[None]

        if mapped == "pmap":
            return np.ravel(jax.pmap(step, axis_name="d")(informations))
        spec = PartitionSpec("d")
        return np.asarray(
            jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)(informations)
        )

    assert len(set(multipliers(None).tolist())) == 8  # what the docstring warns of
    together = multipliers("d")
    assert len(set(together.tolist())) == 1
    if make is scale_by_information:
        np.testing.assert_allclose(together, np.exp(informations.mean()), rtol=1e-6)


def test_lookahead_takes_the_information_that_is_bound_inside_the_step():
    chain = optax.chain(optax.sgd(0.1), scale_by_information(1.0))

    def lookahead(information):
        update = functools.partial(chain.update, information=information)
        return optax.lookahead(optax.GradientTransformation(chain.init, update), 2, 0.5)

    params = optax.LookaheadParams.init_synced({"w": jnp.ones(2)})
    state = lookahead(0.0).init(params)

    @jax.jit
    def step(params, state, information):
        updates, state = lookahead(information).update({"w": jnp.ones(2)}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(params, state, jnp.log(1.5))
    # Two steps of 0.15, then half way back to where the slow parameters were.
    np.testing.assert_allclose(params.slow["w"], 1 - 0.15, rtol=1e-6)
    np.testing.assert_allclose(params.fast["w"], 1 - 0.15, rtol=1e-6)


def test_multi_steps_passes_on_the_last_information_only():
    optimizer = optax.MultiSteps(optax.chain(optax.sgd(1.0), scale_by_information(1.0)), 2)
    state = optimizer.init(GRADS)
    for information in (9.0, np.log(1.5)):
        _, state = optimizer.update(GRADS, state, GRADS, information=information)
    np.testing.assert_allclose(information_state(state).multiplier, 1.5, rtol=1e-6)


def test_apply_if_finite_does_not_see_a_nan_information():
    optimizer = optax.apply_if_finite(optax.chain(optax.sgd(0.1), scale_by_information(1.0)), 5)
    _, state, updates = run(optimizer, jnp.nan, steps=1)
    assert state.total_notfinite == 0
    assert jnp.isnan(updates["a"]).all()


def test_inside_schedule_free_the_multiplier_scales_the_step_of_its_sequence():
    def steps(rate, alpha, information):
        base = optax.chain(optax.sgd(rate), scale_by_information(alpha, 4.0))
        optimizer = optax.contrib.schedule_free(base, learning_rate=0.1)
        return run(optimizer, information, {"w": jnp.ones(2)}, {"w": jnp.ones(2)})[0]

    chex.assert_trees_all_close(steps(0.1, 1.0, np.log(2.0)), steps(0.2, 0.0, 0.0), rtol=1e-6)


def test_the_relative_multiplier_respects_its_bounds_where_rho_leaps():
    transform = scale_by_relative_information(1.0, rho_max=2.0, rho_min=0.25, decay=0.9)
    # Over its mean alone rho would be 4.7 after the leap up and 0.14 after the one down.
    leaps = [-9.0] * 20 + [9.0] * 20 + [-9.0]
    seen = multipliers(transform, leaps)
    assert seen.max() == seen[20] == 2.0
    assert seen.min() == seen[40] == 0.25


@pytest.mark.parametrize("bad", [np.nan, [np.nan, np.nan]])
@pytest.mark.parametrize("first", [True, False])
def test_a_nan_does_not_end_the_relative_modulation(bad, first):
    bad = np.atleast_1d(bad).tolist()
    before, after = ([], [0.1, 0.4]) if first else ([0.1, 0.4], [0.2, 0.1])
    seen = multipliers(scale_by_relative_information(1.0), before + bad + after)
    assert np.isnan(seen[len(before) : len(before) + len(bad)]).all()
    assert np.isfinite(seen[-2:]).all()
    assert seen[-1] != 1
    np.testing.assert_allclose(seen[-1], 1, atol=0.3)


@pytest.mark.parametrize("bad", [[], [-1.0], [np.inf], [np.nan], [[1.0]]])
@pytest.mark.usefixtures("unchecked")
def test_a_sequence_that_holds_no_multipliers_is_refused(bad):
    with pytest.raises(ValueError, match="multipliers: got"):
        scale_by_sequence(bad)


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
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(InputError, match=r"optimizer\.\w+: got .*; must be"):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_the_multiplier_scales_the_whole_update_of_every_optimizer(name, moments_dtype):
    settings = {"warmup_steps": 0, "weight_decay": 0.5, "learning_rate": 0.1}
    config = OptimizerConfig(alpha=1.0, name=name, moments_dtype=moments_dtype, **settings)
    optimizer = make_optimizer(config)
    params, grads = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.3, 0.1])}
    state = optimizer.init(params)
    once, _ = optimizer.update(grads, state, params, information=0.0)
    more, after = optimizer.update(grads, state, params, information=jnp.log(1.5))
    np.testing.assert_allclose(more["w"], 1.5 * once["w"], rtol=1e-6)
    # Decoupled decay: the update moves towards 0 by it, whatever the gradient.
    decay, _ = optimizer.update({"w": jnp.zeros(2)}, state, params, information=0.0)
    np.testing.assert_allclose(decay["w"], -0.1 * 0.5 * params["w"], rtol=1e-5)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(after) if leaf.shape == (2,)}
    assert moments_dtype in kinds
    assert information_state(after).count == 1


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("linear", [0, 0.5, 1, 0.55, 0.1, 0.1]), ("cosine", [0, 0.5, 1, 0.55, 0.1, 0.1])],
)
def test_a_schedule_falls_from_the_peak_to_its_end_and_stays(schedule, rates):
    config = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=2,
        schedule=schedule,
        learning_rate_end=0.1,
        decay_steps=4,
    )
    found = [float(learning_rate(config)(step)) for step in (0, 1, 2, 4, 6, 99)]
    np.testing.assert_allclose(found, rates, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"schedule": "cosine"}, r"optimizer\.decay_steps: got None"),
        ({"decay_steps": 5}, r"optimizer\.decay_steps: got 5"),
        ({"learning_rate_end": 1.0}, r"optimizer\.learning_rate_end: got 1\.0"),
    ],
)
def test_a_schedule_that_has_no_meaning_is_refused(settings, line):
    with pytest.raises(InputError, match=line):
        OptimizerConfig(**settings)


def stacked(seed=0):
    """Parameters as the decoder has them: projections `[layer, ...]`, and others."""
    shapes = {
        "embed_tokens": (12, 8),
        "layers": {
            "q_proj": (2, 8, 2, 4),
            "o_proj": (2, 2, 4, 8),
            "up_proj": (2, 8, 16),
            "q_norm": (2, 4),
        },
        "norm": (8,),
    }
    rng = np.random.default_rng(seed)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


MUON = OptimizerConfig(
    0.0, name="muon", learning_rate=0.1, warmup_steps=0, weight_decay=0.5, max_grad_norm=None
)


def test_muon_orthogonalizes_every_layers_matrix_by_itself_and_leaves_the_rest_to_adamw():
    params, grads = jax.tree.map(np.asarray, (stacked(0), stacked(1)))
    shapes = {"q_proj": (8, 8), "o_proj": (8, 8), "up_proj": (8, 16)}

    def singles(tree):
        layers = tree["layers"]
        return {
            f"{name} {i}": layers[name][i].reshape(shapes[name]) for name in shapes for i in (0, 1)
        }

    @functools.partial(jax.jit, static_argnums=0)
    def first(optimizer, grads, params):
        return optimizer.update(grads, optimizer.init(params), params, information=0.0)[0]

    updates = jax.device_get(first(make_optimizer(MUON), grads, params))
    single = optax.contrib.muon(0.1, beta=0.9, weight_decay=0.5, consistent_rms=0.2)
    single = optax.with_extra_args_support(single)
    expected = first(single, singles(grads), singles(params))
    for name, found in singles(updates).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
        # Of AdamW's usual size: singular values are about 1, so the mean square about 0.2**2.
        undecayed = found / 0.1 + 0.5 * singles(params)[name]
        assert 0.1 < np.sqrt(np.mean(undecayed**2)) < 0.25
    plain = first(make_optimizer(dataclasses.replace(MUON, name="adamw")), grads, params)
    for one, other in ((updates, plain), (updates["layers"], plain["layers"])):
        for name in one.keys() & {"embed_tokens", "norm", "q_norm"}:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6, err_msg=name)


MUON_16 = dataclasses.replace(MUON, moments_dtype="bfloat16")


def spread(tree):
    """A tree as `stacked`, on eight devices."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    specs = {"o_proj": (None, None, None, "fsdp"), "norm": ("fsdp",), "q_norm": ()}

    def place(path, p):
        spec = PartitionSpec(*specs.get(path[-1].key, (None, "fsdp")))
        return jax.device_put(p, NamedSharding(mesh, spec))

    return jax.tree.map_with_path(place, tree)


def test_muon_has_one_moment_of_a_matrix_and_it_lives_where_the_parameter_does():
    params = spread(stacked())
    state = init_state(make_optimizer(MUON_16), params)
    moments = {
        path[-1].key: leaf for path, leaf in jax.tree.leaves_with_path(state) if leaf.ndim > 2
    }
    assert moments.keys() == {"q_proj", "o_proj", "up_proj"}
    for name, moment in moments.items():
        assert moment.sharding == params["layers"][name].sharding
        assert moment.dtype == jnp.bfloat16


@pytest.mark.slow
def test_muon_on_eight_devices_is_muon_on_one():
    params, grads, optimizer = stacked(0), stacked(1), make_optimizer(MUON_16)
    step = jax.jit(functools.partial(optimizer.update, information=0.5))
    on_mesh, _ = step(spread(grads), init_state(optimizer, spread(params)), spread(params))
    alone, _ = step(grads, optimizer.init(params), params)
    chex.assert_trees_all_close(
        jax.device_get(on_mesh), jax.device_get(alone), rtol=1e-4, atol=1e-5
    )


def test_muon_without_a_projection_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.name: got muon; no parameter is a projec"):
        make_optimizer(MUON).init({"w": jnp.ones((2, 2))})
