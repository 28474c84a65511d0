"""The vocabulary pass against the same maths on all logits at once."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pgpo_jax import distributions, fused, information, losses, sharding
from pgpo_jax.errors import InputError

TOKENS, VOCAB, EMBED = 22, 64, 8
ESTIMATORS = ("entropy_gap", "conditional_kl", "jensen_shannon", "pointwise")
CONFIG = losses.DistillationConfig(top_k=7, chunk_size=5)


@functools.cache
def make_inputs(vocab=VOCAB, tokens=TOKENS):
    keys = jax.random.split(jax.random.key(0), 7)
    mask = jax.random.uniform(keys[6], (tokens,)) < 0.8
    return {
        "student_hidden": jax.random.normal(keys[0], (tokens, EMBED)),
        "student_head": jax.random.normal(keys[1], (vocab, EMBED)),
        "teacher_hidden": jax.random.normal(keys[2], (tokens, EMBED)),
        "teacher_head": jax.random.normal(keys[3], (vocab, EMBED)),
        "tokens": jax.random.randint(keys[4], (tokens,), 0, 30),
        "weights": mask / tokens,
        "sampler_log_probs": -6 * jax.random.uniform(keys[5], (tokens,)),
    }


def distill(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    tokens,
    weights,
    sampler_log_probs=None,
    **options,
):
    """The vocabulary pass on inputs by name."""
    return fused.distill(
        fused.Side(student_hidden, student_head),
        fused.Side(teacher_hidden, teacher_head),
        fused.Tokens(tokens, weights, sampler_log_probs),
        fused.Options(**options),
    )


def straightforward(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    tokens,
    weights,
    sampler_log_probs=None,
    *,
    config,
    vocab_size=None,
    estimators=(),
):
    """The same functions on all logits at once."""
    terms = fused.token_terms(
        fused.logits(student_hidden, student_head),
        jax.lax.stop_gradient(fused.logits(teacher_hidden, teacher_head)),
        fused.Tokens(tokens, weights, sampler_log_probs),
        fused.Options(config, estimators, vocab_size),
    )
    return jnp.sum(weights * terms.weight * terms.divergence), terms


def value_and_gradients(function, inputs, **options):
    def loss(student_hidden, student_head, others):
        return function(student_hidden, student_head, **others, **options)

    others = dict(inputs)
    hidden, head = others.pop("student_hidden"), others.pop("student_head")
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    if function is distill:  # op by op, the other compiles next to nothing per test
        gradient = jax.jit(gradient)
    return gradient(hidden, head, others)


def assert_same(got, wanted, tolerance=1e-5):
    """Relative to the largest entry of every array."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-12, jnp.abs(b).max()))


def assert_like_straightforward(config, *, inputs=None, **options):
    inputs = inputs or make_inputs()
    got = value_and_gradients(distill, inputs, config=config, **options)
    assert_same(got, value_and_gradients(straightforward, inputs, config=config, **options))
    return got


@pytest.mark.parametrize(
    ("kind", "top_k", "tail"),
    [
        *itertools.product(["forward_kl", "reverse_kl", "jsd"], [7, None], [True]),
        ("jsd", 7, False),
        ("jsd", 1000, True),
        ("sampled", None, True),
    ],
)
def test_gradients_are_those_of_the_maths_on_all_logits(kind, top_k, tail):
    assert_like_straightforward(
        dataclasses.replace(CONFIG, kind=kind, top_k=top_k, tail=tail, jsd_weight=0.3)
    )


def test_all_estimators_are_those_of_the_maths_on_all_logits():
    assert_like_straightforward(CONFIG, estimators=ESTIMATORS)


def test_the_temperature_divides_all_logits():
    _, hot = assert_like_straightforward(dataclasses.replace(CONFIG, temperature=1.7))
    halves = make_inputs() | {
        name: make_inputs()[name] / 1.7 for name in ("student_head", "teacher_head")
    }
    _, cool = value_and_gradients(straightforward, halves, config=CONFIG)
    assert_same(hot[0], cool[0])
    assert_same(hot[1] * 1.7, cool[1])


@pytest.mark.parametrize("cap", [None, 0.5])
def test_importance_weights_multiply_the_terms_without_a_gradient(cap):
    config = dataclasses.replace(CONFIG, importance_cap=cap)
    (loss, terms), _ = assert_like_straightforward(config)
    if cap is None:
        np.testing.assert_array_equal(terms.weight, 1)
    else:
        assert float(terms.weight.max()) == cap
        assert float(terms.weight.min()) < cap
    wanted = jnp.sum(make_inputs()["weights"] * terms.weight * terms.divergence)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_without_the_samplers_log_probs_the_importance_weights_are_one():
    inputs = make_inputs() | {"sampler_log_probs": None}
    (_, terms), _ = assert_like_straightforward(CONFIG, inputs=inputs)
    np.testing.assert_array_equal(terms.weight, 1)


