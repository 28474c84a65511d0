"""Decoding on the devices: the cache as one-token steps read it fastest, and the jitted programs.

A row of the cache is a slot that decodes one response. Its columns are the prompt's, then a ring
that all slots write at the same column in each step; the position stored with a column says what it
holds, so a slot can be refilled at any time without a scatter. A live response never outgrows the
ring, hence never overwrites its own tokens (the sampler grows the ring in time).

Every layer has arrays of its own, heads before columns, and layers are written out. On a CPU that
made a step's attention 13 times faster than reading slices of one stacked, column-major cache:
those were copied and transposed in every step. Weights are split by layer for the same reason.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from pgpo_jax import sharding
from pgpo_jax.distributions import Vocabulary
from pgpo_jax.models import GraphDef, ModelConfig, Options, make_graphdef, merge


class Rule(NamedTuple):
    """What a decoding program depends on, beside the model and sizes."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    vocab_size: int | None = None
    unknown_tokens: tuple[int, ...] = ()
    end_tokens: tuple[int, ...] = ()
    chunk: int = 64
    cache_dtype: str | None = None


def distribution(logits: Float[Array, "row vocab"], rule: Rule) -> Float[Array, "row vocab"]:
    """Log-probabilities (float32, nats) that tokens are drawn with; -inf at those that never are.

    Logits are divided by the temperature, then reduced to the `top_k` most probable tokens, then
    to the fewest most probable that together reach `top_p` (Holtzman et al., The Curious Case of
    Neural Text Degeneration, section 3.1, https://arxiv.org/abs/1904.09751). Ties with the last
    token kept are kept. At temperature 0: the model's own, without any of this.
    """
    scores = logits.astype(jnp.float32)
    scores = Vocabulary(rule.vocab_size, rule.unknown_tokens).mask(scores, -jnp.inf)
    if rule.temperature > 0:
        scores = scores / rule.temperature
        if rule.top_k is not None and rule.top_k < scores.shape[-1]:
            least = lax.top_k(scores, rule.top_k)[0][:, -1:]
            scores = jnp.where(scores >= least, scores, -jnp.inf)
        if rule.top_p < 1:
            scores = _nucleus(scores, rule.top_p)
    return jax.nn.log_softmax(scores)


def _nucleus(scores: Float[Array, "row vocab"], top_p: float) -> Float[Array, "row vocab"]:
    """-inf outside the nucleus, found by bisection: as exact as sorting the vocabulary, cheaper.

    Non-negative floats are ordered like their bit patterns, so 31 halvings pin down the largest
    probability p such that the tokens of at least p have the mass `top_p`.
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


def draw(
    logits: Float[Array, "row vocab"], keys: Key[Array, " row"], rule: Rule
) -> tuple[Int[Array, " row"], Float[Array, " row"]]:
    """A token for every row, and its log-probability in nats."""
    log_probs = noisy = distribution(logits, rule)
    if rule.temperature > 0:  # the largest of log p + Gumbel noise is a draw from p
        noise = jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[1:]))(keys)
        noisy = log_probs + noise
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]


class Cache(NamedTuple):
    """Keys and values of earlier tokens, one array per layer."""

    keys: tuple[Float[Array, "slot kv_head column head_dim"], ...]
    values: tuple[Float[Array, "slot kv_head column head_dim"], ...]
    positions: Int[Array, "slot column"]  # of the token in a column; -1 = empty


class State(NamedTuple):
    """What decoding carries."""

    cache: Cache  # columns: prompt, then ring
    prompt_columns: Int[Array, ""]
    steps: Int[Array, ""]  # the ring's column to write is steps % its size
    token: Int[Array, " slot"]  # to feed next: the prompt's last, then what was drawn
    position: Int[Array, " slot"]  # its position
    count: Int[Array, " slot"]  # tokens drawn
    limit: Int[Array, " slot"]
    question: Int[Array, " slot"]
    sample: Int[Array, " slot"]
    active: Bool[Array, " slot"]


class Entry(NamedTuple):
    """Responses that enter slots between two decoding calls."""

    assigned: Bool[np.ndarray, " slot"]
    row: Int[np.ndarray, " slot"]  # of the prefilled questions
    token: Int[np.ndarray, " slot"]
    position: Int[np.ndarray, " slot"]
    limit: Int[np.ndarray, " slot"]
    question: Int[np.ndarray, " slot"]
    sample: Int[np.ndarray, " slot"]
    copies: Int[np.ndarray, "part slot 2"]  # for each batch shard: its own slots, and their rows
    number: Int[np.ndarray, " part"]  # of copies in each shard


class Report(NamedTuple):
    """What the host sees after a decoding call, whole on every host."""

    count: Int[Array, " slot"]
    active: Bool[Array, " slot"]
    tokens: Int[Array, "slot chunk"]  # of this call, from the left
    log_probs: Float[Array, "slot chunk"]


class Programs(NamedTuple):
    """The jitted functions of one model on one mesh under one rule."""

    empty: Any  # (*, slots, columns) -> State
    prefill: Any  # (params, tokens, positions) -> Cache
    enter: Any  # (state, prefix cache, Entry) -> State
    grow: Any  # (state, *, prompt_columns, columns) -> State
    decode: Any  # (split weights, state, key data, budget) -> (State, Report)


_JITTED: list[Any] = []


def counted_jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` whose compilations `compilations` counts."""
    _JITTED.append(jax.jit(function, **options))
    return _JITTED[-1]


