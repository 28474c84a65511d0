"""Responses to questions: one prefill per question, then decoding in slots that are refilled.

A question's prompt is prefilled once and copied to the slots of its samples. A slot whose response
has ended takes the next one of the queue between two jitted calls, so one long response does not
hold the others. Compiled programs depend on bucketed sizes only, never on the lengths of responses.

A response's random numbers derive from its question's and its own index and the token's, nothing
else: the same responses come from any number of slots, any batch and any mesh.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from pgpo_jax import sharding
from pgpo_jax.data import bucket
from pgpo_jax.distributions import Vocabulary
from pgpo_jax.errors import InputError, require
from pgpo_jax.models import merge
from pgpo_jax.sampler import decode
from pgpo_jax.sampler.decode import Entry, compilations

__all__ = ["Samples", "SamplingConfig", "compilations", "lower_programs", "sample"]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn."""

    num_samples: int = 8
    """Responses per question (a group)."""
    max_response_length: int = 8192
    """Tokens after which a response is cut, the end token included."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_p: float = 1.0
    """Only the most probable tokens that together have this mass (after top_k) are drawn."""
    top_k: int | None = None
    """Only this many most probable tokens are drawn (None: all); those tied with the last too."""
    end_tokens: tuple[int, ...] = ()
    """A response ends with the first of these that it draws."""
    vocab_size: int | None = None
    """Tokens from this id on are never drawn: rows that only pad the vocabulary (None: all are)."""
    unknown_tokens: tuple[int, ...] = ()
    """Tokens before it that are never drawn either; a run adds ids that its tokenizer lacks."""
    slots: int | None = None
    """Responses decoded at a time, refilled from the queue as they end (None: all at once)."""
    chunk: int = 64
    """Most decoding steps between two looks of the host at what has ended."""
    ring: int = 256
    """Response tokens the cache first has room for; doubled when a live response needs more."""
    prefill_tokens: int = 16_384
    """Most prompt tokens prefilled at a time, padding included."""
    cache_dtype: str | None = None
    """Type of cached keys and values (None: the compute type)."""
    gather_weights: bool = True
    """Decode with weights whole over the mesh's fsdp axis, gathered once and not in every step."""

    def __post_init__(self):
        least_one = {
            name: (getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
            for name in (
                *("num_samples", "max_response_length", "top_k", "vocab_size", "slots"),
                *("chunk", "ring", "prefill_tokens"),
            )
        }
        require(
            "sampling",
            self,
            **least_one,
            temperature=(self.temperature >= 0, "0 or more"),
            top_p=(0 < self.top_p <= 1, "in (0, 1]"),
            unknown_tokens=(min(self.unknown_tokens, default=0) >= 0, "tokens, 0 or more"),
        )

    def vocabulary(self) -> Vocabulary:
        """Which tokens may be drawn, for the loss: its distributions must be over the same."""
        return Vocabulary(self.vocab_size, self.unknown_tokens)

    def rule(self) -> decode.Rule:
        """What the compiled programs depend on; other sizes must not compile them anew."""
        return decode.Rule(**{name: getattr(self, name) for name in decode.Rule._fields})


class Samples(NamedTuple):
    """Responses, padded on the right to `max_response_length`."""

    tokens: Int[Array, "question sample time"]
    """0 where the mask is False."""
    mask: Bool[Array, "question sample time"]
    """True at a response's tokens, its end token included."""
    log_probs: Float[Array, "question sample time"]
    """float32, nats, under the distribution each token was drawn from (`decoding.distribution`); at
    temperature 0, which draws nothing, under the model's own. 0 where the mask is False."""


def sample(
    graphdef: Any,
    params: Any,
    prompts: Int[Array | np.ndarray, "question time"],
    prompt_mask: Bool[Array | np.ndarray, "question time"],
    key: Key[Array, ""] | UInt32[Array, " key"],
    config: SamplingConfig,
    *,
    limits: Int[np.ndarray, "question sample"] | None = None,
) -> Samples:
    """Draws `config.num_samples` responses to every question.

    Args:
      graphdef: The model, see `model.init`.
      params: Its parameters, wherever they live; decoding runs on their mesh.
      prompts: Left-padded, host or device arrays. With several processes: global arrays, or the
        same host arrays everywhere.
      prompt_mask: True at tokens.
      key: Consumed; response `[q, s]` uses `fold_in(fold_in(key, q), s)`, its token t a further
        `fold_in(.., t)`.
      config: How to draw.
      limits: Most tokens of every response, from 1 to `max_response_length` (None: the latter).

    Returns:
      `Samples`, global arrays with questions split over the mesh's batch axes where they divide.

    Raises:
      InputError: Shapes that do not match, a prompt that is empty or not left-padded.
    """
    tokens, lengths = _read_prompts(prompts, prompt_mask)
    questions, group, longest = tokens.shape[0], config.num_samples, config.max_response_length
    limits = np.full((questions, group), longest) if limits is None else np.asarray(limits)
    if limits.shape != (questions, group) or limits.min() < 1 or limits.max() > longest:
        raise InputError(
            f"limits: got shape {limits.shape}; must be [{questions}, {group}], from 1 to {longest}"
        )
    mesh = _mesh_of(params)
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    run, dtype = _programs(graphdef, params, mesh, config, str(jax.random.key_impl(key)))
    weights = _splitter(params, dtype, config.gather_weights)(params)
    put = functools.partial(sharding.place, where=sharding.replicated(mesh))
    key_data = put(jax.random.key_data(key))

    sizes = _sizes(config, questions, tokens.shape[1], mesh)
    slots, columns, ring, parts = sizes.slots, sizes.columns, sizes.ring, sizes.parts
    queue = _Queue(tokens, lengths, limits, sizes.block)
    state, prefix = run.empty(slots=slots, columns=columns + ring), None
    shape = (questions * group, longest)
    out_tokens, out_mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    out_log_probs = np.zeros(shape, np.float32)
    response = np.zeros(slots, int)  # that a slot decodes
    active, count = np.zeros(slots, bool), np.zeros(slots, int)
    while queue.left or active.any():
        while queue.left and not active.all():
            if (block := queue.block()) is not None:
                prefix = run.prefill(params, *put(block))
            new = queue.entry(np.flatnonzero(~active), slots, parts)
            state = run.enter(state, prefix, put(new))
            response = np.where(new.assigned, new.question * group + new.sample, response)
            active, count = active | new.assigned, np.where(new.assigned, 0, count)
        room = ring - count[active].max()
        if room == 0:
            ring = min(2 * ring, longest)
            state = run.grow(state, prompt_columns=columns, columns=columns + ring)
            continue
        # While responses wait, come back as soon as enough slots have ended to be worth a refill.
        until = max(slots // 32, 1) if queue.left else slots + 1
        state, report = run.decode(weights, state, key_data, put(np.asarray([room, until])))
        report = sharding.fetch(report)
        for slot in np.flatnonzero(active):
            row, first, last = response[slot], count[slot], report.count[slot]
            out_tokens[row, first:last] = report.tokens[slot, : last - first]
            out_log_probs[row, first:last] = report.log_probs[slot, : last - first]
            out_mask[row, first:last] = True
        active, count = report.active, report.count

    def place(array):
        array = array.reshape(questions, group, longest)
        return sharding.place(array, sharding.row_sharding(array.shape, mesh))

    return Samples(place(out_tokens), place(out_mask), place(out_log_probs))


class _Sizes(NamedTuple):
    """What the compiled programs of a call depend on."""

    parts: int  # the batch axes' devices, which slots and blocks divide over
    slots: int
    block: int  # questions prefilled at a time
    columns: int  # of the prompts
    ring: int  # the first one


def _sizes(config: SamplingConfig, questions: int, columns: int, mesh: Mesh) -> _Sizes:
    group, parts = config.num_samples, mesh.shape["data"] * mesh.shape["fsdp"]
    # Rows divide over the mesh; slots beyond the responses stay idle.
    slots = _round_up(min(config.slots or questions * group, questions * group), parts)
    block = min(-(-slots // group), max(config.prefill_tokens // columns, 1))
    ring = min(config.ring, config.max_response_length)
    return _Sizes(parts, slots, _round_up(block, parts), columns, ring)


class Lowered(NamedTuple):
    """A program of sampling ready to be compiled, and what lives beside it."""

    program: jax.stages.Lowered
    beside: tuple[Any, ...]
    """Trees of shapes with shardings that are neither its arguments nor its results."""


def lower_programs(
    graphdef: Any, shapes: Any, config: SamplingConfig, *, questions: int, prompt_length: int
) -> dict[str, Lowered]:
    """The programs that `sample` runs, each at its largest, to compile ahead of time without data.

    Args:
      graphdef: The model.
      shapes: `jax.ShapeDtypeStruct` of the parameters, with their shardings on a mesh of devices
        or of a topology's devices.
      config: How to draw.
      questions: Their number in a call.
      prompt_length: Tokens of the longest prompt.

    Returns:
      In the order of a call: `weights` (made from the parameters), `prefill` (of a block of
      questions), `enter` (into the slots), `grow` (to the longest ring; absent where the first one
      is), `decode`. The parameters count with all of them, beside what is listed.
    """
    mesh = _mesh_of(shapes)
    run, dtype = _programs(graphdef, shapes, mesh, config, "threefry2x32")
    sizes = _sizes(config, questions, bucket(prompt_length, 2**30), mesh)
    whole = sharding.replicated(mesh)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def state(ring: int) -> Any:
        return run.empty.eval_shape(slots=sizes.slots, columns=sizes.columns + ring)

    split = _splitter(shapes, dtype, config.gather_weights)
    weights = split.eval_shape(shapes)
    block = array(sizes.block, sizes.columns), array(sizes.block, sizes.columns)
    prefix = run.prefill.eval_shape(shapes, *block)
    several = sizes.block < questions  # blocks: the one before lives until the next is there
    refilled = sizes.slots < questions * config.num_samples  # after the ring has grown
    row, longest = array(sizes.slots), config.max_response_length
    copies = array(sizes.parts, sizes.slots // sizes.parts, 2)
    assigned, number = array(sizes.slots, dtype=jnp.bool_), array(sizes.parts)
    entry = Entry._make((assigned, *(row,) * 6, copies, number))
    entered = state(longest if refilled else sizes.ring)
    found = {
        "weights": Lowered(split.lower(shapes), ()),
        "prefill": Lowered(
            run.prefill.lower(shapes, *block), (weights, entered, *(prefix,) * several)
        ),
        "enter": Lowered(run.enter.lower(entered, prefix, entry), (weights,)),
    }
    rings = [sizes.ring]
    while rings[-1] < longest:
        rings.append(min(2 * rings[-1], longest))
    if len(rings) > 1:
        before, columns = state(rings[-2]), sizes.columns
        grow = run.grow.lower(before, prompt_columns=columns, columns=columns + longest)
        found["grow"] = Lowered(grow, (weights, prefix))
    decode = run.decode.lower(weights, state(longest), array(2, dtype=jnp.uint32), array(2))
    return found | {"decode": Lowered(decode, (prefix,))}


class _Queue:
    """Responses not yet begun, in order, and the block of questions prefilled last."""

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, limits: np.ndarray, size: int):
        self.tokens, self.lengths, self.limits = tokens, lengths, limits
        self.size = size  # questions in a block
        self.first = 0  # question of the block
        self.end = 0  # of the block, in responses
        self.next = 0  # response to begin: question * group + sample

    @property
    def left(self) -> int:
        return self.limits.size - self.next

    def block(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens and positions of the next block, if the present one is used up."""
        if self.next < self.end:
            return None
        self.first = self.next // self.limits.shape[1]
        self.end = min((self.first + self.size) * self.limits.shape[1], self.limits.size)
        rows = slice(self.first, self.first + self.size)
        missing = self.size - self.tokens[rows].shape[0]
        tokens = np.pad(self.tokens[rows], ((0, missing), (0, 0)))
        lengths = np.pad(self.lengths[rows], (0, missing))
        positions = np.arange(tokens.shape[1])[None, :] - (tokens.shape[1] - lengths)[:, None]
        positions[:, -1] = -1  # the last token is fed by the first decoding step, into the ring
        return tokens.astype(np.int32), np.maximum(positions, -1).astype(np.int32)

    def entry(self, free: np.ndarray, slots: int, parts: int) -> Entry:
        """The next responses of the block, as many as there are slots in `free`."""
        free = free[: self.end - self.next]
        response = np.arange(self.next, self.next + len(free))
        self.next += len(free)
        question, sample = np.divmod(response, self.limits.shape[1])

        def by_slot(values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
            out = np.zeros(slots, dtype)
            out[free] = values
            return out

        own = slots // parts
        copies, number = np.zeros((parts, own, 2), np.int32), np.zeros(parts, np.int32)
        for slot, row in zip(free, question - self.first, strict=True):
            part = slot // own
            copies[part, number[part]] = slot % own, row
            number[part] += 1
        return Entry(
            assigned=by_slot(np.ones(len(free)), bool),
            row=by_slot(question - self.first),
            token=by_slot(self.tokens[question, -1]),
            position=by_slot(self.lengths[question] - 1),
            limit=by_slot(self.limits[question, sample]),
            question=by_slot(question),
            sample=by_slot(sample),
            copies=copies,
            number=number,
        )


def _read_prompts(prompts: Any, prompt_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Whole prompts on the host, trimmed to a bucketed width, and their lengths."""
    tokens, mask = sharding.fetch((prompts, prompt_mask))
    mask = mask.astype(bool)
    if tokens.ndim != 2 or tokens.shape != mask.shape or not tokens.size:
        raise InputError(
            f"prompts: got shape {tokens.shape} and mask {mask.shape}; both are [question, time]"
        )
    lengths = mask.sum(axis=1)
    if not mask[:, -1].all() or (mask[:, :-1] > mask[:, 1:]).any():
        bad = int(np.argmin(mask[:, -1] & ~(mask[:, :-1] > mask[:, 1:]).any(axis=1)))
        raise InputError(
            f"prompt_mask: got row {bad}; tokens must end their row, padding on the left"
        )
    width = bucket(int(lengths.max()), 2**30)
    tokens = np.where(mask, tokens, 0)
    tokens = tokens[:, -width:]
    return np.pad(tokens, ((0, 0), (width - tokens.shape[1], 0))), lengths


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _mesh_of(params: Any) -> Mesh:
    """The mesh that parameters live on; one of a single device if they know none."""
    where = jax.tree.leaves(params)[0].sharding
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
        return where.mesh
    return sharding.make_mesh(sharding.MeshConfig(), devices=list(where.device_set))


def _programs(
    graphdef: Any, params: Any, mesh: Mesh, config: SamplingConfig, key_type: str
) -> tuple[decode.Programs, Any]:
    """The programs for a model, and its compute type."""
    decoder = merge(graphdef, params)
    options = dataclasses.replace(decoder.options, mesh=mesh if mesh.size > 1 else None)
    run = decode.programs(decoder.config, options, mesh, config.rule(), key_type)
    return run, options.dtype


def _splitter(params: Any, dtype: Any, gather: bool) -> Any:
    """Jitted: parameters -> weights as decoding reads them, made once a call.

    They are of the compute type (norms stay as they are: the model multiplies with them in
    float32), split by layer, and whole over fsdp if `gather`.
    """
    leaves, tree = jax.tree.flatten(params)
    depth = next(iter(params["layers"].values())).shape[0]
    return _make_splitter(tree, tuple(x.sharding for x in leaves), depth, dtype, gather)


@functools.cache
def _make_splitter(tree: Any, places: tuple[Any, ...], depth: int, dtype: Any, gather: bool) -> Any:
    def split(params: Any) -> tuple[Any, tuple[Any, ...]]:
        cast = {
            name: x if name.endswith("norm") else x.astype(dtype)
            for name, x in (params["layers"] | params).items()
            if name != "layers"
        }
        layers = tuple({name: cast[name][i] for name in params["layers"]} for i in range(depth))
        return {name: cast[name] for name in params if name != "layers"}, layers

    def place(where: Any, stacked: bool) -> Any:
        if not isinstance(where, NamedSharding):
            return where
        axes = [None if gather and axis == "fsdp" else axis for axis in where.spec]
        return NamedSharding(where.mesh, PartitionSpec(*axes[stacked:]))

    where = tree.unflatten(places)
    outer = {name: place(x, False) for name, x in where.items() if name != "layers"}
    layer = {name: place(x, True) for name, x in where["layers"].items()}
    return decode.counted_jit(split, out_shardings=(outer, (layer,) * depth))
