"""Where arrays live: the mesh, the rules that map named axes onto it, and placement by them.

The same calls serve one process with many devices and several processes: every host handles the
rows `host_rows` gives it, passes only those to `to_global` and gets only those from `to_host`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pgpo_jax.errors import InputError
from pgpo_jax.sharding.hosts import host_rows, rows_of

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch of rows is split over both

# Logical axis of an array -> mesh axis. An axis that its mesh axes do not divide stays whole.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "row": BATCH_AXES,
    "column": None,
    "layer": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged; the product of the axes is the number of devices used."""

    data: int = -1
    """Copies of the model, each with its own rows (-1: all remaining devices)."""
    fsdp: int = 1
    """Devices that share one copy of the parameters; rows are split over these too."""
    tensor: int = 1
    """Devices that split heads, the feed-forward width and the vocabulary of one layer."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise InputError(
                f"mesh: got {_show(sizes)}; sizes are positive, one may be -1 (the rest)"
            )


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `("data", "fsdp", "tensor")` over `devices` (default: all).

    On a single process a mesh with stated sizes may use fewer devices than there are (the first).

    Raises:
      InputError: the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
        if len(devices) % known:
            raise InputError(
                f"mesh: got {known} for the stated axes; must divide the {len(devices)} devices"
            )
    total = int(np.prod(sizes))
    if total > len(devices):
        raise InputError(f"mesh: got {_show(sizes)} = {total} devices; there are {len(devices)}")
    if total < len(devices) and jax.process_count() > 1:
        raise InputError(
            f"mesh: got {_show(sizes)} = {total} devices; processes share all {len(devices)}"
        )
    axis_types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types, devices=devices[:total])
    except NotImplementedError:  # on TPU: an axis of the mesh is a part of one of the slice
        split = mesh_utils.create_device_mesh(
            sizes, devices[:total], allow_split_physical_axes=True
        )
        return Mesh(split, MESH_AXES, axis_types=axis_types)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Logical axes of one array -> its partition, by `RULES`; what does not divide stays whole."""
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        parts = math.prod(mesh.shape[name] for name in _mesh_axes(axis))
        rule = None if axis is None else RULES[axis]
        entries.append(rule if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*entries)


def shardings(axes_tree: Any, shapes_tree: Any, mesh: Mesh) -> Any:
    """Tree of `NamedSharding` from trees of logical axis tuples and of arrays (or their shapes)."""
    return jax.tree.map(
        lambda x, axes: NamedSharding(mesh, spec(axes, x.shape, mesh)), shapes_tree, axes_tree
    )


def shard_bytes(array: Any, where: jax.sharding.Sharding) -> int:
    """Bytes that one device holds of an array, or of its shape."""
    return math.prod(where.shard_shape(array.shape)) * array.dtype.itemsize


class WholeArray(NamedTuple):
    """An axis of an array that the mesh was to split but does not divide."""

    name: str
    axis: str
    """The logical axis, a key of `RULES`."""
    size: int
    mesh_axis: str
    parts: int
    bytes: int
    """What one device holds of the array."""


def whole_arrays(axes_tree: Any, shapes_tree: Any, mesh: Mesh) -> list[WholeArray]:
    """Arrays that stay whole over a mesh axis because it does not divide them, axis by axis."""
    axes = jax.tree.leaves(axes_tree, is_leaf=lambda x: isinstance(x, tuple))
    found = []
    for (path, shape), names in zip(jax.tree.leaves_with_path(shapes_tree), axes, strict=True):
        where = spec(names, shape.shape, mesh)
        here = shard_bytes(shape, NamedSharding(mesh, where))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for axis, size, used in zip(names, shape.shape, where, strict=True):
            over = _mesh_axes(axis)
            parts = math.prod(mesh.shape[name] for name in over)
            if parts > 1 and used is None:
                found.append(WholeArray(name, axis, size, " x ".join(over), parts, here))
    return found


