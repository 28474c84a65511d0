"""Packed rows: nothing is lost, nothing meets that should not, and no number changes."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from test_distributed import finish, start
from test_step import ARCHITECTURE, assert_same, make_examples, numbers, place, setup
from test_train import TINY, without_time

from pgpo_jax import config, data, losses, sharding, train
from pgpo_jax.data import Batch, DataConfig, Examples, pack, packing
from pgpo_jax.data.batch import (
    micro_batches,
    padding_fraction,
    response_hidden,
    responses_of,
    to_tokens,
)
from pgpo_jax.errors import InputError
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.models import attention, decoder


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as the host needs."""

    platform: str
    index: int
    process_index: int = 0


def mesh_of(devices=1, platform="cpu"):
    """A mesh of devices that there need not be."""
    held = np.array([[Device(platform, index)] for index in range(devices)])
    return Mesh(held, ("data", "fsdp"))


def batch_of(prompts, teacher_prompts, responses, widen=lambda length: length) -> Examples:
    """Rows of the given lengths; every token's value is unique."""
    lengths = np.array([prompts, teacher_prompts, responses])
    rows, widths = lengths.shape[1], [widen(int(own.max())) for own in lengths]
    tokens, masks, first = [], [], 1
    for own, width in zip(lengths, widths, strict=True):
        tokens.append(first + np.arange(rows * width, dtype=np.int32).reshape(rows, width))
        masks.append(np.arange(width)[None] >= width - own[:, None])
        first += rows * width
    masks[2] = masks[2][:, ::-1]
    log_probs = -tokens[2].astype(np.float32)
    context = np.arange(rows) % 3 > 0
    prompts = {"student": (tokens[0], masks[0]), "teacher": (tokens[1], masks[1])}
    return Examples(prompts, tokens[2], masks[2], log_probs, context)


def always(examples, mesh=None, count=1) -> Batch:
    settings = DataConfig(packing="always", micro_batches=count)
    packed = pack(examples, settings, mesh or mesh_of())
    assert is_packed(packed)
    return packed


def never(examples, mesh=None, count=1) -> Batch:
    settings = DataConfig(packing="never", micro_batches=count)
    return pack(examples, settings, mesh or mesh_of())


def is_packed(batch: Batch) -> bool:
    """Whether its rows may hold several sequences."""
    return all(view.segments is not None for view in batch.views.values())


SKEWED = batch_of([5, 3, 4, 5, 2, 3, 5, 4], [9, 4, 8, 7, 9, 3, 5, 6], [64, 3, 9, 5, 7, 2, 4, 8])
EQUAL = batch_of([8] * 8, [16] * 8, [32] * 8)


# ---- on the host ----


@st.composite
def batches(draw):
    devices, count = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    rows = devices * count * draw(st.integers(1, 5))
    prompts = st.lists(st.integers(1, 40), min_size=rows, max_size=rows)
    responses = st.lists(st.integers(0, 70), min_size=rows, max_size=rows)
    lengths = draw(prompts), draw(prompts), draw(responses.filter(any))
    return batch_of(*lengths), devices, count


@given(batches(), st.sampled_from([always, never]))
def test_every_response_token_stands_once_in_one_order_behind_its_own_prompt(drawn, layout):
    batch, devices, count = drawn
    packed = layout(batch, mesh_of(devices), count)
    expected = np.sort(batch.responses[batch.response_mask])
    np.testing.assert_array_equal(np.sort(packed.responses[packed.response_mask]), expected)
    values = packed.responses.astype(np.float32)
    np.testing.assert_array_equal(
        packed.sampler_log_probs, np.where(packed.response_mask, -values, 0)
    )
    row_of = {int(t): row for row, own in enumerate(batch.responses) for t in own}
    for name, view in packed.views.items():
        tokens, mask = batch.prompts[name]
        columns = np.broadcast_to(np.arange(view.tokens.shape[2]), view.tokens.shape)
        segments = np.ones_like(columns) if view.segments is None else view.segments
        positions = columns if view.positions is None else view.positions
        held = view.tokens[(view.tokens > 0) & (segments > 0)]
        assert len(set(held.tolist())) == len(held), "no two sequences overlap"
        for part in range(len(view.tokens)):
            flat = [x[part].reshape(-1) for x in (view.tokens, segments, positions)]
            counts = packed.response_mask[part]
            sources = view.sources[part][counts]
            np.testing.assert_array_equal(flat[0][sources + 1], packed.responses[part][counts])
            for token, source in zip(packed.responses[part][counts], sources, strict=True):
                row = row_of[int(token)]
                prompt = tokens[row][mask[row]]
                begin = source - flat[2][source]  # positions count from the sequence's first token
                np.testing.assert_array_equal(flat[0][begin : begin + len(prompt)], prompt)
                assert len({*flat[1][begin : source + 2].tolist()}) == 1
                own = int(packed.owners[part][packed.responses[part] == token][0])
                assert packed.lengths[part, own] == batch.response_mask[row].sum()
                assert packed.has_context[part, own] == batch.has_context[row]


