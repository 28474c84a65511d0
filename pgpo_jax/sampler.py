"""Responses to questions: one prefill per question, then decoding in slots that are refilled.

Every row of the cache is a slot that decodes one response. A question's prompt is prefilled once
and copied to its samples' slots; a slot whose response has ended takes the next one of the queue
between two jitted calls, so one long response does not hold the others. The cache of a slot is its
prompt followed by a ring of columns that all slots write at the same place in each step; what a
column holds is told by the position stored with it, so refilling needs no scatter and compiled
programs depend on bucketed sizes only, never on the lengths of responses.

A response's random numbers derive from its question's and its own index and the token's, nothing
else: the same responses come from any number of slots, any batch and any mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from pgpo_jax import sharding
from pgpo_jax.data import bucket
from pgpo_jax.errors import InputError
from pgpo_jax.model import Cache, ModelConfig, Options, make_graphdef


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
        for name in ("num_samples", "max_response_length", "top_k", "vocab_size", "slots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"sampling.{name}: got {value}; must be at least 1")
        for name in ("chunk", "ring", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"sampling.{name}: got {getattr(self, name)}; must be at least 1")
        if not self.temperature >= 0:
            raise InputError(f"sampling.temperature: got {self.temperature}; must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p: got {self.top_p}; must be in (0, 1]")


class Samples(NamedTuple):
    """Responses, padded on the right to `max_response_length`."""

    tokens: Int[Array, "question sample time"]
    """0 where the mask is False."""
    mask: Bool[Array, "question sample time"]
    """True at a response's tokens, its end token included."""
    log_probs: Float[Array, "question sample time"]
    """float32, nats, under the distribution each token was drawn from (`distribution`); at
    temperature 0, which draws nothing, under the model's own. 0 where the mask is False."""


