"""The state of a run on disk: saved by Orbax, checked by checksums, restored onto any mesh."""

from pgpo_jax.checkpoint.commands import main
from pgpo_jax.checkpoint.compare import compare
from pgpo_jax.checkpoint.store import CheckpointConfig, Checkpoints

__all__ = ["CheckpointConfig", "Checkpoints", "compare", "main"]
