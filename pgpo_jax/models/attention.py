"""Attention: whole rows through the fastest kernel at hand, and new tokens against a cache."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pgpo_jax import sharding
from pgpo_jax.errors import InputError

Kernel = Literal["auto", "xla", "cudnn", "splash"]
BLOCK = 512  # of splash attention, queries and keys; seen to compile and fit on v5p and v6e
QUERIES = 512  # of a long prefill handled at a time, which bounds the [head, query, column] scores


def attend(
    query: Float[Array, "row time head head_dim"],
    key: Float[Array, "row time kv_head head_dim"],
    value: Float[Array, "row time kv_head head_dim"],
    *,
    segments: Int[Array, "row time"] | None = None,
    window: int | None = None,
    kernel: Kernel = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "row time head head_dim"]:
    """Causal attention of whole rows; the softmax is float32.

    Padding must stand at the end of a row, where no token sees it: then no kernel needs a mask
    beside the causal one, and no query is left without keys.

    Args:
      query: `[row, time, head, head_dim]`.
      key: `[row, time, kv_head, head_dim]`; several heads share a key head.
      value: As `key`.
      segments: The number of each token's sequence, where a row holds several; a token sees those
        of its own sequence only.
      window: A token sees itself and `window - 1` tokens before it; None = all before it.
      kernel: `auto` takes splash on TPU for rows of at least 1024 tokens, filled up to blocks of
        512, cudnn on a GPU in 16 bits and without segments, which it does not know, else xla.
      mesh: Over which rows and heads are split; only `splash` must be told.

    Raises:
      InputError: `splash` was asked for, and the length of a row does not divide into its blocks,
        or `cudnn`, for rows of several sequences.
    """
    time, head_dim = query.shape[1], query.shape[-1]
    if kernel == "auto":
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        if platform == "tpu" and time >= 2 * BLOCK:
            kernel = "splash"
            # Rows end in padding that no token sees: more of it fills the last block.
            fill = ((0, 0), (0, -time % BLOCK), (0, 0), (0, 0))
            query, key, value = (jnp.pad(x, fill) for x in (query, key, value))
            if segments is not None:
                segments = jnp.pad(segments, fill[:2])
        elif platform == "gpu" and query.dtype.itemsize == 2 and head_dim % 8 == 0:
            kernel = "cudnn" if head_dim <= 128 and segments is None else "xla"
        else:
            kernel = "xla"
    if kernel == "splash":
        return _splash(query, key, value, segments, window, mesh)[:, :time]
    if kernel == "cudnn" and segments is not None:
        raise InputError(
            "attention: got cudnn for rows of several sequences, which it does not keep apart; "
            "choose auto or xla, or data.packing never"
        )
    same = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=same,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=kernel,
    )


def attend_cached(
    query: Float[Array, "row time head head_dim"],
    key: Float[Array, "row column kv_head head_dim"],
    value: Float[Array, "row column kv_head head_dim"],
    visible: Bool[Array, "row time column"],
) -> Float[Array, "row time head head_dim"]:
    """Attention of new tokens to the keys of a cache; the softmax is float32.

    Args:
      query: `[row, time, head, head_dim]`.
      key: `[row, column, kv_head, head_dim]`.
      value: As `key`.
      visible: Which keys a query sees. A query that sees none gets a finite, meaningless result.
    """

    def part(query: Array, visible: Array) -> Array:
        return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])

    time = query.shape[1]
    if time <= QUERIES or time % QUERIES:
        return part(query, visible)

    def chunked(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, QUERIES, *x.shape[2:]), 1, 0)

    out = lax.map(lambda args: part(*args), (chunked(query), chunked(visible)))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape)


def _splash(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    window: int | None,
    mesh: Mesh | None,
) -> Array:
    """Splash attention: blockwise on TPU, skipping the blocks that the mask leaves empty."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    time = query.shape[1]
    block = min(BLOCK, time)
    if time % block or block % 128:
        raise InputError(
            f"attention: got splash with rows of {time} tokens; "
            f"they must be a multiple of {BLOCK}, or of 128 up to {BLOCK}"
        )
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    if window is None:
        mask = splash.CausalMask((time, time))
    else:
        mask = splash.LocalMask((time, time), (window - 1, 0), 0)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform

    def rows(query: Array, key: Array, value: Array, *segments: Array) -> Array:
        """On one device: its rows and its heads."""
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * query.shape[2]),
            block_sizes=sizes,
            interpret=platform == "cpu",
        )
        scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (scaled, key, value))
        ids = [splash.SegmentIds(numbers, numbers) for numbers in segments]
        out: Any = jax.vmap(kernel)(*heads_first, *ids)
        return jnp.swapaxes(out, 1, 2).astype(query.dtype)

    numbers = () if segments is None else (segments,)
    if mesh is None or mesh.size == 1:
        return rows(query, key, value, *numbers)
    parts, kv_heads = mesh.shape["tensor"], key.shape[2]
    if kv_heads % parts and parts % kv_heads == 0:  # more parts than key heads: every part gets one
        key, value = (jnp.repeat(x, parts // kv_heads, axis=2) for x in (key, value))
    if query.shape[2] % parts or key.shape[2] % parts:
        raise InputError(
            f"mesh.tensor: got {parts}; splash attention splits {query.shape[2]} heads over "
            f"{kv_heads} key heads evenly or not at all"
        )
    spec = sharding.spec(("row", None, "heads", None), query.shape, mesh)
    by_row = sharding.spec(("row", None), query.shape[:2], mesh)
    in_specs = (spec, spec, spec) + (by_row,) * len(numbers)
    split = jax.shard_map(rows, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
    return split(query, key, value, *numbers)