def sample(
    graphdef: Any,
    params: Any,
    prompts: Int[Array, "question time"],
    prompt_mask: Bool[Array, "question time"],
    key: Key[Array, ""],
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
    model = nnx.merge(graphdef, params)
    key_type = str(jax.random.key_impl(key))
    run = _programs(model.config, model.options, mesh, _rules(config), key_type)
    weights = _decode_weights(params, run.dtype, config.gather_weights)
    put = functools.partial(sharding.place, where=sharding.replicated(mesh))
    key_data = put(jax.random.key_data(key))

    # Rows divide over the mesh; slots beyond the responses stay idle.
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    columns = tokens.shape[1]
    slots = _round_up(min(config.slots or questions * group, questions * group), parts)
    in_block = min(-(-slots // group), max(config.prefill_tokens // columns, 1))
    queue = _Queue(tokens, lengths, limits, _round_up(in_block, parts))

    ring = min(config.ring, longest)
    state, prefix = run.empty(slots=slots, columns=columns + ring), None
    shape = (questions * group, longest)
    out = Samples(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32))
    response = np.zeros(slots, int)  # that a slot decodes
    active, count = np.zeros(slots, bool), np.zeros(slots, int)
    while queue.left or active.any():
        while queue.left and not active.all():
            if (block := queue.block()) is not None:
                prefix = run.prefill(weights, *put(block))
            new = queue.admit(np.flatnonzero(~active), slots, parts)
            state = run.admit(state, prefix, put(new))
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
            out.tokens[row, first:last] = report.tokens[slot, : last - first]
            out.log_probs[row, first:last] = report.log_probs[slot, : last - first]
            out.mask[row, first:last] = True
        active, count = report.active, report.count

    def place(array):
        array = array.reshape(questions, group, longest)
        return sharding.place(array, sharding.row_sharding(array.shape, mesh))

    return Samples(*map(place, out))


def compilations() -> int:
    """Programs compiled by this module so far, in this process."""
    return sum(function._cache_size() for function in _JITTED)


def lower_decode(
    graphdef: Any, mesh: Mesh, shapes: Any, config: SamplingConfig, *, slots: int, columns: int
) -> jax.stages.Lowered:
    """The decoding program for given sizes, ready to compile ahead of time without any data.

    Args:
      graphdef: The model.
      mesh: Devices or a topology's devices.
      shapes: `jax.ShapeDtypeStruct` of the parameters, with their shardings.
      config: How to draw.
      slots: Rows of the cache.
      columns: Its columns: prompt and ring.
    """
    model = nnx.merge(graphdef, shapes)
    run = _programs(model.config, model.options, mesh, _rules(config), "threefry2x32")
    types = _decode_types(shapes, run.dtype)
    places = _decode_shardings(shapes, config.gather_weights)
    leaves, tree = jax.tree.flatten(shapes)
    weights = tree.unflatten(
        jax.ShapeDtypeStruct(x.shape, to, sharding=place)
        for x, to, place in zip(leaves, types, places, strict=True)
    )
    state = run.empty.eval_shape(slots=slots, columns=columns)
    whole = sharding.replicated(mesh)
    key_data = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
    budget = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    return run.decode.lower(weights, state, key_data, budget)


def distribution(
    logits: Float[Array, "row vocab"], config: SamplingConfig
) -> Float[Array, "row vocab"]:
    """Log-probabilities (float32, nats) that tokens are drawn with; -inf at those that never are.

    Logits are divided by the temperature, then reduced to the `top_k` most probable tokens, then
    to the fewest most probable that together reach `top_p` (Holtzman et al., The Curious Case of
    Neural Text Degeneration, section 3.1, https://arxiv.org/abs/1904.09751). Ties with the last
    token kept are kept. At temperature 0: the model's own, without any of this.
    """
    scores = logits.astype(jnp.float32)
    if config.vocab_size is not None:
        unused = jnp.arange(scores.shape[-1]) >= config.vocab_size
        scores = jnp.where(unused[None, :], -jnp.inf, scores)
    if config.temperature > 0:
        scores = scores / config.temperature
        if config.top_k is not None and config.top_k < scores.shape[-1]:
            least = lax.top_k(scores, config.top_k)[0][:, -1:]
            scores = jnp.where(scores >= least, scores, -jnp.inf)
        if config.top_p < 1:
            scores = _nucleus(scores, config.top_p)
    return jax.nn.log_softmax(scores)


def _nucleus(scores: Float[Array, "row vocab"], top_p: float) -> Float[Array, "row vocab"]:
    """-inf outside the nucleus, found by bisection: exact like sorting, and some times cheaper.

    The bit patterns of positive floats are ordered like the floats, so 31 halvings pin down the
    largest probability p such that the tokens of at least p have the mass `top_p`.
    """
    probs = jax.nn.softmax(scores)
    bits = lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle, probs, 0), axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jnp.max(bits, axis=-1, keepdims=True) + 1
    low, _ = lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return jnp.where(bits >= low, scores, -jnp.inf)


def _draw(
    logits: Float[Array, "row vocab"], keys: Key[Array, " row"], config: SamplingConfig
) -> tuple[Int[Array, " row"], Float[Array, " row"]]:
    """A token for every row and its log-probability."""
    log_probs = distribution(logits, config)
    noisy = log_probs
    if config.temperature > 0:  # the largest of log p + Gumbel noise is a draw from p
        noise = jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[1:]))(keys)
        noisy = log_probs + noise
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]


class _State(NamedTuple):
    """What decoding carries on the devices; a row is a slot."""

    cache: Cache  # columns: prompt, then ring
    prompt_columns: Int[Array, ""]
    steps: Int[Array, ""]  # of decoding; the ring's column is steps % its size
    token: Int[Array, " slot"]  # to feed next: the prompt's last, then what was drawn
    position: Int[Array, " slot"]  # its position
    count: Int[Array, " slot"]  # tokens drawn
    limit: Int[Array, " slot"]
    question: Int[Array, " slot"]
    sample: Int[Array, " slot"]
    active: Bool[Array, " slot"]


class _Report(NamedTuple):
    """What the host sees after a decoding call, whole on every host."""

    count: Int[Array, " slot"]
    active: Bool[Array, " slot"]
    tokens: Int[Array, "slot chunk"]  # of this call, from the left
    log_probs: Float[Array, "slot chunk"]