def compilations() -> int:
    """Programs compiled for sampling so far, in this process."""
    return sum(function._cache_size() for function in _JITTED)


@functools.cache
def programs(
    config: ModelConfig, options: Options, mesh: Mesh, rule: Rule, key_type: str
) -> Programs:
    """Makes the jitted functions; compiles nothing yet."""
    graphdef = make_graphdef(config, options)
    cache_dtype = jnp.dtype(rule.cache_dtype or options.dtype)
    whole = sharding.replicated(mesh)
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    heads = sharding.spec(("kv_heads",), (config.num_key_value_heads,), mesh)[0]
    stored = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, heads))
    layers: Any = (stored,) * config.num_hidden_layers
    where: Any = State(Cache(layers, layers, rows), whole, whole, *(rows,) * 7)  # type: ignore
    return Programs(
        empty=counted_jit(
            _make_empty(config, cache_dtype),
            static_argnames=("slots", "columns"),
            out_shardings=where,
        ),
        prefill=counted_jit(
            _make_prefill(graphdef, config, cache_dtype), out_shardings=where.cache
        ),
        enter=counted_jit(_make_enter(mesh, heads), out_shardings=where, donate_argnums=0),
        grow=counted_jit(
            _make_grow(), static_argnames=("prompt_columns", "columns"), out_shardings=where
        ),
        decode=counted_jit(
            _make_decode(graphdef, rule, key_type), out_shardings=(where, whole), donate_argnums=1
        ),
    )


def _make_empty(config: ModelConfig, cache_dtype: Any) -> Callable[..., State]:
    layers = range(config.num_hidden_layers)

    def empty(*, slots: int, columns: int) -> State:
        def zeros() -> tuple[Array, ...]:
            shape = (slots, config.num_key_value_heads, columns, config.head_dim)
            return tuple(jnp.zeros(shape, cache_dtype) for _ in layers)

        cache = Cache(zeros(), zeros(), jnp.full((slots, columns), -1, jnp.int32))
        zero, row = jnp.zeros((), jnp.int32), jnp.zeros(slots, jnp.int32)
        return State(cache, zero, zero, row, row, row, row, row, row, row > 0)

    return empty


def _make_prefill(
    graphdef: GraphDef, config: ModelConfig, cache_dtype: Any
) -> Callable[..., Cache]:
    layers = range(config.num_hidden_layers)

    def prefill(params: Any, tokens: Array, positions: Array) -> Cache:
        decoder = merge(graphdef, params)
        cache = decoder.init_cache(tokens.shape[0], tokens.shape[1], cache_dtype)
        _, cache = decoder.extend(tokens, positions, cache, 0)

        def by_layer(array: Array) -> tuple[Array, ...]:
            return tuple(jnp.swapaxes(array[layer], 1, 2) for layer in layers)

        return Cache(by_layer(cache.keys), by_layer(cache.values), cache.positions)

    return prefill


def _make_enter(mesh: Mesh, heads: Any) -> Callable[..., State]:
    batch, cache_spec = sharding.BATCH_AXES, PartitionSpec(sharding.BATCH_AXES, heads)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(
            cache_spec,
            PartitionSpec(None, heads),
            PartitionSpec(batch),
            PartitionSpec(batch),
        ),
        out_specs=cache_spec,
    )
    def copy_rows(stored: Any, prefix: Any, copies: Any, number: Any) -> Any:
        def copy(i: Array, stored: Any) -> Any:
            slot, row = copies[0, i, 0], copies[0, i, 1]
            return jax.tree.map(
                lambda into, new: lax.dynamic_update_slice(
                    into, lax.dynamic_slice_in_dim(new, row, 1), (slot, 0, 0, 0)
                ),
                stored,
                prefix,
            )

        return lax.fori_loop(0, number[0], copy, stored)

    def enter(state: State, prefix: Cache, new: Entry) -> State:
        old = state.cache
        keys, values = copy_rows(
            (old.keys, old.values), (prefix.keys, prefix.values), new.copies, new.number
        )
        ring = old.positions.shape[1] - prefix.positions.shape[1]
        positions = jnp.pad(prefix.positions[new.row], ((0, 0), (0, ring)), constant_values=-1)
        positions = jnp.where(new.assigned[:, None], positions, old.positions)

        def replace(name: str) -> Array:
            return jnp.where(new.assigned, getattr(new, name), getattr(state, name))

        fields = ("token", "position", "limit", "question", "sample")
        return state._replace(
            cache=Cache(keys, values, positions),
            prompt_columns=jnp.full((), prefix.positions.shape[1], jnp.int32),
            count=jnp.where(new.assigned, 0, state.count),
            active=state.active | new.assigned,
            **{name: replace(name) for name in fields},
        )

    return enter


