"""One decoder for the families of `architecture.ARCHITECTURES`, driven by their `config.json`.

Layers are stacked `[layer, ...]` and scanned, so that compile time does not grow with depth.
Parameters are float32 (those that are frozen beside adapters may be bfloat16), the computation runs
in `Options.dtype`; norms, rotations, softmax and logits are float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from pgpo_jax import sharding
from pgpo_jax.errors import InputError
from pgpo_jax.models import rope
from pgpo_jax.models.architecture import Kind, ModelConfig
from pgpo_jax.models.attention import Kernel, attend, attend_cached
from pgpo_jax.models.lora import OFF, LoraConfig, adapter_leaves, adapter_names
from pgpo_jax.models.parameters import (
    Leaf,
    Params,
    inputs,
    join,
    leaves,
    map_leaves,
    param_axes,
    param_shapes,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to compute, which does not change what is computed; and with which adapters."""

    dtype: Any = jnp.bfloat16
    """Type of the computation; parameters keep theirs. The gradients of a layer's matrices are
    products of this type, summed over tokens in float32 on a device and over devices in this type
    (`reduce_dtype`); those of biases, norms and the output matrix are float32 throughout."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass computes again: nothing, everything, or all but matrix products."""
    attention: Kernel = "auto"
    """Attention kernel of the uncached forward."""
    unroll: bool = False
    """Write the layers out instead of scanning: faster decoding, slower compilation."""
    reduce_dtype: Any = None
    """Type in which the gradients of a layer's matrices leave a device and are summed over devices,
    as FSDP's of that name; None: the type of the computation."""
    lora: LoraConfig = OFF
    """The adapters beside the projections, parameters of the model too. With any, its other
    parameters are frozen, and no gradient of theirs is computed."""
    mesh: Mesh | None = None
    """Where rows and heads are split; set by `init` and `hf.load`."""

    def __post_init__(self):
        object.__setattr__(
            self, "dtype", jnp.dtype(self.dtype)
        )  # one spelling, so that equal options compare equal
        if self.reduce_dtype is not None:
            object.__setattr__(self, "reduce_dtype", jnp.dtype(self.reduce_dtype))
        for name, literal in (
            ("remat", ("none", "full", "dots")),
            ("attention", ("auto", "xla", "cudnn", "splash")),
        ):
            if getattr(self, name) not in literal:
                raise InputError(
                    f"{name}: got {getattr(self, name)!r}; must be one of {', '.join(literal)}"
                )


class Cache(NamedTuple):
    """Keys and values of earlier tokens, in columns whose order does not matter."""

    keys: Float[Array, "layer row column kv_head head_dim"]
    values: Float[Array, "layer row column kv_head head_dim"]
    positions: Int[Array, "row column"]  # of the token in a column; -1 = empty


def _table(config: ModelConfig, options: Options) -> dict[str, Any]:
    """The parameters of a model with its adapters."""
    adapters = adapter_leaves(config, options.lora) if options.lora.rank else None
    return join(leaves(config), adapters)


def _initial(name: str, leaf: Leaf, key: Array, norm_offset: float) -> Array:
    """Norms one, biases zero, matrices normal with deviation 0.02, as transformers has it."""
    if name.endswith("norm"):
        return jnp.full(leaf.shape, 1 - norm_offset, jnp.float32)
    if name.endswith("bias"):
        return jnp.zeros(leaf.shape, jnp.float32)
    return 0.02 * jax.random.normal(key, leaf.shape, jnp.float32)


