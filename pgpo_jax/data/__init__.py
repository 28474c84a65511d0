"""From text to one batch: tokens, lengths, a replayable order, and the layout of rows."""

from pgpo_jax.data import batch, packing
from pgpo_jax.data.batch import Batch, View
from pgpo_jax.data.order import batch_indices
from pgpo_jax.data.packing import pack
from pgpo_jax.data.records import (
    AnswerPrompts,
    DataConfig,
    Examples,
    Rollouts,
    TeacherPrompts,
    make_examples,
)
from pgpo_jax.data.tokens import (
    CLOCK,
    bucket,
    encode,
    left_pad,
    letters,
    names_special_tokens,
    opening,
    render,
    right_pad,
    tokenize,
    unmarked,
)

__all__ = [
    "CLOCK",
    "AnswerPrompts",
    "Batch",
    "DataConfig",
    "Examples",
    "Rollouts",
    "TeacherPrompts",
    "View",
    "batch",
    "batch_indices",
    "bucket",
    "encode",
    "left_pad",
    "letters",
    "make_examples",
    "names_special_tokens",
    "opening",
    "pack",
    "packing",
    "render",
    "right_pad",
    "tokenize",
    "unmarked",
]
