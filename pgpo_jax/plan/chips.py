"""Chips that a plan can be made for, and the least time that work takes on them (roofline)."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from pgpo_jax.errors import InputError
from pgpo_jax.plan import gpus, hlo_cost

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
    network: float | None = None
    """A GPU's part of what its node can send to others, bytes per second."""
    node: int | None = None
    """GPUs on its node; None where links reach every chip."""


# By `device_kind`. cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, section "System architecture" (the
# interconnect in one direction, half of the bidirectional figures); data sheets of nvidia.com, of
# the cards (products without sparsity, NVLink in one direction) and of DGX A100, H100, H200, B200
# (a network card of 200 or 400 Gbit/s for every GPU).
CHIPS = {
    "TPU v4": Chip(32 * GIB, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Chip(16 * GIB, 197e12, 819e9, 200e9),
    "TPU v5": Chip(95 * GIB, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip(32 * GIB, 918e12, 1640e9, 400e9),
    "NVIDIA A100-SXM4-80GB": Chip(80 * GIB, 312e12, 2039e9, 300e9, 25e9),
    "NVIDIA H100 80GB HBM3": Chip(80 * GIB, 989e12, 3350e9, 450e9, 50e9),
    "NVIDIA H200": Chip(141 * 10**9, 989e12, 4800e9, 450e9, 50e9),
    "NVIDIA B200": Chip(180 * 10**9, 2250e12, 8000e9, 900e9, 50e9),
}
USABLE = 0.975
"""The part of a chip's memory that programs get: 15.75 of 16 GiB on v5e, 31.25 of 32 on v6e."""
USABLE_GPU = 0.95
"""At most, as `XLA_PYTHON_CLIENT_MEM_FRACTION`: CUDA, cuBLAS and NCCL need the rest."""
TAKEN_GPU = 0.75
"""What JAX takes of a GPU unless that variable says more."""
# There is no TPU machine to ask, and libtpu complains at length of not knowing which it is on.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Efficiency(NamedTuple):
    """The parts of a chip's peak that are reached."""

    products: float
    attention: float


BEST = Efficiency(products=1.0, attention=1.0)
LIKELY = Efficiency(products=0.8, attention=0.55)
"""What good kernels reach on whole layers of a large model: an assumption, not a measurement."""


def topology_devices(topology: str | None) -> list[Any]:
    """Devices that need not exist, of a TPU slice such as `v5p:4x4x4` or of nodes with GPUs such as
    `h100:2x8`; the local ones for None.

    Raises:
      InputError: No compiler for them, or a name that it does not know.
    """
    if topology is None:
        return jax.devices()
    if gpus.is_gpu(topology):
        return gpus.devices(topology)
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
            f"--topology: got {topology} ({reason}); must be like v5p:4x4x4, v6e:8x8, v5e:4x4 or "
            "h100:1x8"
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


def usable_bytes(chip: Chip) -> float | None:
    """What programs get of a chip's memory, if it is known."""
    if chip.hbm_bytes is None:
        return None
    return chip.hbm_bytes * (USABLE if chip.network is None else USABLE_GPU)


def chip_among(devices: Sequence[Any]) -> Chip:
    """`chip_of` the first of some devices, with how many of them stand on its node."""
    chip = chip_of(devices[0])
    if chip.network is None:
        return chip
    here = [device for device in devices if device.process_index == devices[0].process_index]
    return chip._replace(node=len(here))


def roofline(
    operations: Sequence[hlo_cost.Operation], chip: Chip, efficiency: Efficiency = BEST
) -> dict[str, float | None]:
    """Seconds for products, memory, collectives, and together, if the chip is known.

    Kernels run one after another, each at the rate of its products or of memory, whichever takes
    longer; exposed collectives stand among them, the others run beside.
    """
    if chip.peak_flops is None or chip.bandwidth is None or chip.ici_bandwidth is None:
        return dict.fromkeys(("products", "memory", "collectives", "total"))
    peak, bandwidth = chip.peak_flops, chip.bandwidth

    def products(item: hlo_cost.Operation) -> float:
        rest = item.matrix_flops - item.attention_flops
        useful = rest / efficiency.products + item.attention_flops / efficiency.attention
        return useful / peak

    kernels = sum(
        item.count
        * max(
            products(item),
            item.bytes / bandwidth,
            collective_seconds(item, chip) if item.exposed else 0.0,
        )
        for item in operations
        if not item.name.startswith("copy-start")  # runs beside the others
    )
    parts = {
        "products": sum(item.count * products(item) for item in operations),
        "memory": hlo_cost.total(operations).bytes / bandwidth,
        "collectives": sum(item.count * collective_seconds(item, chip) for item in operations),
    }
    return {**parts, "total": max(kernels, *parts.values())}


def exposed_seconds(operations: Sequence[hlo_cost.Operation], chip: Chip) -> float | None:
    """Time of the collectives that nothing hides, if the chip is known."""
    if chip.ici_bandwidth is None:
        return None
    exposed = (item for item in operations if item.exposed)
    return sum(item.count * collective_seconds(item, chip) for item in exposed)


def collective_seconds(item: hlo_cost.Operation, chip: Chip) -> float:
    """Least time of one collective; a ring over several nodes uses all their network cards."""
    assert chip.ici_bandwidth is not None
    rate = chip.ici_bandwidth
    if chip.node is not None and chip.network is not None and item.group > chip.node:
        rate = min(rate, chip.node * chip.network)
    return item.collective_bytes / rate
