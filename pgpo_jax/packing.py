"""Several sequences in one row, so that one long response does not make all rows as wide as itself.

A padded batch has a row per response, as wide as the longest prompt and the longest response. Here
the prompts and responses themselves are laid one after the other into rows that are as wide as the
longest of them, once for every view: what the student reads before a response, and what the teacher
reads. The response tokens of all rows become one axis, in the same order for every view, and only
they go through the vocabulary pass.

The host packs (numpy) for every *part* of a batch by itself: what one device works on in one
micro-batch. So hidden states, their tokens and their weights meet on the device where they are, and
a gather within a part moves nothing between devices. Which response is in which part changes no
number, for the weights are those of the whole batch.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pgpo_jax import data, sharding
from pgpo_jax.data import Batch, DataConfig, Either, Host
from pgpo_jax.errors import InputError
from pgpo_jax.model import Decoder

SAVING = 0.2
"""`auto` packs where this part of a padded batch's columns is saved."""


class View(NamedTuple):
    """Prompts of one kind and their responses, packed."""

    tokens: Int[Either, "part row time"]
    """Sequences of prompt and response, one after the other; 0 after the last one of a row."""
    segments: Int[Either, "part row time"]
    """Which sequence of its row a token belongs to, from 1; 0 = none."""
    positions: Int[Either, "part row time"]
    """Of a token in its sequence, from 0."""
    sources: Int[Either, "part token"]
    """Where the hidden state stands that predicts a response token: row * time + column."""


class Packed(NamedTuple):
    """A `Batch` as packed rows; parts are ordered by device, then by micro-batch."""

    views: dict[str, View]
    """`student` and `teacher`, and whatever else reads the same responses."""
    responses: Int[Either, "part token"]
    """The response tokens of a part one after the other, then filler."""
    response_mask: Bool[Either, "part token"]
    """True at response tokens."""
    sampler_log_probs: Float[Either, "part token"]
    """As in `Batch`; 0 at filler."""
    owners: Int[Either, "part token"]
    """Which response of its part a token belongs to."""
    lengths: Int[Either, "part response"]
    """Tokens of each response."""
    has_context: Bool[Either, "part response"]
    """As in `Batch`."""


# ---- on the host ---------------------------------------------------------------------------------


def prompts_of(batch: Batch) -> dict[str, tuple[Either, Either]]:
    """Tokens and mask of what is read before the responses, by view."""
    return {
        "student": (batch.prompts, batch.prompt_mask),
        "teacher": (batch.teacher_prompts, batch.teacher_prompt_mask),
    }


