"""The decoder: the cache equals the plain forward, padding is inert, layouts do not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpo_jax import sharding
from pgpo_jax.errors import InputError
from pgpo_jax.models import attention, decoder, rope

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "llama": {},
    "olmo2": {},
    "olmo3": {
        "sliding_window": 3,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "mistral": {"sliding_window": 3},
    "ministral": {
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 4},
    "gemma3_text": {
        "num_hidden_layers": 4,
        "sliding_window": 3,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 5,
        "rope_local_base_freq": 300.0,
    },
    "granite": {
        "embedding_multiplier": 3,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 2,
    },
}
# Gemma 3 has most of what the layers of these have; the others repeat a test with less.
RARE = ("mistral", "ministral", "smollm3", "granite")
REPEATED = [pytest.param(name, marks=pytest.mark.slow) for name in ("smollm3", "granite")]
TOLERANCE = 1e-5  # float32, hidden states of magnitude 3; sums are ordered differently
EXACT = decoder.Options(dtype=jnp.float32)


def config_of(family: str, **changes) -> decoder.ModelConfig:
    return decoder.ModelConfig.from_hf(
        {**TINY, **FAMILIES[family], "model_type": family, **changes}
    )


@functools.cache
def example(family: str, options: decoder.Options = EXACT):
    """A model whose every parameter is random, norms and biases too."""
    config = config_of(family)
    rng = np.random.default_rng(0)

    def value(path, leaf):
        around = 1.0 if "norm" in str(path[-1]) else 0.0
        return jnp.asarray(around + 0.2 * rng.standard_normal(leaf.shape, np.float32))

    params = jax.tree.map_with_path(value, decoder.param_shapes(config))
    return decoder.make_graphdef(config, options), params


@functools.cache
def forward(family: str, options: decoder.Options = EXACT):
    """Jitted hidden states of `example`."""
    graphdef, params = example(family, options)
    jitted = jax.jit(lambda p, t, m: nnx.merge(graphdef, p).hidden(t, m))
    return functools.partial(jitted, params)


def ragged(rows=3, time=12):
    """Left-padded rows of different lengths: tokens, mask and positions."""
    tokens = np.random.default_rng(1).integers(0, TINY["vocab_size"], (rows, time))
    mask = np.arange(time)[None, :] >= 3 * np.arange(rows)[:, None]
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)
    return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(positions)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, EXACT) for family in FAMILIES if family not in RARE),
        *(pytest.param(family, EXACT, marks=pytest.mark.slow) for family in RARE),
        ("olmo3", dataclasses.replace(EXACT, unroll=True)),
    ],
)
def test_cached_extension_equals_the_plain_forward_token_by_token(family, options):
    graphdef, params = example(family, options)
    tokens, mask, positions = ragged(rows=5)  # the last but one begins late, the last never
    expected = forward(family, EXACT)(tokens, mask)

    @jax.jit
    def extend(params, tokens, positions, cache, column):
        return nnx.merge(graphdef, params).extend(tokens, positions, cache, column)

    prompt = 7
    cache = nnx.merge(graphdef, params).init_cache(tokens.shape[0], 16)
    part, cache = extend(params, tokens[:, :prompt], positions[:, :prompt], cache, 0)
    parts = [part]
    # Columns come in no particular order: the cache goes by positions.
    for time, column in zip(range(prompt, tokens.shape[1]), (15, 9, 7, 12, 8), strict=True):
        now = slice(time, time + 1)
        part, cache = extend(params, tokens[:, now], positions[:, now], cache, column)
        parts.append(part)
    got = np.concatenate(parts, axis=1)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[mask], expected[mask], atol=TOLERANCE)
    assert extend._cache_size() == 2  # the prompt and the step


@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
def test_padding_may_stand_anywhere_and_does_not_matter(family):
    masks = np.zeros((3, 12), bool)
    masks[0, :8] = masks[1, 4:] = True
    masks[2, [0, 1, 4, 5, 6, 8, 10, 11]] = True
    tokens = np.full((3, 12), 7)
    for row, mask in zip(tokens, masks, strict=True):
        row[mask] = np.arange(20, 28)
    plain, *others = np.asarray(forward(family)(jnp.asarray(tokens), jnp.asarray(masks)))
    for row, mask in zip(others, masks[1:], strict=True):
        np.testing.assert_allclose(row[mask], plain[:8], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["gemma3_text", *REPEATED])
def test_sequences_that_share_a_row_are_as_they_are_alone(family):
    tokens, mask, _ = ragged()
    alone = np.asarray(forward(family)(tokens, mask))
    graphdef, params = example(family)
    lengths = np.asarray(mask).sum(1)
    row = np.concatenate([np.asarray(tokens)[i, -n:] for i, n in enumerate(lengths)])
    segments, positions = (
        np.repeat([1, 2, 3], lengths),
        np.concatenate(list(map(np.arange, lengths))),
    )
    packed = jax.jit(lambda p, *rows: nnx.merge(graphdef, p).packed_hidden(*rows))
    found = packed(params, *(jnp.asarray(x[None]) for x in (row, segments, positions)))[0]
    np.testing.assert_allclose(found, alone[np.asarray(mask)], atol=TOLERANCE)


@functools.cache
def gradients(options: decoder.Options):
    """Of `example("olmo3")`, one row only padding; and again with other tokens at the padding."""
    graphdef, params = example("olmo3", options)
    tokens, mask, _ = ragged()
    mask = mask.at[1].set(False)

    @jax.jit
    def gradient(params, tokens):
        def loss(params):
            logits = nnx.merge(graphdef, params)(tokens, mask)
            return jnp.sum(jnp.where(mask[:, :, None], logits, 0) ** 2) / 1000, logits

        return jax.grad(loss, has_aux=True)(params)

    grads, logits = gradient(params, tokens)
    return grads, gradient(params, jnp.where(mask, tokens, 5))[0], logits


def test_rows_of_padding_alone_are_finite_and_give_no_gradient():
    grads, others, logits = gradients(EXACT)
    assert np.isfinite(logits).all()
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a).max() > 0
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "change",
    [{"remat": "full"}, {"remat": "dots"}, {"remat": "full", "unroll": True}],
)
def test_options_do_not_change_the_gradient(change):
    changed = gradients(dataclasses.replace(EXACT, **change))[0]
    for a, b in zip(*map(jax.tree.leaves, (gradients(EXACT)[0], changed)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_long_prefill_is_worked_through_in_parts_with_the_same_result(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(k, (3, 12, heads, 8)) for k, heads in zip(keys, (4, 2, 2), strict=True)
    )
    _, _, positions = ragged()
    visible = positions[:, None, :] <= positions[:, :, None]
    whole = jax.jit(attention.attend_cached)(query, key, value, visible)
    monkeypatch.setattr(attention, "QUERIES", 4)
    parts = jax.jit(lambda *args: attention.attend_cached(*args))(query, key, value, visible)
    np.testing.assert_allclose(whole, parts, atol=1e-6)


@functools.cache
def trained(shape, family="qwen3"):
    """Parameters, loss and gradient on a mesh, or on one device."""
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape)) if shape else None
    config = config_of(family, num_attention_heads=8)
    graphdef, params = decoder.init(config, EXACT, jax.random.key(0), mesh)
    rows = ragged(rows=8, time=32)[:2]
    rows = rows if mesh is None else sharding.to_global(rows, mesh)
    loss = jax.value_and_grad(lambda p, t, m: jnp.mean(nnx.merge(graphdef, p)(t, m) ** 2))
    return params, *jax.jit(loss)(params, *rows)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2),
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 8), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_compute_what_one_computes(shape):
    one, eight = trained(None), trained(shape)
    for a, b in zip(*map(jax.tree.leaves, (one, eight)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(one[0]["embed_tokens"], eight[0]["embed_tokens"])
    split = {name: leaf.sharding.spec for name, leaf in eight[0]["layers"].items()}
    assert ("fsdp" in split["up_proj"]) == (shape[1] > 1)
    assert ("tensor" in split["up_proj"]) == (shape[2] > 1)


@pytest.mark.parametrize("family", ["gemma3_text", *REPEATED])
def test_eight_devices_compute_what_one_computes_of_other_layers(family):
    one, eight = trained(None, family), trained((2, 2, 2), family)
    for a, b in zip(*map(jax.tree.leaves, (one, eight)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shapes_axes_and_parameters_have_one_structure():
    for family in FAMILIES:
        config = config_of(family)
        graphdef, params = example(family)
        shapes, axes = decoder.param_shapes(config), decoder.param_axes(config)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
            lambda x: (x.shape, x.dtype), params
        )
        jax.tree.map(lambda x, names: len(x.shape) == len(names) or 1 / 0, shapes, axes)
        assert graphdef == decoder.make_graphdef(config, EXACT)
        assert hash(graphdef) == hash(decoder.make_graphdef(config, EXACT))


def test_no_matrix_starts_at_zero():
    params, *_ = trained(None)
    for path, leaf in jax.tree.leaves_with_path(params):
        norm = "norm" in str(path[-1])
        assert float(np.std(leaf)) == pytest.approx(0 if norm else 0.02, rel=0.1), path


def test_bfloat16_computes_logits_in_float32():
    tokens, mask, _ = ragged()
    call = lambda options: nnx.merge(*example("qwen3", options)).logits(  # noqa: E731
        forward("qwen3", options)(tokens, mask)
    )
    logits, exact = call(decoder.Options()), call(EXACT)
    assert logits.dtype == jnp.float32
    assert len(np.unique(logits)) > 0.9 * logits.size  # 16 bits would repeat themselves
    np.testing.assert_allclose(logits[mask], exact[mask], atol=0.05 * float(jnp.abs(exact).max()))


def test_compilation_does_not_grow_with_depth():
    sizes = []
    for depth in (4, 16):
        config = config_of("qwen3", num_hidden_layers=depth)
        graphdef, shapes = decoder.make_graphdef(config, EXACT), decoder.param_shapes(config)
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        forward = jax.jit(lambda p, t, g=graphdef: nnx.merge(g, p)(t))
        sizes.append(len(forward.lower(shapes, tokens).as_text()))
    assert sizes[1] < 1.05 * sizes[0]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("split", [False, True])
def test_splash_attention_equals_the_plain_one(window, split):
    """Correctness only: it is interpreted on the CPU."""
    query, key, value = (
        jax.random.normal(k, (4, 256, heads, 64))
        for k, heads in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2), strict=True)
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 4)) if split else None

    def gradient(kernel):
        def loss(*args):
            return jnp.mean(attention.attend(*args, window=window, kernel=kernel, mesh=mesh) ** 2)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(query, key, value)

    for a, b in zip(*map(jax.tree.leaves, map(gradient, ("xla", "splash"))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def test_splash_attention_names_the_rule_on_the_length():
    x = jnp.zeros((1, 96, 2, 8))
    with pytest.raises(InputError, match="attention: got splash with rows of 96"):
        attention.attend(x, x, x, kernel="splash")


# ---- reading config.json ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_survives_writing_and_reading(family):
    config = config_of(family, eos_token_id=[3, 4], rope_theta=12_345.0)
    assert decoder.ModelConfig.from_hf(config.to_hf()) == config


SCALING = {"factor": 2.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "layout",
    [
        {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", **SCALING}},
        {"rope_theta": 5e4, "rope_scaling": {"rope_type": "yarn", "type": "yarn", **SCALING}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, **SCALING}},
        {"rope_parameters": {"rope_type": "yarn", **SCALING}, "rope_theta": 5e4},
        {"rope_parameters": {"full_attention": {"type": "yarn", "rope_theta": 5e4, **SCALING}}},
    ],
)
def test_every_layout_of_rope_settings_means_the_same(layout):
    expected = rope.Rope("yarn", 5e4, **SCALING)
    assert config_of("llama", **layout).rope == expected
    config = config_of("olmo3", **layout)
    assert config.rope == expected
    theta = 5e5 if "full_attention" in layout.get("rope_parameters", {}) else 5e4
    assert config.sliding_rope == rope.Rope("default", theta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2'; must be one of qwen3"),
        ({"model_type": None}, "model_type: got None"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: got True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout: got 0.1"),
        ({"hidden_size": None}, "hidden_size: got None; must be a positive whole number"),
        ({"vocab_size": "64"}, "vocab_size: got '64'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3; must divide"),
        ({"head_dim": 7}, "head_dim: got 7; must be even"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope_type: got .*'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_parameters: got no \['factor'\]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_parameters.factor"),
        ({"rope_parameters": {"factor": 2}}, r"got \['factor'\]; rope_type 'default' reads only"),
        (
            {"rope_parameters": {"rope_theta": 1.0}, "rope_theta": 2.0},
            "rope_theta: got 2.0 and 1.0",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling: got 'yarn'; must be a dictionary"),
        (
            {"rope_parameters": {"full_attention": {}, "rope_theta": 1.0}},
            r"got \['rope_theta'\] beside",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        config_of("qwen3", **changes)


def test_unknown_keys_of_an_architecture_stated_in_a_run_are_refused():
    with pytest.raises(InputError, match=r"architecture: got \['num_layers'\]; must be among"):
        decoder.ModelConfig.from_hf({**TINY, "model_type": "qwen3", "num_layers": 2}, strict=True)


@pytest.mark.parametrize("name", ["remat", "attention"])
@pytest.mark.usefixtures("unchecked")
def test_unknown_options_are_refused(name):
    with pytest.raises(InputError, match=f"{name}: got 'some'; must be one of"):
        decoder.Options(**{name: "some"})


def test_the_gradient_of_a_bias_sums_over_all_tokens_in_float32():
    gradient = 1 + 0.01 * jnp.arange(8192, dtype=jnp.float32).reshape(2, 4096, 1, 1)
    gradient = gradient.astype(jnp.bfloat16)
    x, bias = jnp.zeros((2, 4096, 1, 1), jnp.bfloat16), jnp.zeros((1, 1))
    value, pull = jax.vjp(decoder._add_bias, x, bias + 0.5)
    assert value.dtype == jnp.bfloat16
    to_x, to_bias = pull(gradient)
    np.testing.assert_array_equal(to_x, gradient)
    assert to_bias.dtype == jnp.float32
    exact = np.asarray(gradient, np.float64).sum()
    np.testing.assert_allclose(float(to_bias[0, 0]), exact, rtol=1e-6)


def test_gradients_summed_in_float32_are_not_rounded_to_the_type_of_the_computation():
    config = config_of("qwen3")
    tokens = jax.random.randint(jax.random.key(1), (8, 64), 0, config.vocab_size)

    def gradient(reduce_dtype):
        options = decoder.Options(dtype=jnp.bfloat16, reduce_dtype=reduce_dtype)
        graphdef, params = decoder.init(config, options, jax.random.key(0))

        def loss(params):
            hidden = decoder.merge(graphdef, params).hidden(tokens).astype(jnp.float32)
            return jnp.sum(hidden * jnp.sin(jnp.arange(hidden.size).reshape(hidden.shape)))

        layers = jax.jit(jax.grad(loss))(params)["layers"]
        return {name: value for name, value in layers.items() if name.endswith("_proj")}

    rounded, whole = gradient(None), gradient("float32")
    for name, value in rounded.items():
        assert (value == value.astype(jnp.bfloat16).astype(jnp.float32)).all()
        assert (whole[name] != whole[name].astype(jnp.bfloat16).astype(jnp.float32)).any()
        # The same sums: they differ by the rounding of bfloat16 alone.
        np.testing.assert_allclose(value, whole[name], rtol=2**-8, atol=1e-3)
