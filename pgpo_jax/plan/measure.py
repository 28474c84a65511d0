"""Memory and work of one setup's compiled programs, and the verdict whether they fit a chip."""

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from pgpo_jax.plan import chips, hlo, hlo_cost, live, programs
from pgpo_jax.plan.chips import Chip
from pgpo_jax.plan.programs import Setup

NOT_COUNTED = (
    "rollouts of evaluation, the warm start, recomputed log-probs, and copies that a save makes"
)
"""Programs of a run that a plan does not compile."""

TEMPORARY = ("vocabulary", "weights", "activations", "temporaries")
"""What the train step holds beside the state: tables and logits as wide as the vocabulary, further
arrays of the weights' shapes, and what depends on lengths; `temporaries` are these and the
gradients."""


class Compiled(NamedTuple):
    """A program, and what one device needs to run it."""

    module: hlo.Module
    arguments: int
    temporaries: int
    total: int
    seconds: float


class OutOfMemory(Exception):
    """The compiler could not place a program; holds the bytes it would need, if it said so."""

    def __init__(self, needed: int | None):
        super().__init__(needed)
        self.needed = needed


def compile_program(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles, and reads memory and operations.

    Raises:
      OutOfMemory: The program does not fit the chip, which the TPU compiler finds out by itself.
    """
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        raise OutOfMemory(_needed(str(error))) from error
    memory: Any = compiled.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Compiled(
        hlo.parse(compiled.as_text() or ""),
        *parts,
        sum(parts) + max(fresh, 0) + memory.generated_code_size_in_bytes,
        time.perf_counter() - started,
    )


def _needed(message: str) -> int | None:
    """Bytes from "... (53.11G) exceeds available HBM (15.75G)" or "Used 53.11G of 15.75G hbm"."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", message)
    if found is None:
        return None
    value, unit = (part for part in found.groups() if part is not None)
    return int(float(value) * 1024 ** ("KMGT".index(unit) + 1))


def measure(setup: Setup) -> dict[str, Any]:
    """Compiles a setup's programs; the part of the plan that depends on the mesh."""
    chip, state = _chip(setup), programs.state_bytes(setup)
    out: dict[str, Any] = {
        "mesh": dict(setup.mesh.shape),
        "micro_batches": setup.config.data.micro_batches,
        "slots": setup.slots,
        "fits": False,
        "reason": None,
        "per_chip": {**state, **dict.fromkeys(TEMPORARY), "total": None},
        "state_bytes_per_parameter": programs.state_bytes_per_parameter(setup),
        "stays_whole": programs.whole_arrays(setup),
        "bytes_per_parameter": programs.bytes_per_parameter(setup),
        "not_counted": NOT_COUNTED,
    }
    alone = sum(state.values())
    if not _fits(alone, chip):
        out["per_chip"]["total"] = alone
        return out | {"reason": "student, teacher, optimizer and gradients alone are too large"}
    try:
        step = compile_program(programs.lower_train_step(setup))
    except OutOfMemory as error:
        out["per_chip"]["total"] = error.needed
        return out | {"reason": "the train step is too large"}
    held, beside = _held(setup, step.module), max(step.temporaries - state["gradients"], 0)
    out["per_chip"] |= {
        **held,
        "weights": max(beside - sum(held.values()), 0),
        "temporaries": step.temporaries,
        "total": step.total,
    }
    out |= _train_work(setup, step)
    out["decode"] = measure_decode(setup, alone - state["gradients"])
    sizes = {"the train step": step.total}
    for name, total in out["decode"]["programs"].items():
        if total is None:
            return out | {"reason": f"the sampler's program `{name}` is too large"}
        sizes[f"the sampler's program `{name}`, beside the run's state,"] = total
    largest = max(sizes, key=lambda name: sizes[name])
    if not _fits(sizes[largest], chip):
        return out | {"reason": f"{largest} is too large"}
    return out | {"fits": True}


