"""The layout of a batch: one sequence a row, or several, so that one long response does not make
all rows as wide as itself.

The host lays out (numpy) every *part* of a batch by itself: what one device works on in one
micro-batch. Which response is in which part changes no number, for the weights are those of the
whole batch.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from pgpo_jax import sharding
from pgpo_jax.data.batch import Batch, View, parts_of
from pgpo_jax.data.records import DataConfig, Examples, Host
from pgpo_jax.data.tokens import bucket
from pgpo_jax.errors import InputError

SAVING = 0.2
"""`auto` packs where this part of the columns of one sequence a row is saved."""


class _Layout(NamedTuple):
    """How a host's rows become so many parts, and the sizes that all hosts give them."""

    members: list[Int[Host, " member"]]
    """The rows of each part."""
    placed: dict[str, list[list[list[int]]]]
    """By view and part: the rows, as lists of positions in `members`."""
    widths: dict[str, int]
    """Columns of a view's rows."""
    heights: dict[str, int]
    """Rows of a view in a part."""
    tokens: int
    """Response tokens of a part, filled up."""
    packed: bool
    """Whether a row may hold several sequences."""

    @property
    def columns(self) -> int:
        """All columns of all parts."""
        views = sum(self.heights[view] * width for view, width in self.widths.items())
        return len(self.members) * (views + self.tokens)


class _Sizes(NamedTuple):
    """What decides a layout: lengths, and the most that a part may be."""

    totals: dict[str, Int[Host, " row"]]
    """Tokens of prompt and response, by view; 0 for an empty response."""
    lengths: Int[Host, " row"]
    """Tokens of each response."""
    longest: dict[str, int]
    """The largest of the totals, of all hosts."""
    limits: dict[str, int]
    """Columns of the padded prompts and responses together, by view."""
    time: int
    """Columns of the padded responses."""


def pack(examples: Examples, config: DataConfig, mesh: Mesh) -> Batch:
    """This host's rows, laid out for the update; see `data.packing`.

    All hosts call it together and get the same shapes. Widths and numbers of rows and of response
    tokens come in steps, so that the shapes of a run are few. Packed, there are as few
    micro-batches as can be with none larger than one of padded rows: they are fuller then, and each
    reads all weights once.

    Args:
      examples: This host's rows.
      config: Packing and the most micro-batches.
      mesh: Rows will be split over its `data` and `fsdp` axes.

    Raises:
      InputError: The rows do not divide over devices, hosts and micro-batches.
    """
    rows, own = len(examples.responses), parts_of(mesh) // jax.process_count()
    if rows % (own * config.micro_batches):
        raise InputError(
            f"data.micro_batches: got {config.micro_batches}; the {rows} rows of a host must divide"
            f" by its {own} devices x the micro-batches"
        )
    sizes = _measure(examples)
    layout = _one_a_row(sizes, own * config.micro_batches)
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    if config.packing == "always" or (config.packing == "auto" and not on_gpu):
        counts = [n for n in range(1, config.micro_batches + 1) if rows % (own * n) == 0]
        parts = [own * count for count in counts]
        widths = {view: _power_of_two(size) for view, size in sizes.longest.items()}
        packed = _several_a_row(sizes, widths, parts)
        if config.packing == "always" and packed is None:
            packed = _several_a_row(sizes, sizes.limits, parts)
        asked = config.packing == "always"
        if packed is not None and (asked or packed.columns <= (1 - SAVING) * layout.columns):
            layout = packed
    return _fill(examples, layout)


def _measure(examples: Examples) -> _Sizes:
    lengths = np.sum(examples.response_mask, axis=1, dtype=int)
    totals = {
        view: np.where(lengths > 0, np.sum(mask, axis=1, dtype=int) + lengths, 0)
        for view, (_, mask) in examples.prompts.items()
    }
    longest = sharding.agree_max([int(total.max(initial=1)) for total in totals.values()])
    time = examples.responses.shape[1]
    limits = {view: prompts.shape[1] + time for view, (prompts, _) in examples.prompts.items()}
    return _Sizes(totals, lengths, dict(zip(totals, longest, strict=True)), limits, time)