class _Admitted(NamedTuple):
    """Responses that enter slots, as the device needs them."""

    assigned: Bool[np.ndarray, " slot"]
    row: Int[np.ndarray, " slot"]  # of the prefilled block
    token: Int[np.ndarray, " slot"]
    position: Int[np.ndarray, " slot"]
    limit: Int[np.ndarray, " slot"]
    question: Int[np.ndarray, " slot"]
    sample: Int[np.ndarray, " slot"]
    copies: Int[np.ndarray, "part slot 2"]  # for each batch shard: its own slots, and their rows
    number: Int[np.ndarray, " part"]  # of copies in each shard


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

    def admit(self, free: np.ndarray, slots: int, parts: int) -> _Admitted:
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
        return _Admitted(
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


class _Programs(NamedTuple):
    """The jitted functions of one model on one mesh under one way to draw."""

    empty: Any
    prefill: Any
    admit: Any
    grow: Any
    decode: Any
    dtype: Any


_JITTED: list[Any] = []


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    _JITTED.append(jax.jit(function, **options))
    return _JITTED[-1]


@functools.cache
def _programs(
    architecture: ModelConfig, options: Options, mesh: Mesh, config: SamplingConfig, key_type: str
) -> _Programs:
    """Compiles nothing yet. `config` holds only what the programs depend on (`_rules`)."""
    # Written out, layers decode faster on a CPU; elsewhere a scan compiles sooner.
    unroll = options.unroll or mesh.devices.flat[0].platform == "cpu"
    options = dataclasses.replace(options, mesh=mesh if mesh.size > 1 else None, unroll=unroll)
    graphdef = make_graphdef(architecture, options)
    cache_dtype = jnp.dtype(config.cache_dtype or options.dtype)
    whole = sharding.replicated(mesh)
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    heads = sharding.spec(("kv_heads",), (architecture.num_key_value_heads,), mesh)[0]
    cache_spec = PartitionSpec(None, sharding.BATCH_AXES, None, heads)
    cache_rows = NamedSharding(mesh, cache_spec)
    where = _State(
        Cache(cache_rows, cache_rows, rows), whole, whole, rows, rows, rows, rows, rows, rows, rows
    )

    def model(weights):
        return nnx.merge(graphdef, weights)

    def empty(*, slots: int, columns: int) -> _State:
        shape = (architecture.num_hidden_layers, slots, columns)
        shape += (architecture.num_key_value_heads, architecture.head_dim)
        zero, row = jnp.zeros((), jnp.int32), jnp.zeros(slots, jnp.int32)
        keys, values = jnp.zeros(shape, cache_dtype), jnp.zeros(shape, cache_dtype)
        cache = Cache(keys, values, jnp.full((slots, columns), -1, jnp.int32))
        return _State(cache, zero, zero, row, row, row, row, row, row, row > 0)

    def prefill(weights, tokens, positions) -> Cache:
        decoder = model(weights)
        cache = decoder.init_cache(*tokens.shape, cache_dtype)
        return decoder.extend(tokens, positions, cache, 0)[1]

    def admit(state: _State, prefix: Cache, new: _Admitted) -> _State:
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(
                cache_spec,
                PartitionSpec(None, None, None, heads),
                PartitionSpec(sharding.BATCH_AXES),
                PartitionSpec(sharding.BATCH_AXES),
            ),
            out_specs=cache_spec,
        )
        def copy(stored, prefix, copies, number):
            def one(i, stored):
                slot, row = copies[0, i, 0], copies[0, i, 1]
                prompt = lax.dynamic_slice_in_dim(prefix, row, 1, axis=1)
                return lax.dynamic_update_slice(stored, prompt, (0, slot, 0, 0, 0))

            return lax.fori_loop(0, number[0], one, stored)

        cache = state.cache
        ring = cache.positions.shape[1] - prefix.positions.shape[1]
        positions = jnp.pad(prefix.positions[new.row], ((0, 0), (0, ring)), constant_values=-1)
        cache = Cache(
            copy(cache.keys, prefix.keys, new.copies, new.number),
            copy(cache.values, prefix.values, new.copies, new.number),
            jnp.where(new.assigned[:, None], positions, cache.positions),
        )

        def enter(new_value, value):
            return jnp.where(new.assigned, new_value, value)

        return _State(
            cache,
            jnp.asarray(prefix.positions.shape[1], jnp.int32),
            state.steps,
            token=enter(new.token, state.token),
            position=enter(new.position, state.position),
            count=enter(0, state.count),
            limit=enter(new.limit, state.limit),
            question=enter(new.question, state.question),
            sample=enter(new.sample, state.sample),
            active=state.active | new.assigned,
        )

    def grow(state: _State, *, prompt_columns: int, columns: int) -> _State:
        """More columns, the ring's oldest first, so that it goes on where it ends."""
        ring = state.cache.positions.shape[1] - prompt_columns
        more = columns - prompt_columns - ring

        def widen(stored, axis, fill):
            prompt, old = jnp.split(stored, [prompt_columns], axis=axis)
            old = jnp.roll(old, -state.steps, axis=axis)
            new = jnp.full_like(lax.slice_in_dim(stored, 0, more, axis=axis), fill)
            return jnp.concatenate([prompt, old, new], axis=axis)

        keys, values, positions = state.cache
        cache = Cache(widen(keys, 2, 0), widen(values, 2, 0), widen(positions, 1, -1))
        return state._replace(cache=cache, steps=jnp.asarray(ring, jnp.int32))

    def decode(weights, state: _State, key_data, budget) -> tuple[_State, _Report]:
        """Up to `budget[0]` steps; fewer if all, or `budget[1]` more slots, have ended."""
        decoder = model(weights)
        key = jax.random.wrap_key_data(key_data, impl=key_type)
        ring = state.cache.positions.shape[1] - state.prompt_columns
        began = jnp.sum(state.active)
        ends = jnp.asarray(config.end_tokens, jnp.int32)

        def unfinished(carry):
            i, state, _, _ = carry
            live = jnp.sum(state.active)
            within = i < jnp.minimum(budget[0], config.chunk)
            return within & (live > 0) & (began - live < budget[1])

        def step(carry):
            i, state, tokens, log_probs = carry
            # Slots that have ended go on, unseen: their columns are cleared when they are refilled.
            hidden, cache = decoder.extend(
                state.token[:, None],
                state.position[:, None],
                state.cache,
                state.prompt_columns + state.steps % ring,
            )
            indices = jnp.stack([state.question, state.sample, state.count])
            keys = jax.vmap(lambda index: functools.reduce(jax.random.fold_in, index, key))(
                indices.T
            )
            token, log_prob = _draw(decoder.logits(hidden[:, 0]), keys, config)
            token = jnp.where(state.active, token, state.token)
            count = state.count + state.active
            ended = jnp.any(token[:, None] == ends[None, :], axis=1) | (count >= state.limit)
            state = state._replace(
                cache=cache,
                steps=state.steps + 1,
                token=token,
                position=state.position + state.active,
                count=count,
                active=state.active & ~ended,
            )
            tokens = lax.dynamic_update_slice(tokens, token[:, None], (0, i))
            log_probs = lax.dynamic_update_slice(log_probs, log_prob[:, None], (0, i))
            return i + 1, state, tokens, log_probs

        shape = (state.token.shape[0], config.chunk)
        blank = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        _, state, tokens, log_probs = lax.while_loop(unfinished, step, (0, state, *blank))
        return state, _Report(state.count, state.active, tokens, log_probs)

    return _Programs(
        empty=_jit(empty, static_argnames=("slots", "columns"), out_shardings=where),
        prefill=_jit(prefill, out_shardings=where.cache),
        admit=_jit(admit, out_shardings=where, donate_argnums=0),
        grow=_jit(grow, static_argnames=("prompt_columns", "columns"), out_shardings=where),
        decode=_jit(decode, out_shardings=(where, whole), donate_argnums=1),
        dtype=options.dtype,
    )


