"""What the benchmarks share: paired timing, compiled costs, the table and the final JSON line."""

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def environment() -> dict[str, Any]:
    """Versions and device, part of every result."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }


class Seconds(NamedTuple):
    """Seconds of every call, by name."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    """Of the whole process, over all its threads: steadier where others use the machine too."""


def paired(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Wall-clock seconds of every call, as `paired_cpu` takes them."""
    return paired_cpu(functions, repeats, warm_up).wall


def paired_cpu(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1, settle: int = 0
) -> Seconds:
    """Times every call, the functions taking turns: noise of the machine hits all alike.

    `settle` more calls, untimed, begin every turn: the memory that a function freed may have gone
    back to the system, or a virtual machine's host, while others had theirs.
    """
    seconds = Seconds(*({name: [] for name in functions} for _ in range(2)))
    for index in range(warm_up + repeats):
        for name, function in functions.items():
            for _ in range(settle):
                jax.block_until_ready(function())
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            if index >= warm_up:
                seconds.wall[name].append(time.perf_counter() - start)
                seconds.cpu[name].append(time.process_time() - start_cpu)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """Median of the ratios of paired calls."""
    pairs = zip(seconds[over], seconds[under], strict=True)
    return statistics.median(a / b for a, b in pairs)


def cost(compiled: jax.stages.Compiled) -> dict[str, float]:
    """FLOPs and bytes as XLA counts them (the body of a loop once), and temporary bytes."""
    analysis = compiled.cost_analysis()
    assert analysis is not None
    return {
        "flops": analysis["flops"],
        "bytes": analysis["bytes accessed"],
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys, aligned."""
    cells = [list(rows[0]), *([_show(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def finish(name: str, result: Mapping[str, Any], save: bool) -> None:
    """Prints the result with the environment as the last line; `save` keeps it under results/."""
    line = {"benchmark": name, **result, **environment()}
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
