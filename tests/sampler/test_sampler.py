"""Sampling: what is drawn and from what, when it stops; slots, batch and mesh do not matter."""

import dataclasses
import os
import socket
import subprocess
import sys

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpo_jax import models, sampler, sharding
from pgpo_jax.errors import InputError
from pgpo_jax.sampler import SamplingConfig, decode

VOCAB, WIDTH = 17, 9
CONFIG = models.ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "use_sliding_window": True,  # the second layer sees six tokens only
        "max_window_layers": 1,
        "sliding_window": 6,
    }
)
LENGTHS = np.array([9, 1, 4, 6])  # of the prompts
MASK = np.arange(WIDTH)[None, :] >= WIDTH - LENGTHS[:, None]
PROMPTS = np.where(MASK, np.random.default_rng(0).integers(0, VOCAB, MASK.shape), 0)
SAMPLING = SamplingConfig(num_samples=3, max_response_length=10, end_tokens=(3, 4), chunk=4)
KEY = jax.random.key(5)


def make(mesh=None, config=CONFIG):
    options = models.Options(dtype=jnp.float32)
    graphdef, params = models.init(config, options, jax.random.key(0), mesh)
    # Far from uniform, so that a wrong key or position shows.
    return graphdef, jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def decoder():
    return make()


@pytest.fixture(scope="module")
def drawn(decoder):
    return run(decoder)


def run(decoder, sampling=SAMPLING, key=KEY, prompts=PROMPTS, mask=MASK, **options):
    samples = sampler.sample(*decoder, prompts, mask, key, sampling, **options)
    return jax.tree.map(np.asarray, samples)


def forward(decoder, samples):
    """Logits before every response token, from the uncached forward `[question, sample, time]`."""
    group, time = samples.tokens.shape[1:]
    prompts = np.repeat(PROMPTS, group, axis=0), np.repeat(MASK, group, axis=0)
    tokens = np.concatenate([prompts[0], samples.tokens.reshape(-1, time)], axis=1)
    mask = np.concatenate([prompts[1], samples.mask.reshape(-1, time)], axis=1)
    logits = nnx.merge(*decoder)(jnp.asarray(tokens), jnp.asarray(mask))[:, WIDTH - 1 : -1]
    return np.asarray(logits).reshape(*samples.tokens.shape, VOCAB)


def assert_equal(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.mask, expected.mask)
    # Other shapes sum in another order; logits reach 30 here, of which float32 resolves 2e-6.
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)


def test_log_probs_are_those_of_the_uncached_forward(decoder, drawn):
    expected = jax.nn.log_softmax(forward(decoder, drawn))
    expected = np.take_along_axis(np.asarray(expected), drawn.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(drawn.log_probs, np.where(drawn.mask, expected, 0), atol=1e-4)
    assert drawn.log_probs.dtype == np.float32


def test_temperature_zero_takes_the_argmax_of_the_uncached_forward(decoder):
    greedy = run(decoder, dataclasses.replace(SAMPLING, temperature=0.0, end_tokens=()))
    logits = forward(decoder, greedy)
    np.testing.assert_array_equal(greedy.tokens, logits.argmax(-1))
    expected = np.asarray(jax.nn.log_softmax(logits)).max(-1)
    np.testing.assert_allclose(greedy.log_probs, expected, atol=1e-4)


OTHER_LAYERS = {
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 3},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 4},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 2},
}


@pytest.mark.parametrize(
    "model_type",
    ["gemma3_text", *(pytest.param(n, marks=pytest.mark.slow) for n in ("smollm3", "granite"))],
)
def test_layers_of_every_kind_decode_as_in_the_uncached_forward(model_type):
    settings = {**CONFIG.to_hf(), "model_type": model_type, **OTHER_LAYERS[model_type]}
    for name in ("layer_types", "rope_parameters", "rope_theta", "hidden_act"):
        del settings[name]
    other = make(config=models.ModelConfig.from_hf(settings))
    greedy = run(other, dataclasses.replace(SAMPLING, temperature=0.0, end_tokens=()))
    expected = np.asarray(jax.nn.log_softmax(forward(other, greedy)))
    np.testing.assert_allclose(greedy.log_probs, expected.max(-1), atol=1e-4)