def _make_grow() -> Callable[..., State]:
    """One of its own for each model: jit keeps what it compiled with the function."""

    def grow(state: State, *, prompt_columns: int, columns: int) -> State:
        """More columns after the ring's newest, its oldest moved to its start."""
        more = columns - state.cache.positions.shape[1]

        def widen(stored: Array, axis: int, fill: int) -> Array:
            prompt, ring = jnp.split(stored, [prompt_columns], axis=axis)
            ring = jnp.roll(ring, -state.steps, axis=axis)
            shape = (*stored.shape[:axis], more, *stored.shape[axis + 1 :])
            return jnp.concatenate([prompt, ring, jnp.full(shape, fill, stored.dtype)], axis=axis)

        keys, values, positions = state.cache
        cache = Cache(
            tuple(widen(array, 2, 0) for array in keys),
            tuple(widen(array, 2, 0) for array in values),
            widen(positions, 1, -1),
        )
        steps = jnp.full((), positions.shape[1] - prompt_columns, jnp.int32)
        return state._replace(cache=cache, steps=steps)

    return grow


def _make_decode(
    graphdef: GraphDef, rule: Rule, key_type: str
) -> Callable[..., tuple[State, Report]]:
    def decode(
        weights: tuple[Any, ...], state: State, key_data: Array, budget: Int[Array, "2"]
    ) -> tuple[State, Report]:
        """Up to `budget[0]` steps; fewer when all, or `budget[1]` more slots, have ended."""
        outer, layer_weights = weights
        decoder = merge(graphdef, {**outer, "layers": layer_weights[0]})  # fed layer by layer
        key = jax.random.wrap_key_data(key_data, impl=key_type)
        fold = jax.vmap(jax.random.fold_in)
        keys = fold(jnp.broadcast_to(key, state.question.shape), state.question)
        keys = fold(keys, state.sample)
        ends = jnp.asarray(rule.end_tokens, jnp.int32)
        ring = state.cache.positions.shape[1] - state.prompt_columns
        began = jnp.sum(state.active)

        def unfinished(carry):
            i, state, _, _ = carry
            live = jnp.sum(state.active)
            within = i < jnp.minimum(budget[0], rule.chunk)
            return within & (live > 0) & (began - live < budget[1])

        def step(carry):
            i, state, tokens, log_probs = carry
            # Slots that have ended go on, unseen: their columns are cleared when they are refilled.
            column = state.prompt_columns + state.steps % ring
            hidden, cache = _feed(decoder, layer_weights, state, column)
            token, log_prob = draw(decoder.logits(hidden), fold(keys, state.count), rule)
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

        shape = (state.token.shape[0], rule.chunk)
        blank = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        _, state, tokens, log_probs = lax.while_loop(unfinished, step, (0, state, *blank))
        return state, Report(state.count, state.active, tokens, log_probs)

    return decode


def _feed(
    decoder: Any, layer_weights: tuple[dict[str, Array], ...], state: State, column: Array
) -> tuple[Float[Array, "slot hidden"], Cache]:
    """One token for every slot: `Decoder.extend` for this cache."""
    config, (keys, values, positions) = decoder.config, state.cache
    position = state.position[:, None]
    positions = lax.dynamic_update_slice(positions, position, (0, column))
    masks, ropes = decoder._masks(position, positions), decoder._ropes(position)
    x = decoder._embed(state.token[:, None])
    new_keys, new_values = [], []
    for i, kind in enumerate(config.kinds):
        query, key, value = decoder._project(layer_weights[i], x, ropes[kind.rope])
        for new, old, made in ((key, keys, new_keys), (value, values, new_values)):
            new = jnp.swapaxes(new, 1, 2).astype(old[i].dtype)
            made.append(lax.dynamic_update_slice(old[i], new, (0, 0, column, 0)))
        attended = _attend(query[:, 0], new_keys[i], new_values[i], masks[kind.window][:, 0])
        x = decoder._finish(layer_weights[i], x, attended[:, None])
    return decoder._final(x)[:, 0], Cache(tuple(new_keys), tuple(new_values), positions)


def _attend(
    query: Float[Array, "slot head head_dim"],
    keys: Float[Array, "slot kv_head column head_dim"],
    values: Float[Array, "slot kv_head column head_dim"],
    visible: Bool[Array, "slot column"],
) -> Float[Array, "slot head head_dim"]:
    """Attention of one token per slot; the softmax is float32."""
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])
    scores = jnp.einsum(
        "skgh,skch->skgc", grouped, keys.astype(query.dtype), preferred_element_type=jnp.float32
    )
    scores = jnp.where(visible[:, None, None, :], scores * query.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(query.dtype)
    return jnp.einsum("skgc,skch->skgh", weights, values.astype(query.dtype)).reshape(query.shape)
