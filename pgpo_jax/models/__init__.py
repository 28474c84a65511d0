"""One decoder driven by a checkpoint's config.json; the only floor that knows Flax."""

from pgpo_jax.models import rope
from pgpo_jax.models.architecture import ModelConfig
from pgpo_jax.models.decoder import Decoder, GraphDef, Options, init, make_graphdef, merge
from pgpo_jax.models.lora import (
    OFF,
    LoraConfig,
    abstract_params,
    adapter_leaves,
    adapter_names,
    init_adapters,
    merged,
)
from pgpo_jax.models.parameters import (
    Leaf,
    Params,
    inputs,
    join,
    leaves,
    param_axes,
    param_shapes,
)

__all__ = [
    "OFF",
    "Decoder",
    "GraphDef",
    "Leaf",
    "LoraConfig",
    "ModelConfig",
    "Options",
    "Params",
    "abstract_params",
    "adapter_leaves",
    "adapter_names",
    "init",
    "init_adapters",
    "inputs",
    "join",
    "leaves",
    "make_graphdef",
    "merge",
    "merged",
    "param_axes",
    "param_shapes",
    "rope",
]
