"""From text to one batch: tokens, lengths, a replayable order, and the layout of rows."""

from pgpo_jax.data import packing
from pgpo_jax.data.batch import (
    Batch,
    View,
    micro_batches,
    padding_fraction,
    parts_of,
    response_hidden,
    responses_of,
    to_mean_1,
    to_rows,
    to_tokens,
)
from pgpo_jax.data.order import batch_indices, mini_batches
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
    lengths,
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
    "batch_indices",
    "bucket",
    "encode",
    "left_pad",
    "lengths",
    "letters",
    "make_examples",
    "micro_batches",
    "mini_batches",
    "names_special_tokens",
    "opening",
    "pack",
    "packing",
    "padding_fraction",
    "parts_of",
    "render",
    "response_hidden",
    "responses_of",
    "right_pad",
    "to_mean_1",
    "to_rows",
    "to_tokens",
    "tokenize",
    "unmarked",
]