class Decoder(nnx.Module):
    """The language model; `make_graphdef` and `init` turn it into a plain tree of arrays."""

    def __init__(self, config: ModelConfig, options: Options = Options(), *, rngs: nnx.Rngs):
        self.config = config
        self.options = options
        values = map_leaves(
            lambda name, leaf: nnx.Param(
                _initial(name, leaf, rngs.params(), config.architecture.norm_offset)
            ),
            _table(config, options),
        )
        self.embed_tokens = values["embed_tokens"]
        self.layers = nnx.data(values["layers"])
        self.norm = values["norm"]
        if not config.tie_word_embeddings:
            self.lm_head = values["lm_head"]

    def __call__(
        self, tokens: Int[Array, "row time"], mask: Bool[Array, "row time"] | None = None
    ) -> Float[Array, "row time vocab"]:
        """Float32 logits of the next token; `mask` as in `hidden`."""
        return self.logits(self.hidden(tokens, mask))

    def head(self) -> Float[Array, "vocab hidden"]:
        """The output matrix, of the parameters' type; the embedding where the two are tied."""
        return self.embed_tokens[...] if self.config.tie_word_embeddings else self.lm_head[...]

    def logits(self, hidden: Float[Array, "... hidden"]) -> Float[Array, "... vocab"]:
        """Float32 logits of final hidden states; the product accumulates in float32."""
        return jnp.einsum(
            "...d,vd->...v",
            hidden,
            self.head().astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    def hidden(
        self, tokens: Int[Array, "row time"], mask: Bool[Array, "row time"] | None = None
    ) -> Float[Array, "row time hidden"]:
        """Hidden states after the final norm, in the compute type; meaningless (finite) at padding.

        Args:
          tokens: `[row, time]`.
          mask: True at tokens, False at padding, which may stand anywhere; None = no padding.
            Positions count tokens only.
        """
        order = None
        if mask is not None:
            # With its tokens moved to the front, a row needs no mask but the causal one: no query
            # is without keys, and every kernel can be used.
            order = jnp.argsort(~mask, axis=1, stable=True)
            tokens = jnp.take_along_axis(tokens, order, axis=1)
        x = self.packed_hidden(tokens)
        if order is not None:
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[:, :, None], axis=1)
        return x

    def packed_hidden(
        self,
        tokens: Int[Array, "row time"],
        segments: Int[Array, "row time"] | None = None,
        positions: Int[Array, "row time"] | None = None,
    ) -> Float[Array, "row time hidden"]:
        """As `hidden`, of rows whose padding is at their end, and which may hold several sequences.

        Args:
          tokens: `[row, time]`.
          segments: The number of each token's sequence in its row; sequences do not see each other.
            None: one sequence a row.
          positions: Of each token in its sequence, from 0; None: its column.
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        return self._forward(tokens, positions, segments)

    def init_cache(self, rows: int, columns: int, dtype: Any = None) -> Cache:
        """An empty cache; `dtype` is that of keys and values (None: the compute type)."""
        c = self.config
        shape = (c.num_hidden_layers, rows, columns, c.num_key_value_heads, c.head_dim)
        dtype = self.options.dtype if dtype is None else dtype
        return Cache(
            _constrain(
                jnp.zeros(shape, dtype), ("layer", "row", None, "kv_heads", None), self.options.mesh
            ),
            _constrain(
                jnp.zeros(shape, dtype), ("layer", "row", None, "kv_heads", None), self.options.mesh
            ),
            _constrain(jnp.full((rows, columns), -1, jnp.int32), ("row", None), self.options.mesh),
        )

    def extend(
        self,
        tokens: Int[Array, "row time"],
        positions: Int[Array, "row time"],
        cache: Cache,
        column: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "row time hidden"], Cache]:
        """Writes tokens into the cache and returns their hidden states: prefill or decoding.

        Args:
          tokens: `[row, time]`, the new tokens.
          positions: `[row, time]`, their positions, -1 at padding. A token sees the keys (old and
            new) at positions from 0 to its own, in whatever column they are.
          cache: Keys and values so far.
          column: Where the new keys are written: `[column, column + time)`, the same for every row.

        Returns:
          Hidden states after the final norm `[row, time, hidden]` (finite and meaningless at
          padding), and the cache.
        """
        seen = lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), (0, column))
        ropes = self._ropes(jnp.maximum(positions, 0))
        masks = self._masks(positions, seen)

        def step(
            kind: Kind, index: Any, weights: dict[str, Array], carry: tuple[Array, Array, Array]
        ):
            x, keys, values = carry
            query, key, value = self._project(weights, x, ropes[kind.rope])
            start = (index, 0, column, 0, 0)
            keys = lax.dynamic_update_slice(keys, key[None].astype(keys.dtype), start)
            values = lax.dynamic_update_slice(values, value[None].astype(values.dtype), start)
            key, value = (
                lax.dynamic_index_in_dim(stored, index, keepdims=False).astype(query.dtype)
                for stored in (keys, values)
            )
            attended = attend_cached(query, key, value, masks[kind.window])
            x = self._finish(weights, x, attended)
            return x, keys, values

        x, keys, values = self._through_layers(
            step, (self._embed(tokens), cache.keys, cache.values)
        )
        return self._final(x), Cache(keys, values, seen)

    # ---- parts ----

    def _forward(self, tokens: Array, positions: Array, segments: Array | None = None) -> Array:
        """Hidden states of rows without padding but at their end."""
        ropes, options = self._ropes(positions), self.options

        def layer(kind: Kind, weights: dict[str, Array], x: Array) -> Array:
            projected = self._project(weights, x, ropes[kind.rope])
            attended = attend(
                *projected,
                segments=segments,
                window=kind.window,
                kernel=options.attention,
                mesh=options.mesh,
            )
            return self._finish(weights, x, attended)

        def step(kind: Kind, index: Any, weights: dict[str, Array], x: Array) -> Array:
            return self._remat(functools.partial(layer, kind))(weights, x)

        return self._final(self._through_layers(step, self._embed(tokens)))

    def _embed(self, tokens: Array) -> Array:
        # Whole rows of the table: a gather split along its rows' width would first be replicated.
        table = _constrain(self.embed_tokens[...], ("vocab", None), self.options.mesh)
        x = table[tokens].astype(self.options.dtype)
        factor = self.config.embedding_multiplier
        if self.config.architecture.root_scaled_embedding:  # rounded, as the family was trained
            factor = float(np.asarray(self.config.hidden_size**0.5, x.dtype))
        return _constrain(_times(x, factor), ("row", None, None), self.options.mesh)

    def _ropes(self, positions: Array) -> dict[rope.Rope | None, tuple[Array, Array] | None]:
        """Cosine and sine for the kinds of layers that this model has, None for those without."""
        return {
            own: None if own is None else rope.table(own, self.config.head_dim, positions)
            for own in dict.fromkeys(kind.rope for kind in self.config.kinds)
        }

    def _masks(
        self, positions: Int[Array, "row time"], stored: Int[Array, "row column"]
    ) -> dict[int | None, Bool[Array, "row time column"]]:
        """Which stored keys a token sees, by their positions (-1: none), for every window."""
        ago = positions[:, :, None] - stored[:, None, :]
        visible = (stored >= 0)[:, None, :] & (ago >= 0)
        return {
            window: visible if window is None else visible & (ago < window)
            for window in dict.fromkeys(kind.window for kind in self.config.kinds)
        }

    def _project(
        self, weights: Mapping[str, Array], x: Array, rotation: tuple[Array, Array] | None
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values `[row, time, head, head_dim]`, rotated."""
        arch = self.config.architecture
        x = self._norm(x, weights, arch.norms.before_attention)
        out = []
        for name in "qkv":
            y = self._product(x, weights, f"{name}_proj")
            if arch.qkv_bias:
                y = _add_bias(y, weights[f"{name}_bias"])
            if arch.qk_norm != "none" and name != "v":
                y = self._norm(y, weights, f"{name}_norm")
            out.append(y)
        query, key, value = out
        if rotation is not None:
            query, key = rope.rotate(query, *rotation), rope.rotate(key, *rotation)
        return _times(query, self.config.query_multiplier), key, value

    def _finish(self, weights: Mapping[str, Array], x: Array, attended: Array) -> Array:
        """The rest of a layer: output projection, residuals, feed-forward."""
        arch, factor = self.config.architecture, self.config.residual_multiplier
        y = self._product(attended, weights, "o_proj")
        x = x + _times(self._norm(y, weights, arch.norms.after_attention), factor)
        y = self._norm(x, weights, arch.norms.before_mlp)
        gate, up = (self._product(y, weights, f"{name}_proj") for name in ("gate", "up"))
        y = self._product(_gated(gate, up, arch.activation), weights, "down_proj")
        x = x + _times(self._norm(y, weights, arch.norms.after_mlp), factor)
        return _constrain(x, ("row", None, None), self.options.mesh)

    def _norm(self, x: Array, weights: Mapping[str, Array], name: str | None) -> Array:
        """The norm of that name; None: `x` itself."""
        c = self.config
        if name is None:
            return x
        return _norm(x, weights[name], c.rms_norm_eps, c.architecture.norm_offset)

    def _product(self, x: Array, weights: Mapping[str, Array], name: str) -> Array:
        """x times a projection, with its adapter's product, in the type of the computation."""
        lora, axes = self.options.lora, inputs(name)
        if not lora.rank:
            return self._trained_product(x, weights[name], axes)
        # Not `_product`, whose backward pass computes the gradient of either operand.
        y = jnp.tensordot(x, weights[name].astype(x.dtype), axes)
        if name not in lora.targets:
            return y
        a, b = (weights[adapter] for adapter in adapter_names(name))
        return y + self._trained_product(lora.scale * self._trained_product(x, a, axes), b, 1)

    def _trained_product(self, x: Array, weight: Array, axes: int) -> Array:
        """x times a float32 matrix, in the type of the computation."""
        options = self.options
        if options.reduce_dtype is None:  # the gradient is of the type of what is multiplied
            weight = weight.astype(options.dtype)
        return _product(x, weight, axes, options.reduce_dtype)

    def _final(self, x: Array) -> Array:
        x = self._norm(x, {"norm": self.norm[...]}, "norm")
        # Logits are divided here, where one place serves all that makes logits of hidden states.
        return _times(x, 1 / (self.config.logits_scaling or 1))

    def _period(self) -> int:
        """Layers written out in one step of the scan: until their kinds repeat, or all."""
        kinds = self.config.kinds
        if self.options.unroll:
            return len(kinds)
        return next(
            p
            for p in range(1, len(kinds) + 1)
            if len(kinds) % p == 0 and kinds[:p] * (len(kinds) // p) == kinds
        )

    def _through_layers(
        self, step: Callable[[Kind, Any, dict[str, Array], Any], Any], carry: Any
    ) -> Any:
        """Applies `step(kind, index, weights, carry) -> carry` layer by layer."""
        kinds, period = self.config.kinds, self._period()
        weights = {name: param[...] for name, param in self.layers.items()}

        def group(carry: Any, inputs: tuple[Any, dict[str, Array]]) -> tuple[Any, None]:
            first, stacked = inputs
            # The gradient of a split is one concatenation, that of slices sums of whole arrays.
            parts = {name: lax.split(array, (1,) * period) for name, array in stacked.items()}
            for i in range(period):
                carry = step(
                    kinds[i], first + i, {name: part[i][0] for name, part in parts.items()}, carry
                )
            return carry, None

        if period == len(kinds):
            return group(carry, (0, weights))[0]
        if period == 1:  # no axis of length 1 for the group: XLA would copy all weights for it
            steps = (jnp.arange(len(kinds)), weights)
            return lax.scan(lambda x, inputs: (step(kinds[0], *inputs, x), None), carry, steps)[0]
        weights = {
            name: array.reshape(-1, period, *array.shape[1:]) for name, array in weights.items()
        }
        return lax.scan(group, carry, (jnp.arange(0, len(kinds), period), weights))[0]

    def _remat(self, layer: Callable[..., Array]) -> Callable[..., Array]:
        if self.options.remat == "none":
            return layer
        policies = jax.checkpoint_policies
        saved = {
            "full": policies.nothing_saveable,
            "dots": policies.dots_with_no_batch_dims_saveable,
        }
        scanned = (
            self._period() < self.config.num_hidden_layers
        )  # a scan already keeps XLA from merging the two passes
        return jax.checkpoint(layer, policy=saved[self.options.remat], prevent_cse=not scanned)


def _tensordot(x: Array, weight: Array, axes: int, reduce_dtype: Any) -> Array:
    del reduce_dtype
    return jnp.tensordot(x, weight.astype(x.dtype), axes)


def _tensordot_forward(
    x: Array, weight: Array, axes: int, reduce_dtype: Any
) -> tuple[Array, tuple[Array, Array]]:
    return _tensordot(x, weight, axes, reduce_dtype), (x, weight)


def _tensordot_backward(
    axes: int, reduce_dtype: Any, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, weight = operands
    rows = list(range(x.ndim - axes))
    columns = list(range(len(rows), gradient.ndim))
    to_x = jnp.tensordot(gradient, weight.astype(x.dtype), (columns, [*range(axes, weight.ndim)]))
    to_weight = jnp.tensordot(x, gradient, (rows, rows), preferred_element_type=reduce_dtype)
    return to_x, to_weight.astype(weight.dtype)


# The gradient of a weight comes out the way the weight lies. JAX's own is the transpose of a
# product, for which a CPU first transposes the wider operand: a tenth of an update.
_product: Any = jax.custom_vjp(_tensordot, nondiff_argnums=(2, 3))
_product.defvjp(_tensordot_forward, _tensordot_backward)


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    """The bias in the type of `x`; its gradient sums over all tokens in float32, where 16 bits
    would lose 0.4 % at 4 thousand tokens and a tenth at half a million."""
    return x + jnp.expand_dims(bias.astype(x.dtype), tuple(range(x.ndim - bias.ndim)))


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return _add_bias(x, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    rows = tuple(range(gradient.ndim - bias.ndim))
    return gradient, jnp.sum(gradient, rows, dtype=jnp.float32).astype(bias.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


# What a backward pass computes again at once: elementwise work, whose stored steps (five arrays for
# the gate alone) would cost more to write and read than to repeat.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(_recomputed, static_argnums=2)
def _gated(gate: Array, up: Array, activation: str) -> Array:
    return (jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate)) * up


@functools.partial(_recomputed, static_argnums=(2, 3))
def _norm(x: Array, weight: Array, eps: float, offset: float) -> Array:
    """RMS norm (arXiv 1910.07467) over the axes of `weight`, the last ones, in float32."""
    y = x.astype(jnp.float32)
    axes = tuple(range(-weight.ndim, 0))
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + eps)
    weight = weight.astype(jnp.float32)
    weight = weight + offset if offset else weight
    return (y * jnp.expand_dims(weight, tuple(range(x.ndim - weight.ndim)))).astype(x.dtype)


def _times(x: Array, factor: float | None) -> Array:
    """x times a number that is not itself rounded to the type of `x`."""
    if factor is None or factor == 1:
        return x
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _constrain(x: Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> Array:
    """Keeps the batch split, so that the partitioner gathers weights and not activations."""
    context = jax.sharding.get_abstract_mesh()
    if mesh is None or AxisType.Manual in context.axis_types:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, sharding.spec(axes, x.shape, mesh)))


GraphDef = nnx.GraphDef
"""The static part of a model: all but its parameters."""


def merge(graphdef: GraphDef, params: Params, frozen: Params | None = None) -> Decoder:
    """The model that computes with `params`, traced or real, and what is `frozen` beside them;
    nothing is copied."""
    return nnx.merge(graphdef, join(params, frozen))


def make_graphdef(config: ModelConfig, options: Options = Options()) -> GraphDef:
    """The static part of the model, for `merge`. Uses no memory."""
    abstract = nnx.eval_shape(lambda: Decoder(config, options, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)[0]


def init(
    config: ModelConfig,
    options: Options,
    key: Array,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
) -> tuple[GraphDef, Params]:
    """A model with random weights, made where they will live: no device holds more than its shards.

    The values do not depend on the mesh. Adapters (`options.lora`) are not among them: they come
    from `lora.init_adapters`, and what is made here is frozen beside them.
    """
    table = leaves(config)

    def make(key: Array) -> Params:
        count = iter(range(1_000_000))
        return map_leaves(
            lambda name, leaf: _initial(
                name, leaf, jax.random.fold_in(key, next(count)), config.architecture.norm_offset
            ).astype(dtype),
            table,
        )

    where = (
        None if mesh is None else sharding.shardings(param_axes(config), param_shapes(config), mesh)
    )
    options = options if mesh is None else dataclasses.replace(options, mesh=mesh)
    return make_graphdef(config, options), jax.jit(make, out_shardings=where)(key)
