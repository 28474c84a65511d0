"""Plan of a run on devices that need not exist: memory, work and time.

Compiles the real train step and the sampler's real programs ahead of time, for a TPU slice (extra
`plan`) or nodes of NVIDIA GPUs (extra `plan-gpu`) on a machine without them, or for the local
devices without `--topology`; nothing is loaded or run. The table says whether the largest of them
fits and what bounds it, what is not counted, and which arrays stay whole because a mesh axis does
not divide them. The last line is the same as JSON.

Lengths are those of the worst batch: every prompt, teacher prompt and response at its limit
(`data.max_prompt_length`, `reprompt.max_length`, `sampling.max_response_length`). Where this fits,
every batch of the run does, and its time is the longest an update takes.

Where a step has several updates, operations, traffic and times of training are those of one.

No time is measured. A *bound* has every kernel at the chip's peak or its memory's bandwidth,
whichever is slower; collectives add to it where nothing runs beside them. The *likely* time has
products at 0.8 of the peak and kernels of attention at 0.55.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax

from pgpo_jax import config as config_module
from pgpo_jax import models
from pgpo_jax.command import Option, parse
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError
from pgpo_jax.plan import arrange, chips, measure, programs
from pgpo_jax.plan.chips import GIB


def plan(config: Config, topology: str | None = None) -> dict[str, Any]:
    """Everything that the command prints; see the module's docstring.

    Args:
      config: The run.
      topology: A TPU slice, nodes of GPUs, or None for the local devices.

    Raises:
      InputError: An unknown topology or chip, no compiler for it, or no architecture.
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
            "likely_step_seconds",
            "likely_mfu",
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
        "model_parameters": sum(x.size for x in jax.tree.leaves(models.param_shapes(architecture))),
        "lora_rank": config.model.lora.rank,
        "jax": jax.__version__,
    }
    try:
        setup = programs.make_setup(config, devices)
    except InputError as error:  # a mesh for other devices is one that does not fit
        out["reason"] = str(error)
    else:
        lengths = ("rows", "prompt", "teacher_prompt", "response")
        out |= {"batch": {name: getattr(setup, name) for name in lengths}}
        out |= {"update_rows": setup.update_rows, "updates_per_step": config.data.updates}
        out |= measure.measure(setup)
        if out["fits"]:
            out |= measure.overhead(setup, out)
    if not out["fits"]:
        out["suggestion"] = arrange.suggest(config, devices)
    return out


# ---- the table -----------------------------------------------------------------------------------

Rows = list[tuple[str, str]]


