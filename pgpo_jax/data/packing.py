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

import functools
import heapq
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pgpo_jax import sharding
from pgpo_jax.data.records import Batch, DataConfig, Either, Host
from pgpo_jax.data.tokens import bucket
from pgpo_jax.errors import InputError
from pgpo_jax.methods import Judged
from pgpo_jax.models import Decoder

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
    rows: Int[Either, "part response"]
    """Which of its host's rows a response was."""
    judged: Judged | None = None
    """As in `Batch`, `[part, response]`."""
    has_wrong: Bool[Either, "part response"] | None = None
    """As in `Evidence`."""


# ---- on the host ---------------------------------------------------------------------------------


def prompts_of(batch: Batch) -> dict[str, tuple[Either, Either]]:
    """Tokens and mask of what is read before the responses, by view."""
    views = {
        "student": (batch.prompts, batch.prompt_mask),
        "teacher": (batch.teacher_prompts, batch.teacher_prompt_mask),
    }
    if batch.evidence is not None:
        right, right_mask, wrong, wrong_mask, _ = batch.evidence
        views |= {"right": (right, right_mask), "wrong": (wrong, wrong_mask)}
    return views


class _Layout(NamedTuple):
    """How a host's rows become so many parts."""

    members: list[Int[Host, " member"]]
    """The rows of each part."""
    placed: dict[str, list[list[list[int]]]]
    """By view and part: the packed rows, as lists of positions in `members`."""
    needed: list[int]
    """The most packed rows of a part, by view, then its most response tokens."""


def groups(mesh: Mesh) -> int:
    """Parts of one micro-batch: one for every device that has rows of its own."""
    return math.lcm(mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count())


def pack(batch: Batch, config: DataConfig, mesh: Mesh) -> Batch | Packed:
    """This host's rows packed, or as they are where that saves too little; see `data.packing`.

    All hosts call it together and get the same shapes. Widths are powers of two, numbers of rows
    and of response tokens sizes of `data.bucket`, so that the shapes of a run are few. Of
    micro-batches there are as few as can be with none larger than one of the padded batch: they are
    fuller then, and each reads all weights once.

    Args:
      batch: This host's rows, on the host.
      config: Packing and the most micro-batches.
      mesh: Rows will be split over its `data` and `fsdp` axes.

    Raises:
      InputError: `always`, and the rows do not divide over devices, hosts and micro-batches.
    """
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    if config.packing == "never" or (config.packing == "auto" and on_gpu):
        return batch
    rows, time = batch.responses.shape
    own = groups(mesh) // jax.process_count()
    each, left = divmod(rows, own * config.micro_batches)  # padded rows of a part
    if left:
        if config.packing == "auto":
            return batch
        raise InputError(
            f"data.packing: got always; the {rows} rows of a host must divide by its {own} devices "
            f"x {config.micro_batches} micro-batches; choose auto"
        )
    views = prompts_of(batch)
    lengths = np.sum(batch.response_mask, axis=1, dtype=int)
    totals = {
        name: np.where(lengths > 0, np.sum(mask, axis=1, dtype=int) + lengths, 0)
        for name, (_, mask) in views.items()
    }
    padded = {name: prompts.shape[1] + time for name, (prompts, _) in views.items()}
    longest = sharding.agree_max([int(total.max(initial=1)) for total in totals.values()])
    widths = dict(zip(views, map(_power_of_two, longest), strict=True))
    counts = [n for n in range(1, config.micro_batches + 1) if rows % (own * n) == 0]

    def choose(widths: dict[str, int]) -> tuple[_Layout, dict[str, int], int] | None:
        """The layout in the fewest micro-batches none of which is larger than a padded one."""
        layouts = [_lay_out(totals, lengths, widths, own * count) for count in counts]
        agreed = iter(sharding.agree_max([n for layout in layouts for n in layout.needed]))
        for layout in layouts:
            most = rows // len(layout.members)
            heights = {name: bucket(next(agreed), most, least=1) for name in views}
            tokens = bucket(next(agreed), most * time)
            columns_and_scores = all(
                heights[name] * widths[name] ** power <= each * padded[name] ** power
                for name in views
                for power in (1, 2)
            )
            if columns_and_scores and tokens <= each * time:
                return layout, heights, tokens
        return None

    chosen = choose(widths)
    if config.packing == "always" and chosen is None:
        widths, chosen = padded, choose(padded)
    if chosen is None:
        return batch
    layout, heights, tokens = chosen
    columns = sum(heights[name] * widths[name] for name in views) + tokens
    before = rows * (sum(padded.values()) + time)
    if config.packing == "auto" and len(layout.members) * columns > (1 - SAVING) * before:
        return batch
    return _fill(batch, layout, widths, heights, tokens)