def test_log_probs_are_of_the_distribution_really_drawn_from(decoder):
    sampling = dataclasses.replace(SAMPLING, temperature=1.5, top_k=6, top_p=0.9, vocab_size=15)
    samples = run(decoder, sampling)
    logits = forward(decoder, samples).reshape(-1, VOCAB)
    expected = np.asarray(decode.distribution(jnp.asarray(logits), sampling.rule()))
    expected = np.take_along_axis(expected, samples.tokens.reshape(-1, 1), axis=1)
    expected = np.where(samples.mask, expected.reshape(samples.mask.shape), 0)
    np.testing.assert_allclose(samples.log_probs, expected, atol=1e-4)
    assert samples.tokens.max() < 15


def test_responses_end_with_an_end_token_or_at_the_limit(drawn):
    assert drawn.mask[..., 0].all()
    for tokens, mask in zip(drawn.tokens.reshape(-1, 10), drawn.mask.reshape(-1, 10), strict=True):
        length = mask.sum()
        np.testing.assert_array_equal(mask, np.arange(10) < length)
        ends = np.isin(tokens[:length], SAMPLING.end_tokens)
        assert not ends[:-1].any()
        assert ends[-1] or length == 10
        assert (tokens[length:] == 0).all()
    lengths = drawn.mask.sum(-1)
    assert lengths.min() < 5 and lengths.max() == 10  # both kinds were seen


def test_refilled_slots_give_what_a_slot_for_every_response_gives(decoder, drawn):
    # Five slots for twelve responses, and a ring that grows twice on the way.
    assert_equal(run(decoder, dataclasses.replace(SAMPLING, slots=5, ring=3)), drawn)


def test_prefilling_one_question_at_a_time_changes_nothing(decoder, drawn):
    assert_equal(run(decoder, dataclasses.replace(SAMPLING, prefill_tokens=1)), drawn)


def test_other_questions_of_the_batch_do_not_matter(decoder, drawn):
    fewer = run(decoder, prompts=PROMPTS[:2], mask=MASK[:2])
    assert_equal(fewer, jax.tree.map(lambda x: x[:2], drawn))


def test_left_padding_does_not_matter(decoder, drawn):
    wider = [np.pad(x, ((0, 0), (20, 0))) for x in (PROMPTS, MASK)]
    assert_equal(run(decoder, prompts=wider[0], mask=wider[1]), drawn)


def test_responses_of_a_group_and_of_other_keys_differ(decoder, drawn):
    for group in drawn.tokens[LENGTHS > 1]:
        assert len({tuple(tokens) for tokens in group}) == 3
    other = run(decoder, key=jax.random.key(6))
    assert (other.tokens != drawn.tokens).any(axis=-1).mean() > 0.8


def test_limits_cut_single_responses(decoder, drawn):
    limits = np.arange(12).reshape(4, 3) % 10 + 1
    cut = run(decoder, limits=limits)
    np.testing.assert_array_equal(cut.mask.sum(-1), np.minimum(limits, drawn.mask.sum(-1)))
    np.testing.assert_array_equal(cut.tokens, np.where(cut.mask, drawn.tokens, 0))


def test_legacy_keys_draw_what_typed_keys_draw(decoder, drawn):
    assert_equal(run(decoder, key=jax.random.key_data(KEY)), drawn)


def test_other_lengths_do_not_compile_anew(decoder, drawn):
    sampling = dataclasses.replace(SAMPLING, slots=8)
    before = sampler.compilations()
    run(decoder, sampling)
    compiled = sampler.compilations()
    assert 1 <= compiled - before <= 4  # the empty state, prefill, enter, decode
    run(decoder, sampling, key=jax.random.key(7))
    run(decoder, sampling, limits=np.full((4, 3), 2))
    run(decoder, sampling, prompts=PROMPTS[:3, -6:], mask=MASK[:3, -6:])
    assert sampler.compilations() == compiled