def describe_whole(axes_tree: Any, shapes_tree: Any, mesh: Mesh, frozen: bool = False) -> list[str]:
    """What a mesh does not split of some arrays, in a sentence for people; empty if nothing.

    `frozen` says that the arrays are those of the teacher too, and in no optimizer's state.
    """
    found = whole_arrays(axes_tree, shapes_tree, mesh)
    if not found:
        return []
    placed = jax.tree.leaves(shardings(axes_tree, shapes_tree, mesh))
    here = sum(map(shard_bytes, jax.tree.leaves(shapes_tree), placed))
    split = {name for place in placed for name in jax.tree.leaves(tuple(place.spec))}
    lines = [
        f"mesh.{axis} = {mesh.shape[axis]} divides no array of the model"
        for axis in ("fsdp", "tensor")
        if mesh.shape[axis] > 1 and axis not in split
    ]
    found.sort(key=lambda array: -array.bytes)
    shown = [
        f"{array.name} ({array.axis} {array.size} over {array.mesh_axis} {array.parts}, "
        f"{array.bytes / 2**30:.2f} GiB)"
        for array in found[:3]
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [
        "; ".join(
            [
                *lines,
                f"every device holds whole what its mesh axis does not divide: {', '.join(shown)}"
                f"{more}",
                f"{here / 2**30:.2f} GiB of parameters a device"
                + ", and as much again for the teacher and for each moment of the optimizer"
                * (not frozen),
            ]
        )
    ]


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over."""
    rule = None if axis is None else RULES[axis]
    return (rule,) if isinstance(rule, str) else (rule or ())


def row_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Axis 0 over `BATCH_AXES`, all else whole."""
    return NamedSharding(mesh, spec(("row",) + (None,) * (len(shape) - 1), shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def to_global(tree: Any, mesh: Mesh) -> Any:
    """Global arrays whose rows (axis 0) are split over `BATCH_AXES`, from this host's own rows.

    Args:
      tree: NumPy arrays `[own rows, ...]`, the same number of rows on every host.
      mesh: their mesh.

    Returns:
      The same tree of `jax.Array`, `[own rows * processes, ...]` in process order. On one
      process, rows that do not divide over the mesh stay whole on every device.

    Raises:
      InputError: with several processes, when the rows do not divide.
    """

    def place(local):
        local = np.asarray(local)
        shape = (local.shape[0] * jax.process_count(), *local.shape[1:])
        sharding = row_sharding(shape, mesh)
        if jax.process_count() == 1:
            return jax.device_put(local, sharding)
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        if shape[0] % parts:
            raise InputError(
                f"rows: got {shape[0]} over all hosts; must divide by data x fsdp = {parts}"
            )
        if _aligned(sharding, shape):
            return jax.make_array_from_process_local_data(sharding, local, shape)
        # A tensor axis that spans hosts: a device holds rows of another host.
        everything = np.asarray(multihost_utils.process_allgather(local, tiled=True))
        return jax.make_array_from_callback(shape, sharding, lambda index: everything[index])

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """This host's own rows of every global array, in order, as NumPy; undoes `to_global`."""

    def collect(array):
        rows = host_rows(array.shape[0])
        here = array.is_fully_addressable or array.is_fully_replicated
        if here or not _aligned(array.sharding, array.shape):
            return fetch(array)[rows]
        local = np.empty((rows.stop - rows.start, *array.shape[1:]), array.dtype)
        for shard in array.addressable_shards:
            start, stop, _ = shard.index[0].indices(array.shape[0])
            local[start - rows.start : stop - rows.start] = jax.device_get(shard.data)
        return local

    return jax.tree.map(collect, tree)


def fetch(tree: Any) -> Any:
    """Whole arrays as NumPy on every host; a collective when an array is spread over hosts."""

    def whole(array: Any):
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return np.asarray(jax.device_get(array))
        if not array.is_fully_replicated:
            where: Any = array.sharding
            array = _replicate(where.mesh)(array)
        return np.asarray(jax.device_get(array.addressable_data(0)))

    return jax.tree.map(whole, tree)


def place(tree: Any, where: NamedSharding) -> Any:
    """Global arrays from whole arrays that every host holds alike."""

    def put(whole):
        whole = np.asarray(jax.device_get(whole))
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(put, tree)


def _show(sizes: Sequence[int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))


def _aligned(sharding: jax.sharding.Sharding, shape: Sequence[int]) -> bool:
    """Whether every device holds whole rows of its own host only; the same answer on every host."""
    for device, index in sharding.devices_indices_map(tuple(shape)).items():
        start, stop, _ = index[0].indices(shape[0])
        rows = rows_of(device.process_index, shape[0])
        whole = all(
            part.indices(size) == (0, size, 1)
            for part, size in zip(index[1:], shape[1:], strict=True)
        )
        if not (whole and rows.start <= start and stop <= rows.stop):
            return False
    return True


@functools.lru_cache
def _replicate(mesh: Mesh):
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))