@given(batches())
def test_no_packed_micro_batch_is_larger_than_a_padded_one(drawn):
    batch, devices, count = drawn
    packed = always(batch, mesh_of(devices), count)
    rows = len(batch.responses) // (devices * count)
    assert len(packed.lengths) <= devices * count
    assert packed.responses.shape[1] <= rows * batch.responses.shape[1]
    for name, view in packed.views.items():
        width = batch.prompts[name][0].shape[1] + batch.responses.shape[1]
        for power in (1, 2):  # columns, and scores of attention
            assert view.tokens.shape[1] * view.tokens.shape[2] ** power <= rows * width**power


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 150))
def test_rows_are_filled_and_never_overfull(totals, width):
    rows = packing.first_fit(totals, width)
    assert sorted(member for row in rows for member in row) == list(range(len(totals)))
    filled = [sum(totals[member] for member in row) for row in rows]
    assert max(filled) <= width
    assert sum(2 * total <= width for total in filled) <= 1  # two such rows would have been one


def test_parts_get_equally_many_sequences_and_about_equally_many_tokens():
    totals = np.random.default_rng(0).lognormal(5, 1, 256).astype(int)
    members = packing.deal(totals, 16)
    assert sorted(np.concatenate(members).tolist()) == list(range(256))
    assert {len(part) for part in members} == {16}
    tokens = [totals[part].sum() for part in members]
    assert max(tokens) < 1.05 * np.mean(tokens) + totals.max() - np.sort(totals)[-16]


def test_auto_packs_what_is_skewed_and_leaves_what_is_full():
    assert is_packed(pack(SKEWED, DataConfig(), mesh_of()))
    assert not is_packed(pack(EQUAL, DataConfig(), mesh_of()))
    assert not is_packed(pack(SKEWED, DataConfig(packing="never"), mesh_of()))
    assert not is_packed(pack(SKEWED, DataConfig(), mesh_of(platform="gpu")))


@pytest.mark.parametrize("layout", [always, never])
def test_rows_that_do_not_divide_are_refused(layout):
    with pytest.raises(InputError, match=r"data\.micro_batches: got 3; the 8 rows of a host must"):
        layout(SKEWED, count=3)


def test_full_micro_batches_stay_and_emptier_ones_are_joined():
    for batch, count in ((EQUAL, 2), (SKEWED, 1)):
        packed = always(batch, mesh_of(2), 2)
        assert micro_batches(packed, mesh_of(2)) == count


def test_a_run_has_few_shapes():
    """Lengths change from step to step and grow fivefold; every 200th response is at the limit."""
    rng, shapes = np.random.default_rng(0), set()
    for step in range(200):
        lengths = np.clip(rng.lognormal(3 + step / 125, 0.7, 64), 1, 1000).astype(int)
        lengths[rng.random(64) < 0.005] = 1000
        prompts = rng.integers(20, 100, 64)
        batch = batch_of(prompts, prompts + 50, lengths, lambda length: data.bucket(length, 1000))
        packed = pack(batch, DataConfig(), mesh_of(4))
        shapes.add(tuple(leaf.shape for leaf in jax.tree.leaves(packed)))
    assert len(shapes) < 40


# ---- on the device ----