def _power_of_two(length: int) -> int:
    """One size per octave: three quarters would save little, and bring as many shapes again."""
    return max(1 << (length - 1).bit_length(), 16)


def _lay_out(
    totals: dict[str, Int[Host, " row"]],
    lengths: Int[Host, " row"],
    widths: dict[str, int],
    parts: int,
) -> _Layout:
    members = deal(np.sum(list(totals.values()), axis=0), parts)
    placed = {
        name: [first_fit(total[part], widths[name]) for part in members]
        for name, total in totals.items()
    }
    needed = [max(map(len, rows)) for rows in placed.values()]
    return _Layout(members, placed, [*needed, max(int(lengths[part].sum()) for part in members)])


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
    batch: Batch, layout: _Layout, widths: dict[str, int], heights: dict[str, int], tokens: int
) -> Packed:
    """The arrays of a layout, at their agreed sizes."""
    members, masks = layout.members, np.asarray(batch.response_mask)
    parts = len(members)

    def joined(pieces: Iterable[Sequence[np.ndarray]], dtype: type) -> np.ndarray:
        """The pieces of each part one after the other, then filler."""
        out = np.zeros((parts, tokens), dtype)
        for row, own in zip(out, pieces, strict=True):
            together = np.concatenate(own)
            row[: len(together)] = together
        return out

    def of_tokens(array: Either, dtype: type) -> np.ndarray:
        array = np.asarray(array)
        return joined([[array[row][masks[row]] for row in rows] for rows in members], dtype)

    def of_responses(array: Either) -> np.ndarray:
        return np.asarray(array)[np.stack(members)]

    lengths = masks.sum(axis=1)
    owners = [[np.full(lengths[row], i) for i, row in enumerate(rows)] for rows in members]
    return Packed(
        views={name: _view(batch, name, layout, widths, heights, tokens) for name in widths},
        responses=of_tokens(batch.responses, np.int32),
        response_mask=of_tokens(masks, np.bool_),
        sampler_log_probs=of_tokens(batch.sampler_log_probs, np.float32),
        owners=joined(owners, np.int32),
        lengths=of_responses(lengths).astype(np.int32),
        has_context=of_responses(batch.has_context),
        rows=np.stack(members).astype(np.int32),
        judged=batch.judged and Judged(*map(of_responses, batch.judged)),
        has_wrong=batch.evidence and of_responses(batch.evidence.has_wrong),
    )


def _view(
    batch: Batch,
    name: str,
    layout: _Layout,
    widths: dict[str, int],
    heights: dict[str, int],
    tokens: int,
) -> View:
    prompts, prompt_mask = map(np.asarray, prompts_of(batch)[name])
    responses, response_mask = map(np.asarray, (batch.responses, batch.response_mask))
    parts, width = len(layout.members), widths[name]
    shape = (parts, heights[name], width)
    blank = functools.partial(np.zeros, dtype=np.int32)
    view = View(blank(shape), blank(shape), blank(shape), blank((parts, tokens)))
    for part, (members, rows) in enumerate(zip(layout.members, layout.placed[name], strict=True)):
        ends = np.cumsum(response_mask[members].sum(axis=1))  # of the responses' tokens in the part
        for index, row in enumerate(rows):
            end = 0
            for segment, member in enumerate(row, start=1):
                owner = members[member]
                prompt = prompts[owner][prompt_mask[owner]]
                response = responses[owner][response_mask[owner]]
                begin, end = end, end + len(prompt) + len(response)
                view.tokens[part, index, begin:end] = np.concatenate([prompt, response])
                view.segments[part, index, begin:end] = segment
                view.positions[part, index, begin:end] = np.arange(end - begin)
                # A token is predicted at the column before it.
                source = index * width + np.arange(end - len(response) - 1, end - 1)
                view.sources[part, ends[member] - len(response) : ends[member]] = source
    return view