def _held(setup: Setup, module: hlo.Module) -> dict[str, int]:
    """Bytes of the train step's `vocabulary` and `activations` where its memory is at its largest.

    An array is told by its sizes: one of the vocabulary's, whole or split; or a parameter's, whole
    or split, of all layers or one, in any order. Gradients are left out of the first.
    """
    size, mesh = setup.architecture.vocab_size, setup.mesh.shape
    wide = {-(-size // parts) for parts in (1, mesh["tensor"], mesh["fsdp"], setup.mesh.size)}
    wide = {width for width in wide if width > setup.architecture.hidden_size}
    trained, frozen = programs.abstract_params(setup)
    shapes: set[tuple[int, ...]] = set()
    for leaf in jax.tree.leaves((trained, frozen)):
        for sizes in (leaf.shape, leaf.sharding.shard_shape(leaf.shape)):
            shapes |= {_sizes(sizes), _sizes(sizes[1:])}

    def kind(array: hlo.Shape) -> str:
        if not wide.isdisjoint(array.dims):
            return "vocabulary"
        return "weights" if _sizes(array.dims) in shapes else "activations"

    found = live.peak(module, kind)
    tables = [leaf for leaf in jax.tree.leaves(trained) if size in leaf.shape]
    vocabulary = found.get("vocabulary", 0) - programs.shard_bytes(tables)
    return {"vocabulary": max(vocabulary, 0), "activations": found.get("activations", 0)}


def _sizes(dims: Sequence[int]) -> tuple[int, ...]:
    """Of an array, in one order and without those that are 1."""
    return tuple(sorted(size for size in dims if size > 1))


def _train_work(setup: Setup, step: Compiled) -> dict[str, Any]:
    """Operations, traffic and the least time of a compiled train step, which is one update."""
    chip = _chip(setup)
    operations = hlo_cost.operations(step.module)
    work, seconds = _work(operations, chip)
    likely = chips.roofline(operations, chip, chips.LIKELY)["total"]
    useful = programs.model_flops(setup)

    def used(seconds: float | None) -> float | None:
        """Part of the peak that the model's operations take."""
        if chip.peak_flops is None or not seconds:
            return None
        return useful / setup.mesh.size / chip.peak_flops / seconds

    return work | {
        "estimated_step_seconds": seconds["total"],
        "estimated_seconds_by_part": seconds,
        "estimated_mfu": used(seconds["total"]),
        "likely_step_seconds": likely,
        "likely_mfu": used(likely),
        "exposed_collective_seconds": chips.exposed_seconds(operations, chip),
        "attention_flops_per_chip": hlo_cost.total(operations).attention_flops,
        "model_flops": useful,
        "compile_seconds": step.seconds,
    }


def measure_decode(setup: Setup, resident: int) -> dict[str, Any]:
    """Memory of every program of a rollout, and the work of one token for every slot.

    Args:
      setup: What is compiled.
      resident: Bytes of the run's state, which stay on every device meanwhile.

    Returns:
      `programs` holds each one's bytes with all that lives beside it, None where the compiler
      could not place it; `total` the largest; what `decode` alone tells is absent without it.
    """
    parameters = programs.shard_bytes(programs.abstract_params(setup))  # and what is frozen
    totals: dict[str, int | None] = {}
    needed, decode = 0, None
    for name, lowered in programs.lower_sampler(setup).items():
        # The programs that read the parameters count them as arguments: they are the run's state.
        counted = parameters if name in ("weights", "prefill") else 0
        around = resident - counted + programs.shard_bytes(lowered.beside)
        try:
            compiled = compile_program(lowered.program)
        except OutOfMemory as error:
            totals[name] = None
            needed = max(needed, around + (error.needed or 0))
            break
        totals[name] = around + compiled.total
        needed = max(needed, around + compiled.total)
        decode = compiled if name == "decode" else None
    out = {"programs": totals, "total": needed, "cache": programs.cache_bytes(setup)}
    if decode is None:
        return out
    work, seconds = _work(hlo_cost.open_loops(decode.module), _chip(setup))
    each_call = chips.roofline(hlo_cost.operations(decode.module, 0), _chip(setup))["total"]
    rollout = None
    if seconds["total"] is not None and each_call is not None:
        each = seconds["total"] + each_call / setup.config.sampling.chunk
        rollout = each * setup.response * -(-setup.rows // setup.slots)
    return out | {
        "weights": decode.arguments - out["cache"],
        "temporaries": decode.temporaries,
        **work,
        "seconds_per_token": seconds["total"],
        "rollout_seconds": rollout,
        "compile_seconds": decode.seconds,
    }


def overhead(setup: Setup, measured: dict[str, Any]) -> dict[str, float]:
    """PGPO over SDPO: the same step compiled with the configured alpha and with alpha 0."""
    if setup.config.optimizer.alpha == 0:
        return {"pgpo_flops_ratio": 1.0, "pgpo_bytes_ratio": 1.0}
    module = compile_program(programs.lower_train_step(setup, alpha=0.0)).module
    cost = hlo_cost.total(hlo_cost.operations(module))
    return {
        "pgpo_flops_ratio": measured["flops_per_chip"] / cost.flops,
        "pgpo_bytes_ratio": measured["bytes_per_chip"] / cost.bytes,
    }


def _fits(size: int, chip: Chip) -> bool:
    usable = chips.usable_bytes(chip)
    return usable is None or size <= usable


def _chip(setup: Setup) -> Chip:
    return chips.chip_among(list(setup.mesh.devices.flat))


def _work(
    operations: Sequence[hlo_cost.Operation], chip: Chip
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Operations and traffic of one device, and the least seconds that they take."""
    cost = hlo_cost.total(operations)
    work = {
        "flops_per_chip": cost.flops,
        "bytes_per_chip": cost.bytes,
        "collective_bytes_per_chip": sum(cost.collective_bytes.values()),
        "collective_bytes_by_kind": cost.collective_bytes,
    }
    return work, chips.roofline(operations, chip)