SLIDING = {
    "model_type": "olmo3",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "sliding_window": 4,
}


@pytest.fixture(params=[ARCHITECTURE, SLIDING], ids=["full", "sliding"], scope="module")
def net(request):
    settings = decoder.ModelConfig.from_hf(request.param)
    return nnx.merge(*decoder.init(settings, decoder.Options(dtype=jnp.float32), jax.random.key(0)))


@pytest.mark.parametrize("view", ["student", "teacher"])
@pytest.mark.parametrize("layout", [always, never])
def test_hidden_states_are_those_of_every_sequence_alone(net, view, layout):
    prompts, mask = SKEWED.prompts[view]
    tokens = np.concatenate([prompts, SKEWED.responses], 1) % 20  # unique ones made the model's
    whole = np.concatenate([mask, SKEWED.response_mask], 1)
    alone = net.hidden(jnp.asarray(tokens), jnp.asarray(whole))[:, prompts.shape[1] - 1 : -1]
    batch = layout(SKEWED)
    views = {k: v._replace(tokens=v.tokens % 20) for k, v in batch.views.items()}
    small = jax.tree.map(jnp.asarray, batch._replace(views=views))
    found = np.asarray(response_hidden(net, small, view))[batch.response_mask.ravel()]
    order = np.argsort(batch.responses[batch.response_mask])
    np.testing.assert_allclose(found[order], alone[SKEWED.response_mask], atol=1e-5)


def test_a_sequence_does_not_feel_what_is_in_its_row(net):
    view = always(SKEWED).views["student"]
    tokens, segments, positions = (
        jnp.asarray(x[0]) for x in (view.tokens, view.segments, view.positions)
    )
    assert int(segments.max()) > 2
    forward = jax.jit(lambda tokens: net.packed_hidden(tokens % 20, segments, positions))
    before = forward(tokens)
    for segment in (1, 2, 0):  # 0: what fills the rows
        changed = segments == segment
        moved = np.abs(forward(jnp.where(changed, tokens + 7, tokens)) - before).max(-1) > 0
        assert moved[changed].any()
        assert not moved[~changed].any()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("split", [False, True])