def pack(batch: Batch, config: DataConfig, mesh: Mesh) -> Batch | Packed:
    """This host's rows packed, or as they are where that saves too little; see `data.packing`.

    All hosts call it together and get the same shapes. Widths are those of `data.bucket`, never
    above a padded row's; numbers of rows and tokens have four sizes per octave. So the shapes of a
    run are few, however long its responses.

    Args:
      batch: This host's rows, on the host.
      config: Packing and micro-batches.
      mesh: Rows will be split over its `data` and `fsdp` axes.

    Raises:
      InputError: `always`, and the rows do not divide over devices, hosts and micro-batches.
    """
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    if config.packing == "never" or (config.packing == "auto" and on_gpu):
        return batch
    rows, time = batch.responses.shape
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = max(devices // jax.process_count(), 1) * config.micro_batches
    if rows % parts:
        if config.packing == "auto":
            return batch
        raise InputError(
            f"data.packing: got always; the {rows} rows of a host must divide by its {parts} parts "
            f"({config.micro_batches} micro-batches of each device)"
        )
    views = prompts_of(batch)
    lengths = np.asarray(batch.response_mask).sum(axis=1)
    # A response without tokens needs no place.
    totals = {
        name: np.where(lengths > 0, np.asarray(mask).sum(axis=1) + lengths, 0)
        for name, (_, mask) in views.items()
    }
    padded = {name: tokens.shape[1] + time for name, (tokens, _) in views.items()}
    longest = sharding.agree_max([int(total.max(initial=1)) for total in totals.values()])
    widths = {
        name: data.bucket(length, padded[name]) for name, length in zip(views, longest, strict=True)
    }
    members = deal(sum(totals.values()), parts)
    placed = {
        name: [first_fit(totals[name][part], widths[name]) for part in members] for name in views
    }
    needed = [max(map(len, rows_of)) for rows_of in placed.values()]
    needed.append(max(int(lengths[part].sum()) for part in members))
    *heights, tokens = map(size, sharding.agree_max(needed))
    counts = {name: min(n, rows // parts) for name, n in zip(views, heights, strict=True)}
    tokens = min(tokens, rows // parts * time)
    columns = parts * (sum(counts[name] * widths[name] for name in views) + tokens)
    if config.packing == "auto" and columns > (1 - SAVING) * rows * (sum(padded.values()) + time):
        return batch
    return _fill(batch, members, placed, widths, counts, tokens)


def size(count: int) -> int:
    """`count` rounded up to one of four sizes per octave: 1 to 8, 10, 12, 14, 16, 20, ..."""
    step = 2 ** max(count.bit_length() - 3, 0)
    return max(-(-count // step) * step, 1)


def deal(totals: Int[Host, " row"], parts: int) -> list[Int[Host, " member"]]:
    """Which rows each part gets: equally many, and tokens about equally.

    Longest first, each to the part with the fewest tokens that is not full.
    """
    members: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, part) for part in range(parts)]
    for row in np.argsort(-totals, kind="stable").tolist():
        tokens, part = heapq.heappop(heap)
        members[part].append(row)
        if len(members[part]) < len(totals) // parts:
            heapq.heappush(heap, (tokens + int(totals[row]), part))
    return [np.sort(part) for part in members]


def first_fit(totals: Sequence[int] | Int[Host, " member"], width: int) -> list[list[int]]:
    """Rows of at most `width` tokens, as lists of members: longest first, each to the first row
    that has room (at most 11/9 of the fewest possible rows, and one; Johnson 1973)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for member in np.argsort(-np.asarray(totals), kind="stable").tolist():
        total = int(totals[member])
        if total == 0:
            break
        row = next((row for row, left in enumerate(room) if left >= total), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(member)
        room[row] -= total
    return rows


def _fill(
    batch: Batch,
    members: list[np.ndarray],
    placed: dict[str, list[list[list[int]]]],
    widths: dict[str, int],
    counts: dict[str, int],
    tokens: int,
) -> Packed:
    parts, each = len(members), len(members[0])
    masks = [np.asarray(mask) for mask in batch.response_mask]
    responses = [row[mask] for row, mask in zip(batch.responses, masks, strict=True)]
    log_probs = [row[mask] for row, mask in zip(batch.sampler_log_probs, masks, strict=True)]
    lengths = np.array([len(response) for response in responses], np.int32)
    starts = [np.concatenate([[0], np.cumsum(lengths[rows])]) for rows in members]

    def per_token(pieces: Sequence[Sequence[np.ndarray]], dtype: type) -> np.ndarray:
        out = np.zeros((parts, tokens), dtype)
        for row, own in zip(out, pieces, strict=True):
            together = np.concatenate(own)
            row[: len(together)] = together
        return out

    def view(name: str) -> View:
        prompts, prompt_mask = prompts_of(batch)[name]
        shape = (parts, counts[name], widths[name])
        out = View(*(np.zeros(shape, np.int32) for _ in range(3)), np.zeros((parts, tokens), int))
        for part, rows in enumerate(placed[name]):
            for index, row in enumerate(rows):
                end = 0
                for segment, member in enumerate(row, start=1):
                    owner = members[part][member]
                    prompt = prompts[owner][prompt_mask[owner]]
                    sequence = np.concatenate([prompt, responses[owner]])
                    begin, end = end, end + len(sequence)
                    out.tokens[part, index, begin:end] = sequence
                    out.segments[part, index, begin:end] = segment
                    out.positions[part, index, begin:end] = np.arange(len(sequence))
                    first, last = starts[part][member : member + 2]
                    source = index * widths[name] + begin + len(prompt) - 1
                    out.sources[part, first:last] = source + np.arange(last - first)
        return out._replace(sources=out.sources.astype(np.int32))

    def of(values: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        return [[values[row] for row in rows] for rows in members]

    owners = [[np.full(lengths[row], i) for i, row in enumerate(rows)] for rows in members]
    return Packed(
        views={name: view(name) for name in placed},
        responses=per_token(of(responses), np.int32),
        response_mask=per_token(of([np.ones(n, bool) for n in lengths]), np.bool_),
        sampler_log_probs=per_token(of(log_probs), np.float32),
        owners=per_token(owners, np.int32),
        lengths=lengths[np.stack(members)].reshape(parts, each),
        has_context=np.asarray(batch.has_context)[np.stack(members)].reshape(parts, each),
    )


# ---- on the device -------------------------------------------------------------------------------
# What a step needs of a batch, padded or packed: `token` runs over [row, time] or [part, token].


def response_hidden(
    model: Decoder, batch: Batch | Packed, view: str
) -> Float[Array, "token hidden"]:
    """The hidden states that predict the response tokens after the prompts of a view."""
    if isinstance(batch, Batch):
        rows = (batch.responses, batch.response_mask)
        hidden = model.response_hidden(*prompts_of(batch)[view], *rows)
        return hidden.reshape(-1, hidden.shape[-1])
    tokens, segments, positions, sources = batch.views[view]
    rows = (x.reshape(-1, x.shape[-1]) for x in (tokens, segments, positions))
    hidden = model.packed_hidden(*rows)
    hidden = hidden.reshape(tokens.shape[0], -1, hidden.shape[-1])
    taken = jnp.take_along_axis(hidden, sources[:, :, None], axis=1)
    return taken.reshape(-1, taken.shape[-1])


def response_lengths(batch: Batch | Packed) -> Int[Array, " response"]:
    """Tokens of each response, in the order of `has_context`."""
    if isinstance(batch, Packed):
        return jnp.asarray(batch.lengths).reshape(-1)
    return jnp.sum(batch.response_mask, axis=1)


def to_tokens(
    batch: Batch | Packed, per_response: Float[Array, " response"]
) -> Float[Array, "row time"] | Float[Array, "part token"]:
    """Every response token's share of a value per response; 0 elsewhere."""
    mask = jnp.asarray(batch.response_mask)
    if isinstance(batch, Batch):
        return mask * per_response[:, None]
    owned = per_response.reshape(batch.lengths.shape)
    return mask * jnp.take_along_axis(owned, batch.owners, axis=1)


def padding_fraction(batch: Batch | Packed) -> Float[Array, ""]:
    """The part of all columns, of every view and of the vocabulary pass, that holds no token."""
    masks = [batch.response_mask]
    if isinstance(batch, Packed):
        masks += [view.segments > 0 for view in batch.views.values()]
    else:
        for _, mask in prompts_of(batch).values():
            masks += [mask, batch.response_mask]
    held = sum(jnp.sum(mask, dtype=jnp.float32) for mask in masks)
    return 1 - held / sum(mask.size for mask in masks)