def _one_a_row(sizes: _Sizes, parts: int) -> _Layout:
    """One sequence a row, every row as wide as the longest prompt and the longest response.

    Shapes must be few, for each is a compilation: widths are those that came in, and the response
    tokens fill all of their columns, a half, a quarter or an eighth of them.
    """
    members = deal(np.sum(list(sizes.totals.values()), axis=0), parts)
    each = len(sizes.lengths) // parts
    (tokens,) = sharding.agree_max([max(int(sizes.lengths[part].sum()) for part in members)])
    halves = [-(-each * sizes.time // 2**k) for k in range(4)]
    return _Layout(
        members,
        placed={view: [[[row] for row in range(each)]] * parts for view in sizes.totals},
        widths=sizes.limits,
        heights=dict.fromkeys(sizes.totals, each),
        tokens=min(size for size in halves if size >= tokens),
        packed=False,
    )


def _several_a_row(sizes: _Sizes, widths: dict[str, int], counts: Sequence[int]) -> _Layout | None:
    """The layout in the fewest parts of which none is larger than the last count's, padded."""
    views, rows = list(sizes.totals), len(sizes.lengths)
    each = rows // counts[-1]
    drafts = []
    for count in counts:
        members = deal(np.sum(list(sizes.totals.values()), axis=0), count)
        placed = {
            view: [first_fit(total[part], widths[view]) for part in members]
            for view, total in sizes.totals.items()
        }
        drafts.append((members, placed))
    needed = [
        [max(map(len, placed[view])) for view in views]
        + [max(int(sizes.lengths[part].sum()) for part in members)]
        for members, placed in drafts
    ]
    agreed = iter(sharding.agree_max([size for draft in needed for size in draft]))
    for members, placed in drafts:
        most = rows // len(members)
        heights = {view: bucket(next(agreed), most, least=1) for view in views}
        tokens = bucket(next(agreed), most * sizes.time)
        columns_and_scores = all(
            heights[view] * widths[view] ** power <= each * sizes.limits[view] ** power
            for view in views
            for power in (1, 2)
        )
        if columns_and_scores and tokens <= each * sizes.time:
            return _Layout(members, placed, widths, heights, tokens, packed=True)
    return None


def _power_of_two(length: int) -> int:
    """One size per octave: three quarters would save little, and bring as many shapes again."""
    return max(1 << (length - 1).bit_length(), 16)


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


def _fill(examples: Examples, layout: _Layout) -> Batch:
    """The arrays of a layout."""
    members, masks = layout.members, np.asarray(examples.response_mask)
    parts = len(members)

    def joined(pieces: Iterable[Sequence[np.ndarray]], dtype: type) -> np.ndarray:
        """The pieces of each part one after the other, then filler."""
        out = np.zeros((parts, layout.tokens), dtype)
        for row, own in zip(out, pieces, strict=True):
            together = np.concatenate(own)
            row[: len(together)] = together
        return out

    def of_tokens(array: np.ndarray, dtype: type) -> np.ndarray:
        array = np.asarray(array)
        return joined([[array[row][masks[row]] for row in rows] for rows in members], dtype)

    def of_responses(array: np.ndarray) -> np.ndarray:
        return np.asarray(array)[np.stack(members)]

    lengths, old = masks.sum(axis=1), examples.old_log_probs
    owners = [[np.full(lengths[row], i) for i, row in enumerate(rows)] for rows in members]
    views, held = {}, lengths.copy()
    for name in layout.widths:
        views[name] = _view(examples, name, layout)
        held += np.where(lengths > 0, examples.prompts[name][1].sum(axis=1) + lengths, 0)
    return Batch(
        views=views,
        responses=of_tokens(examples.responses, np.int32),
        response_mask=of_tokens(masks, np.bool_),
        sampler_log_probs=of_tokens(examples.sampler_log_probs, np.float32),
        owners=joined(owners, np.int32),
        lengths=of_responses(lengths).astype(np.int32),
        has_context=of_responses(examples.has_context),
        rows=np.stack(members).astype(np.int32),
        held=of_responses(held).sum(axis=1).astype(np.int32),
        group=jax.tree.map(of_responses, examples.group),
        has_wrong=None if examples.has_wrong is None else of_responses(examples.has_wrong),
        old_log_probs=None if old is None else of_tokens(old, np.float32),
    )


def _view(examples: Examples, name: str, layout: _Layout) -> View:
    """The rows of one view."""
    prompts, prompt_mask = map(np.asarray, examples.prompts[name])
    responses, response_mask = map(np.asarray, (examples.responses, examples.response_mask))
    parts, width = len(layout.members), layout.widths[name]
    tokens = np.zeros((parts, layout.heights[name], width), np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    sources = np.zeros((parts, layout.tokens), np.int32)
    for part, (members, rows) in enumerate(zip(layout.members, layout.placed[name], strict=True)):
        ends = np.cumsum(response_mask[members].sum(axis=1))  # of the responses' tokens in the part
        for index, row in enumerate(rows):
            end = 0
            for segment, member in enumerate(row, start=1):
                owner = members[member]
                response = responses[owner][response_mask[owner]]
                if len(response) == 0:  # nothing to predict
                    continue
                prompt = prompts[owner][prompt_mask[owner]]
                begin, end = end, end + len(prompt) + len(response)
                tokens[part, index, begin:end] = np.concatenate([prompt, response])
                segments[part, index, begin:end] = segment
                positions[part, index, begin:end] = np.arange(end - begin)
                # A token is predicted at the column before it.
                source = index * width + np.arange(end - len(response) - 1, end - 1)
                sources[part, ends[member] - len(response) : ends[member]] = source
    return View(tokens, sources, *((segments, positions) if layout.packed else ()))
