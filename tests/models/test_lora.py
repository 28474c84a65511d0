"""Low-rank adapters: at first the model itself, then what a change of low rank to it is."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgpo_jax import models, sharding
from pgpo_jax.errors import InputError
from pgpo_jax.models import LoraConfig, decoder, lora
from pgpo_jax.optimizer import OptimizerConfig, make_optimizer
from pgpo_jax.plan import programs
from pgpo_jax.state import abstract_train_state

ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
CONFIG = models.ModelConfig.from_hf(ARCHITECTURE)
LORA = LoraConfig(rank=3, alpha=6.0)
EXACT = decoder.Options(dtype=jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (3, 7)))
KEY = jax.random.key(0)


@functools.cache
def base():
    _, params = models.init(CONFIG, EXACT, KEY)
    return jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, params)


@functools.cache
def adapters(b=True):
    """Those before training, or with a random B."""
    first = models.init_adapters(CONFIG, LORA, KEY)["layers"]
    if b:
        rng = np.random.default_rng(1)
        first = {
            name: jnp.asarray(rng.standard_normal(x.shape, np.float32)) if name[-1] == "b" else x
            for name, x in first.items()
        }
    return {"layers": first}


@functools.cache
def loss_and_gradient(settings: LoraConfig = models.OFF):
    """Of the trained parameters, beside others that are not."""
    graphdef = models.make_graphdef(CONFIG, dataclasses.replace(EXACT, lora=settings))

    def loss(params, frozen):
        logits = models.merge(graphdef, params, frozen)(TOKENS)
        return jnp.mean(jnp.sin(logits)), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def computed():
    """Loss, logits and gradient of the adapters, and of all parameters of the merged model."""
    by_adapters = loss_and_gradient(LORA)(adapters(), base())
    merged = models.merged(base(), adapters(), LORA)
    return by_adapters, loss_and_gradient()(merged, None)


def test_new_adapters_leave_the_model_as_it_is_bit_for_bit():
    (_, logits), _ = loss_and_gradient(LORA)(adapters(b=False), base())
    (_, expected), _ = loss_and_gradient()(base(), None)
    np.testing.assert_array_equal(logits, expected)


def test_the_merged_model_has_the_logits_of_the_adapters():
    ((_, logits), _), ((_, expected), _) = computed()
    (_, without), _ = loss_and_gradient()(base(), None)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert np.abs(logits - without).max() > 0.1


@pytest.mark.parametrize("target", lora.TARGETS)
def test_gradients_are_the_projected_gradient_of_the_whole_matrix(target):
    """W + s A B: dA = s dW B^T and dB = s A^T dW; B = 0 leaves dA at 0."""
    (_, found), (_, whole) = computed()
    name_a, name_b = lora.adapter_names(target)
    a, b = (adapters()["layers"][name] for name in (name_a, name_b))
    depth, rank = a.shape[0], LORA.rank
    a, b = a.reshape(depth, -1, rank), b.reshape(depth, rank, -1)
    gradient = whole["layers"][target].reshape(depth, a.shape[1], b.shape[2])
    for name, expected in (
        (name_a, LORA.scale * np.einsum("lio,lro->lir", gradient, b)),
        (name_b, LORA.scale * np.einsum("lir,lio->lro", a, gradient)),
    ):
        got = found["layers"][name].reshape(expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    _, first = loss_and_gradient(LORA)(adapters(b=False), base())
    assert not np.any(first["layers"][name_a]) and np.any(first["layers"][name_b])


def test_first_values_are_the_same_on_every_mesh_and_for_any_other_targets():
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    split = models.init_adapters(CONFIG, LORA, KEY, mesh)["layers"]
    some = dataclasses.replace(LORA, targets=("down_proj", "q_proj"))
    few = models.init_adapters(CONFIG, some, KEY)["layers"]
    assert sorted(few) == [f"{name}_lora_{part}" for name in sorted(some.targets) for part in "ab"]
    for name, x in adapters(b=False)["layers"].items():
        np.testing.assert_array_equal(split[name], x)
        np.testing.assert_array_equal(few.get(name, x), x)
        bound = math.prod(x.shape[1:-1]) ** -0.5
        assert np.abs(x).max() == 0 if name[-1] == "b" else 0.7 * bound < np.abs(x).max() <= bound
    assert tuple(split["q_proj_lora_a"].sharding.spec) == (None, "fsdp", None)
    assert tuple(split["q_proj_lora_b"].sharding.spec) == (None, None, "tensor", None)
    assert tuple(split["o_proj_lora_a"].sharding.spec) == (None, "tensor", None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "model.lora.rank: got -1; must be at least 0"),
        ({"alpha": math.inf}, "model.lora.alpha: got inf; must be finite"),
        ({"alpha": 0.0}, "model.lora.alpha: got 0.0; must be positive"),
        ({"targets": ("lm_head",)}, "model.lora.targets: got .*; must be some of q_proj, "),
        ({"targets": ("q_proj", "q_proj")}, "model.lora.targets: got .*, each once"),
        ({"targets": ()}, "model.lora.targets: got "),
        ({"base_dtype": "float8"}, "model.lora.base_dtype: got 'float8'; must be bfloat16 or"),
        ({"path": "x"}, "model.lora.path: got 'x'; must be null where model.lora.rank is 0"),
        ({"rank": 13}, "model.lora.rank: got 13; must be at most 12, the smaller side of k_proj"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_adapters_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        models.adapter_leaves(CONFIG, LoraConfig(**fields))


@pytest.mark.parametrize(("name", "base_gb", "state_gb"), [("1.7B", 3.5, 0.3), ("8B", 16.4, 0.75)])
def test_student_teacher_and_optimizer_fit_beside_one_base(name, base_gb, state_gb):
    """In bytes of the real shapes: 16.4 + 0.7 GB at 8B, where the whole model takes 131."""
    config = models.ModelConfig.from_hf(programs.ARCHITECTURES[f"Qwen/Qwen3-{name}"], strict=True)
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1))
    trained, frozen = models.abstract_params(config, LoraConfig(rank=16), mesh)
    state = abstract_train_state(trained, make_optimizer(OptimizerConfig()))
    held, beside = programs.shard_bytes(state), programs.shard_bytes(frozen)
    assert 0.9 * base_gb < beside / 1e9 < 1.01 * base_gb
    assert 0.5 * state_gb < held / 1e9 < state_gb
    assert held + beside < 20e9
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {"bfloat16"}
