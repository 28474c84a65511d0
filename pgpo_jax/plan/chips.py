"""Chips that a plan can be made for, and the least time that work takes on them (roofline)."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from pgpo_jax.errors import InputError
from pgpo_jax.plan import hlo_cost

GIB = 2**30


class Chip(NamedTuple):
    """What a device offers; None = not known."""

    hbm_bytes: int | None
    peak_flops: float | None
    """bfloat16 products, operations per second."""
    bandwidth: float | None
    """Of its memory, bytes per second."""
    ici_bandwidth: float | None
    """What it can send to other chips over all its links, bytes per second."""


# By `device_kind`. cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, section "System architecture" (the
# interconnect in one direction, half of the bidirectional figures); data sheets of nvidia.com.
CHIPS = {
    "TPU v4": Chip(32 * GIB, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Chip(16 * GIB, 197e12, 819e9, 200e9),
    "TPU v5": Chip(95 * GIB, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip(32 * GIB, 918e12, 1640e9, 400e9),
    "NVIDIA A100-SXM4-80GB": Chip(80 * GIB, 312e12, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(80 * GIB, 989e12, 3350e9, 450e9),
    "NVIDIA H200": Chip(141 * 10**9, 989e12, 4800e9, 450e9),
}
USABLE = 0.975
"""The part of a chip's memory that programs get: 15.75 of 16 GiB on v5e, 31.25 of 32 on v6e."""
# There is no TPU machine to ask, and libtpu complains at length of not knowing which it is on.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(topology: str | None) -> list[Any]:
    """Devices of a TPU slice that need not exist, such as `v5p:4x4x4`; the local ones for None.

    Raises:
      InputError: No libtpu, or a name that it does not know.
    """
    if topology is None:
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology: got {topology}, but libtpu is not installed; pip install 'pgpo_jax[plan]'"
        )
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # v4 shows its two cores as one device, as it does where it runs.
    kinds = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **kinds
        ).devices
    except Exception as error:  # libtpu's own types
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"--topology: got {topology} ({reason}); must be like v5p:4x4x4, v6e:8x8 or v5e:4x4"
        ) from error
    return list(described)


def chip_of(device: Any) -> Chip:
    """What `CHIPS` knows of a device.

    Raises:
      InputError: A TPU that is not in the table.
    """
    if device.device_kind in CHIPS:
        return CHIPS[device.device_kind]
    if device.platform == "tpu":
        known = ", ".join(name for name in CHIPS if name.startswith("TPU"))
        raise InputError(f"--topology: got a chip {device.device_kind}; must be one of {known}")
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip(memory // len(jax.local_devices()), None, None, None)
    return Chip((device.memory_stats() or {}).get("bytes_limit"), None, None, None)


def roofline(operations: Sequence[hlo_cost.Operation], chip: Chip) -> dict[str, float | None]:
    """Least seconds for products, memory, collectives, and together, if the chip is known."""
    cost = hlo_cost.total(operations)
    if chip.peak_flops is None or chip.bandwidth is None or chip.ici_bandwidth is None:
        return dict.fromkeys(("products", "memory", "collectives", "total"))
    kernels = sum(
        item.count * max(item.matrix_flops / chip.peak_flops, item.bytes / chip.bandwidth)
        for item in operations
        if not item.name.startswith("copy-start")  # runs beside the others
    )
    parts = {
        "products": cost.matrix_flops / chip.peak_flops,
        "memory": cost.bytes / chip.bandwidth,
        "collectives": sum(cost.collective_bytes.values()) / chip.ici_bandwidth,
    }
    return {**parts, "total": max(kernels, *parts.values())}