def describe(found: dict[str, Any]) -> str:
    """The plan as a table for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    rows: Rows = [
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
    if found.get("updates_per_step", 1) > 1:
        text = f"{found['updates_per_step']} a step, each of {found['update_rows']} rows"
        rows.append(("updates", text))
    rows.append(("memory per chip", _gib(found["hbm_bytes"])))
    rows += [(f"  {name}", _gib(value)) for name, value in found["per_chip"].items()]
    if (each := found.get("state_bytes_per_parameter")) is not None:
        rows.append(("  state", f"{each:.2f} bytes a parameter of the model, gradients included"))
    rows += [
        (
            f"  whole over {array['mesh_axis']}",
            f"{array['name']} ({_gib(array['bytes'])}): {array['axis']} {array['size']} does not "
            f"divide by {array['parts']}",
        )
        for array in found.get("stays_whole", [])
    ]
    rows += _parameter_rows(found) + _train_rows(found) + _decode_rows(found) + _verdict(found)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _parameter_rows(found: dict[str, Any]) -> Rows:
    """Bytes of the state for each parameter, with every optimizer that there is."""

    def text(sizes: dict[str, float]) -> str:
        return " + ".join(f"{name} {size:.3g}" for name, size in sizes.items())

    sizes = dict(found.get("bytes_per_parameter", {}))
    if not sizes:
        return []
    state = text(sizes.pop("state"))
    return [
        ("bytes a parameter", state),
        *((f"  {name}", f"{text(each)}: {sum(each.values()):.3g}") for name, each in sizes.items()),
    ]


def _train_rows(found: dict[str, Any]) -> Rows:
    """Work and time of an update, where it was compiled."""
    if found["flops_per_chip"] is None:
        return []
    by_kind = sorted(found["collective_bytes_by_kind"].items(), key=lambda item: -item[1])
    parts = found["estimated_seconds_by_part"].items()
    rows = [
        ("operations per chip", _number(found["flops_per_chip"], "FLOP")),
        ("  in kernels of attention", _number(found["attention_flops_per_chip"], "FLOP")),
        ("memory traffic per chip", _number(found["bytes_per_chip"], "bytes")),
        ("sent per chip", _number(found["collective_bytes_per_chip"], "bytes")),
        *((f"  {kind}", _number(value, "bytes")) for kind, value in by_kind),
        ("update, bound", _number(found["estimated_step_seconds"], "s")),
        *((f"  {name}", _number(value, "s")) for name, value in parts if name != "total"),
        ("  collectives exposed", _number(found["exposed_collective_seconds"], "s")),
        ("update, likely", _number(found["likely_step_seconds"], "s")),
        ("model FLOPs used, bound", _number(found["estimated_mfu"], "of peak")),
        ("model FLOPs used, likely", _number(found["likely_mfu"], "of peak")),
    ]
    if found["pgpo_flops_ratio"] is not None:
        rows.append(("operations, alpha over 0", f"x {found['pgpo_flops_ratio']:.9f}"))
    return rows


def _decode_rows(found: dict[str, Any]) -> Rows:
    """Memory of the sampler's programs and the time of a rollout, as far as they compiled."""
    if (decode := found.get("decode")) is None:
        return []
    totals = decode["programs"].items()
    rows = [
        ("sampling, with the run's state", _gib(decode["total"])),
        *((f"  {name}", "too large" if n is None else _gib(n)) for name, n in totals),
    ]
    if "weights" in decode:
        rows += [
            ("decoding: weights", _gib(decode["weights"])),
            ("  cache", f"{_gib(decode['cache'])}, {found['slots']} slots"),
            ("  a token for every slot, bound", _number(decode["seconds_per_token"], "s")),
            ("  all responses at their longest, bound", _number(decode["rollout_seconds"], "s")),
        ]
    return rows


def _verdict(found: dict[str, Any]) -> Rows:
    rows = [("fits", "yes" if found["fits"] else f"no: {found['reason']}")]
    if found["fits"] and found["device"].startswith("NVIDIA"):
        most = max(found["per_chip"]["total"], found["decode"]["total"])
        if most > chips.TAKEN_GPU * found["hbm_bytes"]:
            text = f"XLA_PYTHON_CLIENT_MEM_FRACTION={chips.USABLE_GPU}: JAX takes 75 % without it"
            rows.append(("needs", text))
    if "not_counted" in found:
        rows.append(("not counted", found["not_counted"]))
    if not found["fits"]:
        text = "none on these devices; take more of them"
        if suggestion := found["suggestion"]:
            text = " ".join(f"--{name} {value}" for name, value in suggestion["overrides"].items())
        rows.append(("fits instead", text))
    return rows


def _gib(value: int | None) -> str:
    if value is None:
        return "?"
    return f"{value / GIB:,.2f} GiB" if value >= GIB / 10 else f"{value / 2**20:,.2f} MiB"


def _number(value: float | None, unit: str) -> str:
    return "?" if value is None else f"{value:.4g} {unit}"


# ---- the command ---------------------------------------------------------------------------------


COMMAND = config_module.command(
    "plan",
    __doc__,
    Option(
        "--topology",
        "a TPU slice such as v5p:4x4x4, or nodes x GPUs such as h100:2x8 (a100, h100, h200, b200); "
        "the local devices without it",
        "SLICE",
    ),
)


def main(argv: Sequence[str]) -> None:
    """The command line; see `--help`."""
    arguments = parse(COMMAND, argv)
    config = config_module.from_arguments(arguments)
    topology = arguments.options.get("--topology")
    if topology is not None:
        jax.config.update("jax_platforms", "cpu")  # the slice is only compiled for
    found = plan(config, topology)
    print(describe(found))
    print(json.dumps(found))