@pytest.mark.parametrize("top_k", [7, None])
def test_padded_rows_do_not_matter_and_get_no_gradient(top_k):
    config = dataclasses.replace(CONFIG, top_k=top_k)
    padded = make_inputs()
    got = assert_like_straightforward(config, vocab_size=60)
    np.testing.assert_array_equal(got[1][1][60:], 0)
    short = padded | {name: padded[name][:60] for name in ("student_head", "teacher_head")}
    wanted = value_and_gradients(straightforward, short, config=config)
    assert_same(got[0], wanted[0])
    assert_same((got[1][0], got[1][1][:60]), wanted[1])


def test_a_head_used_twice_gets_both_gradients():
    inputs, tokens = make_inputs(), make_inputs()["tokens"]

    def loss(head, function):
        hidden = jnp.tanh(head[tokens])  # the head is the embedding too
        others = {k: v for k, v in inputs.items() if not k.startswith("student")}
        return function(hidden, head, **others, config=CONFIG)[0]

    got, wanted = (
        jax.jit(jax.grad(loss), static_argnums=1)(inputs["student_head"], function)
        for function in (distill, straightforward)
    )
    assert_same(got, wanted)


@pytest.mark.parametrize("chunk_size", [1, 7, 22, 256])
def test_the_chunk_size_does_not_matter(chunk_size):
    config = dataclasses.replace(CONFIG, chunk_size=chunk_size)
    assert_like_straightforward(config)


def test_the_head_is_updated_in_blocks_that_do_not_matter():
    inputs = make_inputs(vocab=4096, tokens=6)
    assert fused._block(4096) == 4096
    assert fused._block(151_936) == 9496
    assert fused._block(151_936 // 8) == 9496
    assert fused._block(100_003) == 100_003  # a prime number of rows stays in one piece
    assert fused._block(20_480) == 10_240
    wanted = value_and_gradients(straightforward, inputs, config=CONFIG)
    block, fused._block = fused._block, lambda rows: 256
    try:
        got = value_and_gradients(distill, inputs, config=CONFIG)
    finally:
        fused._block = block
    assert_same(got, wanted)


def test_the_gradient_from_above_scales_the_gradients():
    inputs = make_inputs()

    def loss(hidden, head, scale):
        others = {k: v for k, v in inputs.items() if not k.startswith("student")}
        return scale * distill(hidden, head, **others, config=CONFIG)[0] ** 2

    value = distill(**inputs, config=CONFIG)[0]
    _, once = value_and_gradients(distill, inputs, config=CONFIG)
    got = jax.grad(loss, argnums=(0, 1))(inputs["student_hidden"], inputs["student_head"], 3.0)
    assert_same(got, jax.tree.map(lambda gradient: 6.0 * value * gradient, once))


def test_only_the_loss_has_a_gradient_and_only_for_the_student():
    inputs = make_inputs()
    floats = {name: value for name, value in inputs.items() if name != "tokens"}

    def loss(floats):
        return distill(**floats, tokens=inputs["tokens"], config=CONFIG)[0]

    gradients = jax.grad(loss)(floats)
    for name, gradient in gradients.items():
        assert bool(jnp.any(gradient != 0)) == name.startswith("student"), name

    def measured(hidden):
        others = {k: v for k, v in inputs.items() if k != "student_hidden"}
        terms = distill(hidden, **others, config=CONFIG, estimators=ESTIMATORS)[1]
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(terms))

    np.testing.assert_array_equal(jax.grad(measured)(inputs["student_hidden"]), 0)


def test_the_terms_are_what_their_names_say():
    inputs = make_inputs()
    (_, terms), _ = value_and_gradients(distill, inputs, config=CONFIG, estimators=ESTIMATORS)
    student = inputs["student_hidden"] @ inputs["student_head"].T
    teacher = inputs["teacher_hidden"] @ inputs["teacher_head"].T
    log_s = distributions.log_probs(student)
    wanted = {
        "student_entropy": distributions.entropy(log_s),
        "token_log_probs": information.at_tokens(log_s, inputs["tokens"]),
        "divergence": losses.divergence(student, teacher, kind="jsd", top_k=7),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(terms, name), value, atol=1e-5)
    gap = terms.student_entropy - terms.teacher_entropy
    np.testing.assert_allclose(terms.information["entropy_gap"], gap, atol=1e-5)
    pointwise = terms.teacher_token_log_probs - terms.token_log_probs
    np.testing.assert_allclose(terms.information["pointwise"], pointwise, atol=1e-5)