def to_rows(
    batch: Batch | Packed, per_token: Float[Host, "part token"]
) -> list[Float[Host, " time"]]:
    """The values at each response's tokens, in the order of the rows before they were packed.

    Args:
      batch: A host's own, on the host.
      per_token: Its values, in the shape of `batch.responses`.
    """
    mask = np.asarray(batch.response_mask)
    if isinstance(batch, Batch):
        return [values[own] for values, own in zip(per_token, mask, strict=True)]
    rows = {}
    for part, members in enumerate(np.asarray(batch.rows)):
        for response, row in enumerate(members):
            own = mask[part] & (np.asarray(batch.owners)[part] == response)
            rows[int(row)] = per_token[part][own]
    return [rows[row] for row in range(len(rows))]


# ---- on the device -------------------------------------------------------------------------------
# What a step needs of a batch, padded or packed: `token` runs over [row, time] or [part, token].


def response_hidden(
    model: Decoder, batch: Batch | Packed, view: str
) -> Float[Array, "token hidden"]:
    """The hidden states that predict the response tokens after the prompts of a view."""
    if isinstance(batch, Batch):
        rows: Any = (*prompts_of(batch)[view], batch.responses, batch.response_mask)
        hidden = model.response_hidden(*rows)
        return hidden.reshape(-1, hidden.shape[-1])
    *columns, sources = batch.views[view]
    packed: Any = [x.reshape(-1, x.shape[-1]) for x in columns]
    hidden = model.packed_hidden(*packed)
    hidden = hidden.reshape(sources.shape[0], -1, hidden.shape[-1])
    taken = jnp.take_along_axis(hidden, sources[:, :, None], axis=1)
    return taken.reshape(-1, taken.shape[-1])


def micro_batches(batch: Packed, mesh: Mesh) -> int:
    """How many micro-batches the parts of a batch on all hosts make up."""
    return batch.lengths.shape[0] // groups(mesh)


def response_lengths(batch: Batch | Packed) -> Int[Array, " response"]:
    """Tokens of each response, in the order of `has_context`."""
    if isinstance(batch, Packed):
        return jnp.asarray(batch.lengths).reshape(-1)
    return jnp.sum(jnp.asarray(batch.response_mask), axis=1)


def to_tokens(
    batch: Batch | Packed, per_response: Float[Array, " response"]
) -> Float[Array, "row time"] | Float[Array, "part token"]:
    """Every response token's share of a value per response; 0 elsewhere."""
    mask = jnp.asarray(batch.response_mask)
    if isinstance(batch, Batch):
        return mask * per_response[:, None]
    owned = per_response.reshape(batch.lengths.shape)
    return mask * jnp.take_along_axis(owned, batch.owners, axis=1)


def to_mean_1(
    batch: Batch | Packed, per_token: Float[Array, "part token"]
) -> Float[Array, "part token"]:
    """Positive values over their mean over each response's tokens."""
    mask = jnp.asarray(batch.response_mask)
    values = jnp.where(mask, per_token, 0)
    if isinstance(batch, Batch):
        sums = jnp.sum(values, axis=1)
    else:
        add = functools.partial(jax.ops.segment_sum, num_segments=batch.lengths.shape[1])
        sums = jax.vmap(add)(values, batch.owners).reshape(-1)
    mean = sums / jnp.maximum(response_lengths(batch), 1)
    return values / jnp.where(mask, to_tokens(batch, mean), 1)


def has_wrong(batch: Batch | Packed) -> Bool[Array, " response"]:
    """Whether each response's group has a wrong one to show."""
    found = batch.has_wrong if isinstance(batch, Packed) else None
    if isinstance(batch, Batch) and batch.evidence is not None:
        found = batch.evidence.has_wrong
    assert found is not None
    return jnp.asarray(found).reshape(-1)


def padding_fraction(batch: Batch | Packed) -> Float[Array, ""]:
    """The part of all columns, of every view and of the vocabulary pass, that holds no token."""
    masks = [batch.response_mask]
    if isinstance(batch, Packed):
        masks += [view.segments > 0 for view in batch.views.values()]
    else:
        for _, mask in prompts_of(batch).values():
            masks += [mask, batch.response_mask]
    held = [jnp.sum(jnp.asarray(mask), dtype=jnp.float32) for mask in masks]
    columns = sum(mask.size for mask in masks)
    return (columns - jnp.stack(held).sum()) / columns
