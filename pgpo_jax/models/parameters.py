"""Parameters of a decoder: their shapes and axes in one table, and those that training changes.

A model is trained whole, or some of its parameters are (`lora`). The others, the frozen ones, are a
tree of their own that is handed beside: one for student and teacher, in no optimizer's state and in
no checkpoint of a run.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pgpo_jax.models.architecture import ModelConfig

Params = Any
"""A tree of arrays, nested dictionaries by name."""


class Leaf(NamedTuple):
    """One parameter: its shape and the logical names of its axes (`sharding.RULES`)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def leaves(config: ModelConfig) -> dict[str, Any]:
    """The parameters: one table gives shapes, axes, initial values and checkpoint names."""
    c, arch = config, config.architecture
    depth, hidden, inner = c.num_hidden_layers, c.hidden_size, c.intermediate_size
    heads, kv_heads, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    layer: dict[str, Leaf] = {
        "q_proj": Leaf((hidden, heads, width), ("embed", "heads", None)),
        "k_proj": Leaf((hidden, kv_heads, width), ("embed", "kv_heads", None)),
        "v_proj": Leaf((hidden, kv_heads, width), ("embed", "kv_heads", None)),
        "o_proj": Leaf((heads, width, hidden), ("heads", None, "embed")),
        "gate_proj": Leaf((hidden, inner), ("embed", "mlp")),
        "up_proj": Leaf((hidden, inner), ("embed", "mlp")),
        "down_proj": Leaf((inner, hidden), ("mlp", "embed")),
    }
    layer |= {name: Leaf((hidden,), (None,)) for name in arch.norms if name is not None}
    if arch.qkv_bias:
        layer["q_bias"] = Leaf((heads, width), ("heads", None))
        layer["k_bias"] = layer["v_bias"] = Leaf((kv_heads, width), ("kv_heads", None))
    if arch.qk_norm == "head":
        layer["q_norm"] = layer["k_norm"] = Leaf((width,), (None,))
    elif arch.qk_norm == "full":
        layer["q_norm"] = Leaf((heads, width), ("heads", None))
        layer["k_norm"] = Leaf((kv_heads, width), ("kv_heads", None))
    tree: dict[str, Any] = {
        "embed_tokens": Leaf((c.vocab_size, hidden), ("vocab", "embed")),
        "layers": {
            name: Leaf((depth, *leaf.shape), ("layer", *leaf.axes)) for name, leaf in layer.items()
        },
        "norm": Leaf((hidden,), (None,)),
    }
    if not c.tie_word_embeddings:
        tree["lm_head"] = Leaf((c.vocab_size, hidden), ("vocab", "embed"))
    return tree


def inputs(projection: str) -> int:
    """How many axes of a projection's matrix, the first ones, its product sums over."""
    return 2 if projection == "o_proj" else 1


def map_leaves(function: Callable[[str, Leaf], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: function(name, item) if isinstance(item, Leaf) else map_leaves(function, item)
        for name, item in tree.items()
    }


def axes_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """Logical axis names of every parameter of a table of `Leaf`."""
    return map_leaves(lambda _, leaf: leaf.axes, table)


def shapes_of(table: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, Any]:
    """`jax.ShapeDtypeStruct` of every parameter of a table of `Leaf`."""
    return map_leaves(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), table)


def param_axes(config: ModelConfig) -> dict[str, Any]:
    """Logical axis names of every parameter, in the structure of the parameters."""
    return axes_of(leaves(config))


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """`jax.ShapeDtypeStruct` (float32) of every parameter, in the structure of the parameters."""
    return shapes_of(leaves(config))


def join(trained: Params, frozen: Params | None) -> Params:
    """All parameters of a model, from those that are trained and those that are not (if any)."""
    if frozen is None:
        return trained
    both = {name: join(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
    return {**frozen, **trained, **both}
