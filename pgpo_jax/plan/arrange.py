"""Arrangements of a run on devices that fit where the configured one does not."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from pgpo_jax import models
from pgpo_jax.config import Config
from pgpo_jax.plan import chips, measure, programs
from pgpo_jax.plan.programs import Setup
from pgpo_jax.sharding import MeshConfig

MOST_ATTEMPTS = 3
"""Arrangements compiled to find one that fits."""


def arrangements(config: Config, devices: Sequence[Any]) -> Iterator[Setup]:
    """Setups that may fit where another does not, those that communicate least first.

    Parameters split over as many devices as there are rows at most (`fsdp`), heads over the rest
    and then over more (`tensor`); one row at a time on each; slots as far as memory goes.
    """
    c, chip = programs.architecture_of(config.model), chips.chip_of(devices[0])
    rows, count = programs.row_count(config) // config.data.updates_per_rollout, len(devices)
    for tensor in (2**i for i in range(count.bit_length())):
        parts = count // tensor
        kv_heads = c.num_key_value_heads
        even = kv_heads % tensor == 0 or tensor % kv_heads == 0
        if count % tensor or rows % parts or c.num_attention_heads % tensor or not even:
            continue
        changed = dataclasses.replace(
            config,
            mesh=MeshConfig(data=1, fsdp=parts, tensor=tensor),
            data=dataclasses.replace(config.data, micro_batches=rows // parts),
        )
        setup = programs.make_setup(changed, devices)
        state = programs.state_bytes(setup)
        if chip.hbm_bytes is None or sum(state.values()) < 0.9 * chip.hbm_bytes:
            yield _with_slots(setup, chip.hbm_bytes, sum(state.values()) - state["gradients"])


def _with_slots(setup: Setup, hbm_bytes: int | None, resident: int) -> Setup:
    """Fewer slots where the cache of all would not fit beside the state and decoding's weights."""
    params, mesh = models.join(*programs.abstract_params(setup)), setup.mesh
    split = mesh.shape["tensor"] if setup.config.sampling.gather_weights else mesh.size
    weights = sum(2 * x.size for x in jax.tree.leaves(params)) // split
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    slots = setup.slots
    while hbm_bytes is not None and slots > parts:
        cache = programs.cache_bytes(setup._replace(slots=slots))
        if resident + weights + 1.5 * cache < 0.9 * hbm_bytes:
            break
        slots = -(-slots // 2 // parts) * parts
    sampling = dataclasses.replace(setup.config.sampling, slots=slots)
    return setup._replace(config=dataclasses.replace(setup.config, sampling=sampling), slots=slots)


def suggest(config: Config, devices: Sequence[Any]) -> dict[str, Any] | None:
    """The first of a few arrangements that fits, compiled to be sure; None if none does."""
    for attempt, setup in enumerate(arrangements(config, devices)):
        if attempt == MOST_ATTEMPTS:
            break
        found = measure.measure(setup)
        if found["fits"]:
            sizes = {f"mesh.{axis}": size for axis, size in found["mesh"].items()}
            sizes |= {
                "data.micro_batches": found["micro_batches"],
                "sampling.slots": found["slots"],
            }
            return {"overrides": sizes, "per_chip": found["per_chip"], "decode": found["decode"]}
    return None
