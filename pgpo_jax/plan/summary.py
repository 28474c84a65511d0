"""A run on paper: `python -m pgpo_jax.plan CONFIG [--topology v5p:4x4x4] [--section.field value]`.

Compiles the real train step and the real decoding step ahead of time, for a TPU slice on a machine
without one (extra `plan`), or for the local devices without `--topology`; nothing is loaded or run.
The table says whether the run fits and what bounds it, the last line is the same as JSON.

Lengths are those of the worst batch: every prompt, teacher prompt and response at its limit
(`data.max_prompt_length`, `reprompt.max_length`, `sampling.max_response_length`). Where this fits,
every batch of the run does, and its time is the longest a step takes.

The times are bounds, not measurements: every kernel at the chip's peak or its memory's bandwidth,
whichever is slower, and collectives, if they take less than that, for nothing.
"""

import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from pgpo_jax import config as config_module
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError
from pgpo_jax.models import decoder
from pgpo_jax.plan import chips, hlo, hlo_cost, programs
from pgpo_jax.plan.chips import GIB, Chip
from pgpo_jax.plan.programs import Setup
from pgpo_jax.sharding import MeshConfig

MOST_ATTEMPTS = 3
"""Arrangements compiled to find one that fits."""


# ---- compiling -----------------------------------------------------------------------------------


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


# ---- the plan ------------------------------------------------------------------------------------


def measure(setup: Setup) -> dict[str, Any]:
    """Compiles both programs of a setup; the part of the plan that depends on the mesh."""
    chip, state = _chip(setup), programs.state_bytes(setup)
    out: dict[str, Any] = {
        "mesh": dict(setup.mesh.shape),
        "micro_batches": setup.config.data.micro_batches,
        "slots": setup.slots,
        "fits": False,
        "reason": None,
        "per_chip": {**state, "activations": None, "temporaries": None, "total": None},
    }
    alone = sum(state.values())
    if chip.hbm_bytes is not None and alone > chips.USABLE * chip.hbm_bytes:
        out["per_chip"]["total"] = alone
        return out | {"reason": "student, teacher, optimizer and gradients alone are too large"}
    try:
        step = compile_program(programs.lower_train_step(setup))
    except OutOfMemory as error:
        out["per_chip"]["total"] = error.needed
        return out | {"reason": "the train step is too large"}
    out["per_chip"] |= {
        "activations": max(step.temporaries - state["gradients"], 0),
        "temporaries": step.temporaries,
        "total": step.total,
    }
    work, seconds = _work(hlo_cost.operations(step.module), chip)
    useful, mfu = programs.model_flops(setup), None
    if chip.peak_flops is not None and seconds["total"]:
        mfu = useful / setup.mesh.size / chip.peak_flops / seconds["total"]
    out |= work | {
        "estimated_step_seconds": seconds["total"],
        "estimated_seconds_by_part": seconds,
        "estimated_mfu": mfu,
        "model_flops": useful,
        "compile_seconds": step.seconds,
    }
    resident = alone - state["gradients"]
    try:
        out["decode"] = measure_decode(setup, resident)
    except OutOfMemory as error:
        total = error.needed and resident + error.needed
        return out | {"reason": "decoding is too large", "decode": {"total": total}}
    largest = max(step.total, out["decode"]["total"])
    out["fits"] = chip.hbm_bytes is None or largest <= chips.USABLE * chip.hbm_bytes
    if not out["fits"]:
        part = "the train step" if step.total == largest else "decoding beside the run's state"
        out["reason"] = f"{part} is too large"
    return out


