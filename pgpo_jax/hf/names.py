"""The name table of Hugging Face checkpoints: our leaves, their tensors, applied both ways."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pgpo_jax import models, sharding
from pgpo_jax.models import Leaf, ModelConfig

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Types of saved tensors, in numpy's words and in those of the format."""

# Leaf of our tree -> tensor of the checkpoint. Layers' names are repeated for every layer.
NAMES = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
LAYER_NAMES = {
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    "input_layernorm": "input_layernorm.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm": "post_feedforward_layernorm.weight",
}


def layer_name(leaf: str, layer: int) -> str:
    return f"model.layers.{layer}.{LAYER_NAMES[leaf]}"


def groups(name: str, leaf: Leaf) -> tuple[tuple[int, ...], ...]:
    """Which of our axes (without `layer`) make up each axis of the checkpoint's tensor, in order.

    A linear layer is stored [out, in] there and [in, out] here, its heads as one axis.
    """
    axes = tuple(range(len(leaf.shape) - (leaf.axes[0] == "layer")))
    if name.endswith("_proj"):
        inputs = models.inputs(name)
        return axes[inputs:], axes[:inputs]
    if name in ("embed_tokens", "lm_head"):
        return (0,), (1,)
    return (axes,)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint, and where it comes from."""

    name: str
    leaf: str
    layer: int | None
    groups: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]

    def export(self, params: Mapping[str, Any], dtype: Any) -> np.ndarray:
        array = params[self.leaf] if self.layer is None else params["layers"][self.leaf][self.layer]
        array = np.asarray(sharding.fetch(array)).astype(dtype)
        return np.ascontiguousarray(
            array.transpose(*itertools.chain(*self.groups)).reshape(self.shape)
        )


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a checkpoint of this architecture, in the order of the forward pass."""
    table = models.leaves(config)

    def entry(name: str, leaf: str, layer: int | None, of: Leaf) -> Entry:
        own = of.shape if layer is None else of.shape[1:]
        own_groups = groups(leaf, of)
        shape = tuple(math.prod(own[axis] for axis in group) for group in own_groups)
        return Entry(name, leaf, layer, own_groups, shape)

    yield entry(NAMES["embed_tokens"], "embed_tokens", None, table["embed_tokens"])
    for layer in range(config.num_hidden_layers):
        for leaf, of in table["layers"].items():
            yield entry(layer_name(leaf, layer), leaf, layer, of)
    for leaf in ("norm", "lm_head"):
        if leaf in table:
            yield entry(NAMES[leaf], leaf, None, table[leaf])
