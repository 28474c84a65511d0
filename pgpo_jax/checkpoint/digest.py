"""What a tree of arrays holds: types, shapes and checksums, so that a checkpoint can be judged."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from pgpo_jax import sharding


def describe(tree: Any) -> dict[str, str]:
    """Path of every array in a tree -> its type and shape, as in `float32[3,4]`."""
    return {
        path: f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in by_path(tree).items()
    }


def by_path(tree: Any) -> dict[str, Any]:
    """Path of every array in a tree, as in `layers/kernel` -> the array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def differences(saved: Mapping[str, str], asked: Mapping[str, str]) -> list[str]:
    """Two descriptions: one line for every array that is not in both alike."""
    return [
        f"{path or 'the array'} is {saved.get(path, 'missing')} there, "
        f"{asked.get(path, 'missing')} here"
        for path in sorted(saved.keys() | asked.keys())
        if saved.get(path) != asked.get(path)
    ]


def array_differences(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], names: Sequence[str]
) -> Iterator[str]:
    """One line for every array that is not, bit by bit, in both; `names` are theirs."""
    for path in [*one, *(path for path in other if path not in one)]:
        if path not in one or path not in other:
            yield f"{path} is only in {names[path in other]}"
            continue
        a, b = one[path], other[path]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{path} is {a.dtype.name}{list(a.shape)} and {b.dtype.name}{list(b.shape)}"
        elif a.tobytes() != b.tobytes():
            count = np.count_nonzero(np.ravel(a) != np.ravel(b))
            yield f"{path} differs in {count} of {a.size} values"


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree; what has no sharding goes to the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        where = getattr(leaf, "sharding", None) or first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(one, tree)


def checksums(tree: Any) -> dict[str, int]:
    """Path of every array in a tree -> 32 bits that depend on every bit of it.

    Computed on the devices, where the arrays are, in one pass over them. Sums of whole numbers have
    no order, so the checksums are the same on every mesh. One changed byte is always found (its
    factor is odd, so the product changes modulo 2^32), any other damage but for one in 2^32.
    """
    return {path: int(sum_) for path, sum_ in sharding.fetch(_checksums(by_path(tree))).items()}


@jax.jit
def _checksums(arrays: dict[str, Array]) -> dict[str, Array]:
    return {path: _checksum(array) for path, array in arrays.items()}


def _checksum(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    size = min(array.dtype.itemsize, 4)  # of 8 bytes each half by itself
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * size}").astype(jnp.uint32)
    # Where a value stands counts too, and is computed axis by axis: a reshape would move shards.
    place, stride = jnp.uint32(1), 1
    for axis in reversed(range(bits.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(
            stride % 2**32
        )
        stride *= bits.shape[axis]
    factor = place * jnp.uint32(0x9E3779B1)
    factor = (factor ^ (factor >> 15)) | 1
    return jnp.sum(bits * factor, dtype=jnp.uint32)