@pytest.mark.slow
@pytest.mark.parametrize("slots", [None, 8])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_every_mesh_gives_what_one_device_gives(drawn, sizes, slots):
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
    samples = sampler.sample(
        *make(mesh), PROMPTS, MASK, KEY, dataclasses.replace(SAMPLING, slots=slots)
    )
    assert samples.tokens.sharding.mesh == mesh
    assert_equal(jax.tree.map(np.asarray, samples), drawn)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(drawn, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = f"""
import pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
sys.path[:0] = [{os.getcwd()!r}, {os.path.dirname(__file__)!r}]
from pgpo_jax import sharding
sharding.initialize(sharding.DistributedConfig(timeout=120))
import dataclasses
import numpy as np
from test_sampler import KEY, MASK, PROMPTS, SAMPLING, make, sampler
for sizes in [(2, 2, 2), (1, 1, 8)]:
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
    own = sharding.host_rows(4)
    prompts, mask = sharding.to_global((PROMPTS[own], MASK[own]), mesh)
    samples = sampler.sample(
        *make(mesh), prompts, mask, KEY, dataclasses.replace(SAMPLING, slots=8)
    )
    np.savez(sys.argv[1] + "_".join(map(str, sizes)), **sharding.to_host(samples)._asdict())
"""
    settings = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / f"{process}_")],
            env=os.environ | settings | {"JAX_PROCESS_ID": str(process)},
        )
        for process in range(2)
    ]
    assert [process.wait(timeout=500) for process in started] == [0, 0]
    for sizes in ("2_2_2", "1_1_8"):
        parts = [np.load(tmp_path / f"{process}_{sizes}.npz") for process in range(2)]
        fields = sampler.Samples._fields
        whole = [np.concatenate([part[name] for part in parts]) for name in fields]
        assert_equal(sampler.Samples(*whole), drawn)


def test_a_mesh_of_eight_gives_what_one_device_gives(drawn):
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    prompts, mask = sharding.to_global((PROMPTS, MASK), mesh)
    assert_equal(run(make(mesh), prompts=prompts, mask=mask), drawn)


def test_a_16_bit_cache_and_model_stay_close(decoder, drawn):
    cached = run(decoder, dataclasses.replace(SAMPLING, cache_dtype="bfloat16"))
    same = (cached.tokens == drawn.tokens) & drawn.mask
    assert same[..., 0].mean() > 0.9
    first = same[..., 0]
    # bfloat16 keeps 8 bits: 0.4 % of logits up to 30.
    np.testing.assert_allclose(
        cached.log_probs[..., 0][first], drawn.log_probs[..., 0][first], atol=0.3
    )
    assert not np.array_equal(cached.log_probs, drawn.log_probs)


def test_the_programs_can_be_lowered_without_data(decoder):
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    shapes = models.param_shapes(CONFIG)
    shapes = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        sharding.shardings(models.param_axes(CONFIG), shapes, mesh),
    )
    growing = dataclasses.replace(SAMPLING, ring=4)
    lowered = sampler.lower_programs(decoder[0], shapes, growing, questions=2, prompt_length=9)
    assert [*lowered] == ["weights", "prefill", "enter", "grow", "decode"]
    assert "while" in lowered["decode"].program.as_text()


# ---- the distribution ----


def rule(**fields):
    return SamplingConfig(**fields).rule()


distribution = jax.jit(decode.distribution, static_argnames="rule")

logits_rows = arrays.arrays(np.float32, (3, 12), elements=st.floats(-8, 8, width=32), unique=True)


@hypothesis.given(logits_rows, st.sampled_from([0.05, 0.5, 0.95, 0.999]))
def test_the_nucleus_is_the_smallest_set_with_the_mass(logits, top_p):
    full = np.exp(np.asarray(jax.nn.log_softmax(logits)), dtype=np.float64)
    kept = np.isfinite(np.asarray(distribution(logits, rule=rule(top_p=top_p))))
    for probs, keep in zip(full, kept, strict=True):
        assert probs[keep].min() >= probs[~keep].max(initial=0)  # the most probable ones
        assert probs[keep].sum() >= top_p - 1e-5  # enough
        assert probs[probs > probs[keep].min()].sum() < top_p + 1e-5  # and no more, but for ties


