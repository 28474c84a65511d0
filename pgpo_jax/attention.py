"""Attention: whole rows through the fastest kernel at hand, and new tokens against a cache."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

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
      window: A token sees itself and `window - 1` tokens before it; None = all before it.
      kernel: `auto` takes splash on TPU for rows of at least 1024 tokens, filled up to blocks of
        512, cudnn on a GPU in 16 bits, else xla.
      mesh: Over which rows and heads are split; only `splash` must be told.

    Raises:
      InputError: `splash` was asked for, and the length of a row does not divide into its blocks.
    """
    time, head_dim = query.shape[1], query.shape[-1]
    if kernel == "auto":
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        if platform == "tpu" and time >= 2 * BLOCK:
            kernel = "splash"
            # Rows end in padding that no token sees: more of it fills the last block.
            fill = ((0, 0), (0, -time % BLOCK), (0, 0), (0, 0))
            query, key, value = (jnp.pad(x, fill) for x in (query, key, value))
        elif platform == "gpu" and query.dtype.itemsize == 2 and head_dim % 8 == 0:
            kernel = "cudnn" if head_dim <= 128 else "xla"
        else:
            kernel = "xla"
    if kernel == "splash":
        return _splash(query, key, value, window, mesh)[:, :time]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
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


def _splash(query: Array, key: Array, value: Array, window: int | None, mesh: Mesh | None) -> Array:
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

    def rows(query: Array, key: Array, value: Array) -> Array:
        """On one device: its rows and its heads."""
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * query.shape[2]),
            block_sizes=sizes,
            interpret=platform == "cpu",
        )
        scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (scaled, key, value))
        out: Any = jax.vmap(kernel)(*heads_first)
        return jnp.swapaxes(out, 1, 2).astype(query.dtype)

    if mesh is None or mesh.size == 1:
        return rows(query, key, value)
    parts, kv_heads = mesh.shape["tensor"], key.shape[2]
    if kv_heads % parts and parts % kv_heads == 0:  # more parts than key heads: every part gets one
        key, value = (jnp.repeat(x, parts // kv_heads, axis=2) for x in (key, value))
    if query.shape[2] % parts or key.shape[2] % parts:
        raise InputError(
            f"mesh.tensor: got {parts}; splash attention splits {query.shape[2]} heads over "
            f"{kv_heads} key heads evenly or not at all"
        )
    spec = sharding.spec(("row", None, "heads", None), query.shape, mesh)
    split = jax.shard_map(
        rows, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
    )
    return split(query, key, value)