def test_a_token_of_weight_zero_may_hold_anything():
    inputs = make_inputs()
    broken = inputs["student_hidden"].at[0].set(jnp.nan)
    inputs = inputs | {
        "student_hidden": broken,
        "weights": inputs["weights"].at[0].set(0.0),
    }
    (loss, terms), gradients = value_and_gradients(distill, inputs, config=CONFIG)
    assert jnp.isnan(terms.student_entropy[0])
    assert jnp.isfinite(loss)
    assert jnp.all(gradients[0][0] == 0)
    assert jnp.all(jnp.isfinite(gradients[1]))


@pytest.mark.parametrize("top_k", [7, None])
def test_bfloat16_hidden_states_keep_their_type_and_stay_near_float32(top_k):
    config = dataclasses.replace(CONFIG, top_k=top_k)
    rounded = make_inputs() | {
        name: make_inputs()[name].astype(jnp.bfloat16).astype(jnp.float32)
        for name in ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    }
    half = rounded | {
        name: rounded[name].astype(jnp.bfloat16) for name in ("student_hidden", "teacher_hidden")
    }
    (loss, terms), gradients = value_and_gradients(distill, half, config=config)
    wanted = value_and_gradients(straightforward, rounded, config=config)
    # Products of rounded inputs summed in float32: only the logits' gradients are rounded.
    assert_same((loss, terms), wanted[0], tolerance=1e-5)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    assert_same(jax.tree.map(lambda g: g.astype(jnp.float32), gradients), wanted[1], tolerance=1e-2)


MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


def on_mesh(inputs, mesh):
    """Tokens over data and fsdp where they divide, heads as the parameters are kept."""
    row = PartitionSpec(sharding.BATCH_AXES)
    spec = dict.fromkeys(inputs, row) | {
        "student_head": PartitionSpec("tensor", "fsdp"),
        "teacher_head": PartitionSpec("tensor", "fsdp"),
    }
    if len(inputs["tokens"]) % 8:
        spec |= {name: PartitionSpec() for name in inputs if not name.endswith("head")}
    return {
        name: jax.device_put(value, NamedSharding(mesh, spec[name]))
        for name, value in inputs.items()
    }


@pytest.mark.parametrize(
    ("shape", "tokens", "top_k"),
    [(MESHES[0], 21, 7), (MESHES[1], 24, None), (MESHES[2], 21, 7), (MESHES[3], 24, 7)],
    ids=str,
)
def test_any_mesh_gives_the_numbers_of_one_device(shape, tokens, top_k):
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
    config = dataclasses.replace(CONFIG, chunk_size=2, top_k=top_k)
    inputs = make_inputs(tokens=tokens)
    options = {"config": config, "vocab_size": 61}
    got = value_and_gradients(distill, on_mesh(inputs, mesh), mesh=mesh, **options)
    assert_same(got, value_and_gradients(straightforward, inputs, **options))


def test_a_vocabulary_that_tensor_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    inputs = make_inputs(vocab=63, tokens=24)
    got = value_and_gradients(distill, inputs, config=CONFIG, mesh=mesh)
    assert_same(got, value_and_gradients(straightforward, inputs, config=CONFIG))


def compile_pass(config, *, shape=(1, 1, 1), tokens=64, vocab=512, gradient=True):
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    inputs = on_mesh(make_inputs(vocab=vocab, tokens=tokens), mesh)

    def loss(hidden, head, others):
        return distill(hidden, head, **others, config=config, mesh=mesh)

    function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True) if gradient else loss
    others = dict(inputs)
    hidden, head = others.pop("student_hidden"), others.pop("student_head")
    return jax.jit(function).lower(hidden, head, others).compile()


def largest(text: str, *dimensions: int) -> bool:
    """Whether an array with these dimensions (others besides) stands in a compiled text."""
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", text)}
    return any(set(dimensions) <= set(shape) for shape in shapes)


@pytest.mark.parametrize("top_k", [7, None])
def test_logits_of_all_tokens_never_exist(top_k):
    config = losses.DistillationConfig(top_k=top_k, chunk_size=16)
    text = compile_pass(config).as_text()
    assert largest(text, 16, 512)
    assert not largest(text, 64, 512)


