"""The batch of an update: rows of whole sequences, and what the update asks of them.

Prompts and responses stand one after the other in the rows of a *view*: what the student reads
before a response, and what the teacher reads. A row holds one sequence, or several (`packing.py`).
The response tokens of all rows are one axis, in the same order for every view, and only they go
through the vocabulary pass.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from pgpo_jax.models import Decoder
from pgpo_jax.objective import GroupStatistics, Responses

Either = Array | np.ndarray


class View(NamedTuple):
    """Prompts of one kind and their responses."""

    tokens: Int[Either, "part row time"]
    """Sequences of prompt and response; 0 after the last one of a row."""
    sources: Int[Either, "part token"]
    """Where the hidden state stands that predicts a response token: row * time + column."""
    segments: Int[Either, "part row time"] | None = None
    """Which sequence of its row a token belongs to, from 1; 0 = none. None: one sequence a row."""
    positions: Int[Either, "part row time"] | None = None
    """Of a token in its sequence, from 0; None: its column."""


class Batch(NamedTuple):
    """One update's rows, in *parts*: what one device works on in one micro-batch.

    Parts are ordered by device, then by micro-batch. Hidden states, their tokens and their weights
    meet on the device where they are, and a gather within a part moves nothing between devices.
    """

    views: dict[str, View]
    """`student` and `teacher`, and whatever else reads the same responses."""
    responses: Int[Either, "part token"]
    """The response tokens of a part one after the other, then filler."""
    response_mask: Bool[Either, "part token"]
    """True at response tokens."""
    sampler_log_probs: Float[Either, "part token"]
    """Log-probabilities of the sampled tokens as the sampler saw them, nats; 0 at filler."""
    owners: Int[Either, "part token"]
    """Which response of its part a token belongs to."""
    lengths: Int[Either, "part response"]
    """Tokens of each response."""
    has_context: Bool[Either, "part response"]
    """True where the teacher got a demonstration or feedback."""
    rows: Int[Either, "part response"]
    """Which of its host's rows a response was."""
    held: Int[Either, " part"]
    """How many columns, of every view and of the response tokens, hold a token."""
    group: GroupStatistics | None = None
    """What the rewards say, `[part, response]`, for objectives that read it."""
    has_wrong: Bool[Either, "part response"] | None = None
    """Whether the group has a wrong response to show, as in `AnswerPrompts`."""
    old_log_probs: Float[Either, "part token"] | None = None
    """As in `Examples`; 0 at filler."""


def parts_of(mesh: Mesh) -> int:
    """Parts of one micro-batch: one for every device that has rows of its own."""
    return math.lcm(mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count())


def micro_batches(batch: Batch, mesh: Mesh) -> int:
    """How many micro-batches the parts of a batch on all hosts make up."""
    return batch.lengths.shape[0] // parts_of(mesh)


def response_hidden(model: Decoder, batch: Batch, view: str) -> Float[Array, "token hidden"]:
    """The hidden states that predict the response tokens after the prompts of a view."""
    tokens, sources, segments, positions = batch.views[view]
    packed: Any = [None if x is None else x.reshape(-1, x.shape[-1]) for x in (segments, positions)]
    hidden = model.packed_hidden(jnp.reshape(tokens, (-1, tokens.shape[-1])), *packed)
    hidden = hidden.reshape(sources.shape[0], -1, hidden.shape[-1])
    taken = jnp.take_along_axis(hidden, sources[:, :, None], axis=1)
    return taken.reshape(-1, taken.shape[-1])


def responses_of(batch: Batch) -> Responses:
    """What is known of every response, in one row."""
    known = batch.lengths, batch.has_context, batch.group, batch.has_wrong
    return Responses(*jax.tree.map(lambda x: jnp.asarray(x).reshape(-1), known))


def to_tokens(batch: Batch, per_response: Array) -> Shaped[Array, "part token"]:
    """Every response token's share of a value per response; 0 elsewhere."""
    owned = per_response.reshape(batch.lengths.shape)
    return jnp.asarray(batch.response_mask) * jnp.take_along_axis(owned, batch.owners, axis=1)


def to_means(batch: Batch, per_token: Float[Array, " token"]) -> Float[Array, "part response"]:
    """The mean over each response's tokens; 0 where it has none."""
    mask = jnp.asarray(batch.response_mask)
    values = jnp.where(mask, per_token.reshape(mask.shape), 0)
    add = functools.partial(jax.ops.segment_sum, num_segments=batch.lengths.shape[1])
    return jax.vmap(add)(values, batch.owners) / jnp.maximum(batch.lengths, 1)


def to_mean_1(batch: Batch, per_token: Float[Array, " token"]) -> Float[Array, " token"]:
    """Positive values over their mean over each response's tokens."""
    mask = jnp.asarray(batch.response_mask)
    values = jnp.where(mask, per_token.reshape(mask.shape), 0)
    mean = to_means(batch, per_token)
    return (values / jnp.where(mask, to_tokens(batch, mean), 1)).reshape(-1)


def padding_fraction(batch: Batch) -> Float[Array, ""]:
    """The part of all columns, of every view and of the vocabulary pass, that holds no token."""
    columns = batch.responses.size + sum(view.tokens.size for view in batch.views.values())
    return (columns - jnp.sum(jnp.asarray(batch.held))) / columns


def to_rows(batch: Batch, per_token: Float[np.ndarray, "part token"]) -> list[np.ndarray]:
    """The values at each response's tokens, in the order of the rows before they were laid out.

    Args:
      batch: A host's own, on the host.
      per_token: Its values, in the shape of `batch.responses`.
    """
    mask, owners = np.asarray(batch.response_mask), np.asarray(batch.owners)
    found = {}
    for part, members in enumerate(np.asarray(batch.rows)):
        for response, row in enumerate(members):
            found[int(row)] = per_token[part][mask[part] & (owners[part] == response)]
    return [found[row] for row in range(len(found))]
