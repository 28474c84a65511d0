"""Where arrays live: the mesh and its axis rules, and what several hosts need."""

from pgpo_jax.sharding.hosts import (
    DistributedConfig,
    agree_max,
    barrier,
    gather_rows,
    host_rows,
    initialize,
    is_main,
)
from pgpo_jax.sharding.mesh import (
    BATCH_AXES,
    RULES,
    MeshConfig,
    fetch,
    make_mesh,
    place,
    replicated,
    row_sharding,
    shardings,
    spec,
    to_global,
    to_host,
)

__all__ = [
    "BATCH_AXES",
    "RULES",
    "DistributedConfig",
    "MeshConfig",
    "agree_max",
    "barrier",
    "fetch",
    "gather_rows",
    "host_rows",
    "initialize",
    "is_main",
    "make_mesh",
    "place",
    "replicated",
    "row_sharding",
    "shardings",
    "spec",
    "to_global",
    "to_host",
]
