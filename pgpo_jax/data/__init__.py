"""From text to one batch: tokens, lengths, a replayable order, and rows that sequences share."""

from pgpo_jax.data.order import batch_indices
from pgpo_jax.data.packing import Packed
from pgpo_jax.data.records import Batch, Contexts, DataConfig, Evidence, Rollouts, make_batch
from pgpo_jax.data.tokens import (
    CLOCK,
    bucket,
    encode,
    left_pad,
    render,
    right_pad,
    tokenize,
    widen_left,
)

__all__ = [
    "CLOCK",
    "Batch",
    "Contexts",
    "DataConfig",
    "Evidence",
    "Packed",
    "Rollouts",
    "batch_indices",
    "bucket",
    "encode",
    "left_pad",
    "make_batch",
    "render",
    "right_pad",
    "tokenize",
    "widen_left",
]
