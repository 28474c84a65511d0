"""NVIDIA GPUs as XLA's compiler is told of them, so that it compiles for cards that are not there.

XLA asks a card for its figures (`GpuTargetConfigProto`); here they are stated. They decide tiles
and whether a kernel fits; times come from `chips.CHIPS`.
"""

import importlib.metadata
import os
import re
from typing import Any, NamedTuple

from pgpo_jax.errors import InputError

KIB, MIB = 2**10, 2**20


class Card(NamedTuple):
    """Public figures of a card."""

    name: str
    """As its driver gives it, which becomes the `device_kind`."""
    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    fpus: int
    """float32 units of each."""
    shared_memory: int
    """Bytes of each; a block may have 1 KiB less."""
    l2_cache: int
    clock_ghz: float
    memory: int
    bandwidth: float


# White papers of nvidia.com on the A100 and H100 architectures, data sheets of H200 and HGX B200;
# shared memory as the CUDA C++ programming guide has it in its table of compute capabilities.
CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * KIB, 40 * MIB, 1.41, 80 * 10**9, 2039e9
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * KIB, 50 * MIB, 1.98, 80 * 10**9, 3350e9
    ),
    "h200": Card("NVIDIA H200", (9, 0), 132, 128, 228 * KIB, 50 * MIB, 1.98, 141 * 10**9, 4800e9),
    "b200": Card("NVIDIA B200", (10, 0), 148, 128, 228 * KIB, 126 * MIB, 1.965, 180 * 10**9, 8e12),
}
CUDNN = (9, 12, 0)
"""Version whose kernels are compiled for: the one of the extra `plan-gpu`."""
COMPILER = (
    *("jax-cuda13-plugin", "jax-cuda13-pjrt"),
    *("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cudnn-cu13"),
)
"""Packages of that extra that compile; none of them looks for a GPU or its driver."""
MOST_GPUS = 8
"""On a node: an HGX board."""


def is_gpu(topology: str) -> bool:
    """Whether a topology's name begins with a card's."""
    return topology.split(":")[0] in CARDS


def parse(topology: str) -> tuple[Card, int, int]:
    """Card, nodes and GPUs on each, of a name such as `h100:2x8`.

    Raises:
      InputError: Another form, or numbers that no cluster has.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*)", topology)
    if found is None or int(found[3]) > MOST_GPUS:
        raise InputError(
            f"--topology: got {topology}; must be {topology.split(':')[0]}:NODESxGPUS with 1 to "
            f"{MOST_GPUS} GPUs a node, such as h100:2x8"
        )
    return CARDS[found[1]], int(found[2]), int(found[3])


def target_config(card: Card) -> str:
    """A card as XLA's `GpuTargetConfigProto` in text form (xla/stream_executor)."""
    major, minor = card.capability
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    versions = dict(zip(("major", "minor", "patch"), CUDNN, strict=True))
    info = {
        "name": f'"{card.name}"',
        "core_count": card.cores,
        "fpus_per_core": card.fpus,
        "clock_rate_ghz": card.clock_ghz,
        "device_memory_size": card.memory,
        "memory_bandwidth": int(card.bandwidth),
        "l2_cache_size": card.l2_cache,
        "shared_memory_per_core": card.shared_memory,
        "shared_memory_per_block": 48 * KIB,
        "shared_memory_per_block_optin": card.shared_memory - KIB,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "threads_per_core_limit": 2048,
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
    }
    return "\n".join(
        (
            "gpu_device_info {",
            *(f"  {name}: {value}" for name, value in info.items()),
            f"  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}",
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {' '.join(f'{part}: {n}' for part, n in versions.items())} }}",
            f'device_description_str: "{card.name}"',
        )
    )


def missing() -> list[str]:
    """Packages of `COMPILER` that are not installed."""

    def installed(name: str) -> bool:
        try:
            return bool(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            return False

    return [name for name in COMPILER if not installed(name)]


def devices(topology: str) -> list[Any]:
    """Devices of a cluster that need not exist, node after node.

    Raises:
      InputError: A name that is none, or no compiler for GPUs.
    """
    card, nodes, each = parse(topology)
    if absent := missing():
        raise InputError(
            f"--topology: got {topology}, but these are not installed: {', '.join(absent)}; "
            "pip install 'pgpo_jax[plan-gpu]'"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it looks for a driver, in vain
    from jax.experimental import topologies

    described = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(card), topology=f"1x{nodes}x{each}"
    )
    return list(described.devices)