def test_splash_attention_keeps_segments_apart_as_the_plain_one(window, split):
    """Correctness only: it is interpreted on the CPU."""
    query, key, value = (
        jax.random.normal(k, (4, 256, heads, 64))
        for k, heads in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2), strict=True)
    )
    segments = jnp.searchsorted(jnp.array([20, 150, 230]), jnp.arange(256), side="right")
    segments = jnp.stack([segments, segments[::-1], segments * 0, segments])
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 4)) if split else None

    def gradient(kernel):
        def loss(*args):
            options = {"segments": segments, "window": window, "kernel": kernel, "mesh": mesh}
            return jnp.mean(attention.attend(*args, **options) ** 2)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(query, key, value)

    for a, b in zip(*map(jax.tree.leaves, map(gradient, ("xla", "splash"))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def test_cudnn_is_refused_for_rows_of_several_sequences():
    x, segments = jnp.zeros((1, 8, 2, 8)), jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(InputError, match="attention: got cudnn for rows of several sequences"):
        attention.attend(x, x, x, segments=segments, kernel="cudnn")


# ---- the update ----

RAGGED = make_examples(0)
FULL = RAGGED._replace(  # micro-batches of it cannot be joined
    prompts={view: (tokens, np.ones_like(mask)) for view, (tokens, mask) in RAGGED.prompts.items()},
    response_mask=np.ones_like(RAGGED.response_mask),
)


def updates(examples, mesh=(1, 1, 1), count=1, aggregation="sequence_mean", packing="never"):
    """After two of them, so that teacher and student differ in the second one."""
    distillation = DistillationConfig(top_k=None, chunk_size=8, aggregation=aggregation)
    _, step, state, mesh = setup(mesh, distillation=distillation)
    batch = place(examples, mesh, count, packing)
    assert micro_batches(batch, mesh) == count
    for _ in range(2):
        state, measured = step(state, batch)
    return jax.device_get(state), numbers(measured)


@pytest.mark.parametrize(
    ("mesh", "count", "aggregation"),
    [
        ((1, 1, 1), 1, "sequence_mean"),
        ((2, 2, 2), 2, "token_mean"),
        pytest.param((1, 1, 1), 4, "token_mean", marks=pytest.mark.slow),
        pytest.param((8, 1, 1), 1, "sequence_mean", marks=pytest.mark.slow),
        pytest.param((1, 8, 1), 1, "token_mean", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 2, "sequence_mean", marks=pytest.mark.slow),
        pytest.param((1, 1, 8), 1, "sequence_mean", marks=pytest.mark.slow),
    ],
)
def test_an_update_is_the_padded_one(mesh, count, aggregation):
    examples = RAGGED if count == 1 else FULL
    whole, expected = updates(examples, aggregation=aggregation)
    state, measured = updates(examples, mesh, count, aggregation, packing="always")
    # Only the order of float32 sums differs.
    chex.assert_trees_all_close(state, whole, rtol=1e-4, atol=1e-6)
    assert_same(measured, expected)


def test_hidden_states_stay_on_their_device():
    _, step, state, mesh = setup((8, 1, 1))
    packed = place(RAGGED, mesh, packing="always")
    compiled = step.lower(state, packed).compile().as_text()
    assert "all-reduce" in compiled  # of the gradients
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in compiled


@pytest.mark.parametrize("layout", [always, never])
def test_the_padding_is_what_no_token_stands_in(layout):
    masks = [SKEWED.response_mask, *(mask for _, mask in SKEWED.prompts.values())]
    held = sum(int(mask.sum()) for mask in masks) + 2 * int(SKEWED.response_mask.sum())
    batch = layout(SKEWED)
    columns = sum(view.tokens.size for view in batch.views.values()) + batch.responses.size
    np.testing.assert_allclose(padding_fraction(batch), 1 - held / columns, rtol=1e-6)


@pytest.mark.parametrize("layout", [always, never])
def test_weights_of_tokens_are_those_of_the_whole_batch(layout):
    batch = layout(SKEWED, mesh_of(2))
    for mode in ("sequence_mean", "token_mean"):
        masks = map(jnp.asarray, (SKEWED.response_mask, SKEWED.has_context))
        expected = losses.loss_weights(*masks, mode)
        by_token = dict(zip(SKEWED.responses.ravel().tolist(), expected.ravel(), strict=True))
        known = responses_of(batch)
        flat = to_tokens(batch, losses.aggregation_weights(known.lengths, known.has_context, mode))
        assert not flat[~batch.response_mask].any()
        for token, weight in zip(batch.responses.ravel(), flat.ravel(), strict=True):
            assert weight == by_token.get(int(token), 0)


# ---- a run ----


def run(path, name, **changes):
    sections = {**TINY, "steps": 2, "output_dir": str(path / name), "warm_start": {}}
    sections["evaluation"] = {"every": 0}
    (path / f"{name}.yaml").write_text(yaml.safe_dump({**sections, **changes}))
    return path / f"{name}.yaml"


def rows(path, name):
    lines = (path / name / "metrics.jsonl").read_text().splitlines()
    return [without_time(json.loads(line)) for line in lines]


def same_but_for_padding(row, expected):
    padding, before = row.pop("padding_fraction"), expected["padding_fraction"]
    assert 0 <= padding < 1
    row["padding_fraction"] = before
    assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_a_packed_run_is_the_padded_one_on_one_process_and_on_two(tmp_path):
    asked = {"data": {**TINY["data"], "packing": "always", "micro_batches": 2}, "mesh": {}}
    padded = {**asked, "data": {**asked["data"], "packing": "never"}, "mesh": {"data": 1}}
    assert train.train(config.load(str(run(tmp_path, "padded", **padded)))) == 0
    one = {**asked, "mesh": {"data": 1}}
    assert train.train(config.load(str(run(tmp_path, "one", **one)))) == 0
    codes, errors = finish(start(run(tmp_path, "two", **asked), 2))
    assert codes == [0, 0], errors
    for name in ("one", "two"):
        for row, expected in zip(rows(tmp_path, name), rows(tmp_path, "padded"), strict=True):
            same_but_for_padding(row, expected)