@pytest.mark.parametrize("shape", MESHES[2:], ids=str)
@pytest.mark.parametrize("top_k", [7, None])
def test_no_device_gathers_the_logits_of_others(top_k, shape):
    config = losses.DistillationConfig(top_k=top_k, chunk_size=2)
    text = compile_pass(config, shape=shape, vocab=4096).as_text()
    gathered = [
        line
        for line in text.splitlines()
        if re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line)
    ]
    assert not any(largest(line.split(" = ")[1].split("(")[0], 4096, 2) for line in gathered)
    assert not largest(text, 64, 4096)


def test_the_value_alone_does_no_work_for_gradients():
    config = losses.DistillationConfig(top_k=7, chunk_size=64)
    value = compile_pass(config, gradient=False)
    dots = value.as_text().count(" dot(")
    assert dots == 2  # logits of the student, logits of the teacher
    both = compile_pass(config)
    assert both.as_text().count(" dot(") == 4  # and one for each gradient
    assert value.cost_analysis()["flops"] < 0.7 * both.cost_analysis()["flops"]


def test_a_head_that_nobody_differentiates_costs_no_gradient():
    inputs = make_inputs(512, 64)
    hidden = inputs.pop("student_hidden")
    config = losses.DistillationConfig(top_k=7, chunk_size=16)

    def gradient(hidden):
        return jax.grad(lambda hidden: distill(hidden, **inputs, config=config)[0])(hidden)

    found = jax.jit(gradient).lower(hidden).compile()
    assert found.as_text().count(" dot(") == 3  # logits of both, and the gradient of one
    (expected, _) = jax.jit(
        jax.grad(
            lambda hidden, head: distill(hidden, **inputs | {"student_head": head}, config=config)[
                0
            ],
            argnums=(0, 1),
        )
    )(hidden, inputs["student_head"])
    assert_same(found(hidden), expected)


def test_one_compilation_serves_every_batch_of_a_shape():
    traces = []

    @jax.jit
    def step(hidden, weights):
        traces.append(None)
        inputs = make_inputs() | {"student_hidden": hidden, "weights": weights}
        return distill(**inputs, config=CONFIG)[0]

    for scale in (1.0, 2.0, 3.0):
        inputs = make_inputs()
        step(scale * inputs["student_hidden"], scale * inputs["weights"])
    assert len(traces) == 1
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", ["student.hidden", "teacher.hidden", "teacher.head"])
def test_shapes_that_do_not_fit_are_named(name):
    inputs, key = make_inputs(), name.replace(".", "_")
    inputs = inputs | {key: inputs[key][:-1]}
    with pytest.raises(InputError, match=rf"distill.{name}: got shape"):
        distill(**inputs, config=CONFIG)


def test_old_log_probs_have_a_weight_of_their_own_and_one_that_corrects_for_the_sampler():
    rng = np.random.default_rng(3)
    student, teacher = (jnp.asarray(rng.normal(size=(6, 9)), jnp.float32) for _ in "st")
    tokens = jnp.asarray(rng.integers(0, 9, 6))
    current = jax.nn.log_softmax(student)[jnp.arange(6), tokens]
    old = current + jnp.asarray([0.0, -0.5, 0.5, -2.0, 0.1, 0.0])
    sampled = old + jnp.asarray([0.0, -0.3, 0.3, -0.1, -2.0, 0.4])

    def terms(cap, **given):
        options = fused.Options(
            losses.DistillationConfig(top_k=None, importance_cap=cap),
            policy_terms=lambda ours, before, *_: (ours - before, before < -1),
        )
        rows = fused.Tokens(tokens, jnp.ones(6), sampled, policy=(), **given)
        return fused.token_terms(student, teacher, rows, options)

    found = terms(2.0, old_log_probs=old)
    correction = np.minimum(np.exp(old - sampled), 2)
    np.testing.assert_allclose(
        found.weight, correction * np.minimum(np.exp(current - old), 2), rtol=1e-5
    )
    np.testing.assert_allclose(found.policy, correction * (current - old), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.clipped, old < -1)
    one = terms(2.0)
    np.testing.assert_allclose(one.weight, np.minimum(np.exp(current - sampled), 2), rtol=1e-5)
    np.testing.assert_allclose(one.policy, current - sampled, rtol=1e-5)
    free = terms(None, old_log_probs=old)
    assert (free.weight == 1).all()
    np.testing.assert_allclose(free.policy, current - old, rtol=1e-5, atol=1e-7)