@hypothesis.given(logits_rows, st.sampled_from([1, 3, 12, 14]), st.sampled_from([0.3, 2.0]))
def test_top_k_keeps_k_and_the_rest_is_renormalised(logits, top_k, temperature):
    log_probs = distribution(logits, rule=rule(top_k=top_k, temperature=temperature))
    log_probs = np.asarray(log_probs, np.float64)
    kept = np.isfinite(log_probs)
    scaled = logits.astype(np.float64) / temperature
    for row, keep, scores in zip(log_probs, kept, scaled, strict=True):
        assert keep.sum() >= min(top_k, 12)
        expected = scores[keep] - np.log(np.exp(scores[keep]).sum())
        np.testing.assert_allclose(row[keep], expected, atol=1e-5)
        assert scores[keep].min() > scores[~keep].max(initial=-np.inf)


def test_ties_with_the_last_token_kept_are_kept():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0]])
    for fields in ({"top_k": 2}, {"top_p": 0.7}):
        kept = jnp.isfinite(decode.distribution(logits, rule(**fields)))
        np.testing.assert_array_equal(kept, [[True, True, True, False]])


def test_rows_that_pad_the_vocabulary_are_never_drawn():
    logits = jnp.asarray([[1.0, 2.0, 3.0, 9.0]])
    for temperature in (0.0, 0.5):
        fields = {"temperature": temperature, "vocab_size": 3}
        log_probs = decode.distribution(logits, rule(**fields))
        assert log_probs[0, 3] == -jnp.inf
        np.testing.assert_allclose(jnp.exp(log_probs).sum(), 1, rtol=1e-6)
        assert decode.draw(logits, jax.random.split(KEY, 1), rule(**fields))[0] < 3


def chi_square(counts, probs):
    used = probs > 0
    assert counts[~used].sum() == 0
    expected = counts.sum() * probs[used]
    return ((counts[used] - expected) ** 2 / expected).sum()


def test_frequencies_of_drawn_tokens_follow_the_distribution():
    logits = jnp.asarray([[1.5, 0.3, -1.0, 0.9, 2.0, -0.5, 0.0, 1.1]])
    config = rule(temperature=1.3, top_k=6)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(100_000))
    tokens, log_probs = decode.draw(jnp.repeat(logits, 100_000, axis=0), keys, config)
    counts = np.bincount(np.asarray(tokens), minlength=8)
    probs = np.exp(np.asarray(decode.distribution(logits, config), np.float64))[0]
    np.testing.assert_allclose(np.exp(log_probs), probs[tokens], rtol=1e-5)
    # 5 degrees of freedom: 33 is exceeded once in 250,000 draws of the keys.
    assert chi_square(counts, probs) < 33
    # The test can fail: a temperature 8 % off would be seen.
    near = np.exp(np.asarray(decode.distribution(logits, rule(temperature=1.2, top_k=6))))[0]
    assert chi_square(counts, near.astype(np.float64)) > 33


# ---- bad input ----


@pytest.mark.parametrize(
    "fields",
    [
        {"num_samples": 0},
        {"max_response_length": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"slots": 0},
        {"ring": 0},
    ],
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match=rf"sampling\.{next(iter(fields))}: got"):
        SamplingConfig(**fields)


@pytest.mark.usefixtures("unchecked")
def test_prompts_that_are_not_left_padded_are_refused(decoder):
    with pytest.raises(InputError, match=r"row 1; .*padding on the left"):
        run(decoder, mask=MASK & (np.arange(WIDTH) < WIDTH - 1) | (LENGTHS > 1)[:, None])
    with pytest.raises(InputError, match="row 0"):
        run(decoder, mask=MASK & (np.arange(WIDTH) != 4)[None, :])
    with pytest.raises(InputError, match=r"both are \[question, time\]"):
        run(decoder, mask=MASK[:2])
    with pytest.raises(InputError, match="limits: got"):
        run(decoder, limits=np.full((4, 3), 11))
