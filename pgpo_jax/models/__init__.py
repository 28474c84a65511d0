"""One decoder driven by a checkpoint's config.json; the only floor that knows Flax."""

from pgpo_jax.models import rope
from pgpo_jax.models.architecture import ModelConfig
from pgpo_jax.models.decoder import (
    Decoder,
    GraphDef,
    Leaf,
    Options,
    init,
    leaves,
    make_graphdef,
    merge,
    param_axes,
    param_shapes,
)

__all__ = [
    "Decoder",
    "GraphDef",
    "Leaf",
    "ModelConfig",
    "Options",
    "init",
    "leaves",
    "make_graphdef",
    "merge",
    "param_axes",
    "param_shapes",
    "rope",
]
