"""The state of a run on disk: saved by Orbax, checked by checksums, restored onto any mesh."""

from pgpo_jax.checkpoint.commands import main
from pgpo_jax.checkpoint.store import CheckpointConfig, Checkpoints, compare

__all__ = ["CheckpointConfig", "Checkpoints", "compare", "main"]