def _rules(config: SamplingConfig) -> SamplingConfig:
    """`config` with only what changes the programs: other sizes must not compile anew."""
    kept = ("temperature", "top_p", "top_k", "end_tokens", "vocab_size", "chunk", "cache_dtype")
    return SamplingConfig(**{name: getattr(config, name) for name in kept})


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


def _decode_weights(params: Any, dtype: Any, gather: bool) -> Any:
    """Parameters as decoding reads them: of the compute type, whole over fsdp; made once a call."""
    leaves, tree = jax.tree.flatten(params)
    types, places = _decode_types(params, dtype), _decode_shardings(params, gather)
    if all(
        x.dtype == to and x.sharding == place
        for x, to, place in zip(leaves, types, places, strict=True)
    ):
        return params
    return tree.unflatten(_caster(types, places)(leaves))


@functools.cache
def _caster(types: tuple[Any, ...], places: tuple[Any, ...]) -> Any:
    def cast(leaves):
        return [x.astype(to) for x, to in zip(leaves, types, strict=True)]

    return _jit(cast, out_shardings=list(places))


def _decode_types(params: Any, dtype: Any) -> tuple[Any, ...]:
    """Norms stay as they are: the model multiplies with them in float32."""
    paths = jax.tree.leaves_with_path(params)
    return tuple(x.dtype if path[-1].key.endswith("norm") else dtype for path, x in paths)


def _decode_shardings(params: Any, gather: bool) -> tuple[Any, ...]:
    def place(where):
        if not gather or not isinstance(where, NamedSharding):
            return where
        spec = [None if axis == "fsdp" else axis for axis in where.spec]
        return NamedSharding(where.mesh, PartitionSpec(*spec))

    return tuple(place(x.sharding) for x in jax.tree.leaves(params))