def measure_decode(setup: Setup, resident: int) -> dict[str, Any]:
    """Memory beside the state's `resident` bytes, and the work of one token for every slot.

    Raises:
      OutOfMemory: It does not fit.
    """
    decode, cache = compile_program(programs.lower_decode(setup)), programs.cache_bytes(setup)
    weights = decode.arguments - cache
    work, seconds = _work(hlo_cost.open_loops(decode.module), _chip(setup))
    each_call = chips.roofline(hlo_cost.operations(decode.module, 0), _chip(setup))["total"]
    rollout = None
    if seconds["total"] is not None and each_call is not None:
        each = seconds["total"] + each_call / setup.config.sampling.chunk
        rollout = each * setup.response * -(-setup.rows // setup.slots)
    return {
        "weights": weights,
        "cache": cache,
        "temporaries": decode.temporaries,
        # Growing the cache to its last size needs the one of half that beside it.
        "total": resident + max(decode.total, weights + cache * 3 // 2),
        **work,
        "seconds_per_token": seconds["total"],
        "rollout_seconds": rollout,
        "compile_seconds": decode.seconds,
    }


def _chip(setup: Setup) -> Chip:
    return chips.chip_of(setup.mesh.devices.flat[0])


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


def arrangements(config: Config, devices: Sequence[Any]) -> Iterator[Setup]:
    """Setups that may fit where another does not, those that communicate least first.

    Parameters split over as many devices as there are rows at most (`fsdp`), heads over the rest
    and then over more (`tensor`); one row at a time on each; slots as far as memory goes.
    """
    c, chip = programs.architecture_of(config.model), chips.chip_of(devices[0])
    rows, count = programs.row_count(config), len(devices)
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
    params, mesh = programs.abstract_params(setup), setup.mesh
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
        found = measure(setup)
        if found["fits"]:
            sizes = {f"mesh.{axis}": size for axis, size in found["mesh"].items()}
            sizes |= {
                "data.micro_batches": found["micro_batches"],
                "sampling.slots": found["slots"],
            }
            return {"overrides": sizes, "per_chip": found["per_chip"], "decode": found["decode"]}
    return None


def plan(config: Config, topology: str | None = None) -> dict[str, Any]:
    """Everything that the command prints; see the module's docstring.

    Args:
      config: The run.
      topology: A TPU slice, or None for the local devices.

    Raises:
      InputError: An unknown topology or chip, no libtpu, or no architecture.
    """
    devices = chips.topology_devices(topology)
    chip, architecture = chips.chip_of(devices[0]), programs.architecture_of(config.model)
    kinds = ("parameters", "optimizer", "teacher", "temporaries", "total")
    unknown = dict.fromkeys(
        (
            "flops_per_chip",
            "bytes_per_chip",
            "collective_bytes_per_chip",
            "estimated_step_seconds",
            "estimated_mfu",
            "pgpo_flops_ratio",
        )
    )
    out: dict[str, Any] = {
        "topology": topology or "local",
        "device": devices[0].device_kind,
        "chips": len(devices),
        "mesh": dataclasses.asdict(config.mesh),
        "fits": False,
        "hbm_bytes": chip.hbm_bytes,
        "per_chip": dict.fromkeys(kinds),
        **unknown,
        "model_parameters": sum(
            x.size for x in jax.tree.leaves(decoder.param_shapes(architecture))
        ),
        "jax": jax.__version__,
    }
    try:
        setup = programs.make_setup(config, devices)
    except InputError as error:  # a mesh for other devices is one that does not fit
        out["reason"] = str(error)
    else:
        lengths = ("rows", "prompt", "teacher_prompt", "response")
        out |= {"batch": {name: getattr(setup, name) for name in lengths}}
        out |= measure(setup)
        if out["fits"]:
            out |= overhead(setup, out)
    if not out["fits"]:
        out["suggestion"] = suggest(config, devices)
    return out


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


# ---- the command ---------------------------------------------------------------------------------


def describe(found: dict[str, Any]) -> str:
    """The plan as a table for people."""

    def gib(value: int | None) -> str:
        if value is None:
            return "?"
        return f"{value / GIB:,.2f} GiB" if value >= GIB / 10 else f"{value / 2**20:,.2f} MiB"

    def number(value: float | None, unit: str) -> str:
        return "?" if value is None else f"{value:.4g} {unit}"

    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    rows: list[tuple[str, str]] = [
        ("devices", f"{found['chips']} {found['device']} ({found['topology']}), mesh {mesh}"),
        ("model", f"{found['model_parameters']:,} parameters"),
    ]
    if "batch" in found:
        b = found["batch"]
        rows.append(
            (
                "batch",
                f"{b['rows']} rows: prompt {b['prompt']} (teacher {b['teacher_prompt']}) + "
                f"response {b['response']} tokens, {found['micro_batches']} micro-batches",
            )
        )
    rows.append(("memory per chip", gib(found["hbm_bytes"])))
    rows += [(f"  {name}", gib(value)) for name, value in found["per_chip"].items()]
    if found["flops_per_chip"] is not None:
        rows += [
            ("operations per chip", number(found["flops_per_chip"], "FLOP")),
            ("memory traffic per chip", number(found["bytes_per_chip"], "bytes")),
            ("sent per chip", number(found["collective_bytes_per_chip"], "bytes")),
        ]
        by_kind = sorted(found["collective_bytes_by_kind"].items(), key=lambda item: -item[1])
        rows += [(f"  {kind}", number(value, "bytes")) for kind, value in by_kind]
        rows.append(("step, at best", number(found["estimated_step_seconds"], "s")))
        parts = found["estimated_seconds_by_part"].items()
        rows += [(f"  {name}", number(value, "s")) for name, value in parts if name != "total"]
        rows += [
            ("model FLOPs used, at best", number(found["estimated_mfu"], "of peak")),
        ]
        if found["pgpo_flops_ratio"] is not None:
            rows.append(("operations, alpha over 0", f"x {found['pgpo_flops_ratio']:.9f}"))
    if decode := found.get("decode"):
        rows.append(("decoding, with the state", gib(decode["total"])))
        if "cache" in decode:
            rows += [(f"  {name}", gib(decode[name])) for name in ("weights", "cache")]
            rows += [
                ("  slots", str(found["slots"])),
                ("  a token for every slot, at best", number(decode["seconds_per_token"], "s")),
                ("  all responses at their longest", number(decode["rollout_seconds"], "s")),
            ]
    rows.append(("fits", "yes" if found["fits"] else f"no: {found['reason']}"))
    if not found["fits"]:
        suggestion = found["suggestion"]
        text = "none on these devices; take more of them"
        if suggestion:
            text = " ".join(f"--{name} {value}" for name, value in suggestion["overrides"].items())
        rows.append(("fits instead", text))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _take_topology(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """`--topology X` or `--topology=X`, and the other arguments."""
    rest, topology = [], None
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--topology":
            topology = next(arguments, "")
        elif argument.startswith("--topology="):
            topology = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    if topology == "":
        raise InputError("--topology: got nothing; must be like v5p:4x4x4")
    return topology, rest


def main(argv: Sequence[str]) -> None:
    """`CONFIG [--topology v5p:4x4x4] [--section.field value ...]`."""
    topology, rest = _take_topology(argv)
    if {"-h", "--help"} & set(rest):
        print("--topology NAME: a TPU slice such as v5p:4x4x4; the local devices without it\n")
    config = config_module.from_command_line(rest, "plan")
    if topology is not None:
        jax.config.update("jax_platforms", "cpu")  # the slice is only compiled for
    found = plan(config, topology)
    print(describe(found))
    print(json.dumps(found))
