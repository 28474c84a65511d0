"""Writes the tables of README.md from the results beside it, one row per JSON file.

python benchmarks/tables.py            # rewrites what stands between the markers
python benchmarks/tables.py --check    # fails if that would change anything
"""

import argparse
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
Result = dict[str, Any]


class Target(NamedTuple):
    """A bound: `at least` or `at most`."""

    relation: str
    bound: float
    unit: str = ""

    def met(self, value: float) -> bool:
        return value >= self.bound if self.relation == "at least" else value <= self.bound


class Column(NamedTuple):
    """A number of a result, how to write it, and what it should be (None: nothing)."""

    title: str
    get: Callable[[Result], Any]
    form: Callable[[Any], str] = str
    target: Callable[[Result], Target | None] = lambda _: None


def plain(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def gib(value: float) -> str:
    return f"{plain(value / 2**30)} GiB"


def seconds(value: float) -> str:
    return f"{plain(value)} s"


def planned_model(result: Result) -> str:
    """Parameters of a plan's model, and the rank of its adapters."""
    rank = result.get("lora_rank")
    return f"{result['model_parameters'] / 1e9:.2g}B" + (f", LoRA {rank}" if rank else "")


def always(relation: str, bound: float, unit: str = "") -> Callable[[Result], Target]:
    return lambda _: Target(relation, bound, unit)


def on(platform: str, *target: Any, preset: str | None = None) -> Callable[[Result], Target | None]:
    """A target on one platform, for one preset or all."""

    def choose(result: Result) -> Target | None:
        fits = result.get("platform") == platform and preset in (None, result.get("preset"))
        return Target(*target) if fits else None

    return choose


def either(*choices: Callable[[Result], Target | None]) -> Callable[[Result], Target | None]:
    return lambda result: next((t for choose in choices if (t := choose(result))), None)


def key(name: str, *more: str) -> Callable[[Result], Any]:
    """The value of a key of the result, or of what lies under it."""

    def get(result: Result) -> Any:
        value: Any = result
        for part in (name, *more):
            value = None if value is None else value.get(part)
        return value

    return get


def recorded(part: str) -> Callable[[Result], Target | None]:
    """Not slower than a step recorded elsewhere, where one was recorded; it had two threads."""

    def choose(result: Result) -> Target | None:
        values = result.get("recorded_easydel")
        same = values and result.get("threads") == 2
        return Target("at most", values[part], " s") if same else None

    return choose


def quiet(choose: Callable[[Result], Target | None]) -> Callable[[Result], Target | None]:
    """No verdict on wall-clock times of a CPU that had much else to do."""
    return lambda result: (
        choose(result)
        if result.get("platform") != "cpu" or result.get("load_average", 0) < 3
        else None
    )


def one_thread(result: Result) -> Target | None:
    """The target over PyTorch in CPU time, which says the same as wall time on one thread."""
    if result.get("preset") == "cpu_135m" and result.get("threads") == 1:
        return Target("at least", 1.5)
    return None


def faster_than_tunix(result: Result) -> Target | None:
    """The tokens per second recorded elsewhere, where some were."""
    values = result.get("tunix_recorded")
    return Target("at least", values["tokens_per_second"]) if values else None


def device(result: Result) -> str:
    if result.get("platform") == "cpu":
        return f"CPU, {result.get('threads') or result.get('cpu_cores')} threads"
    return str(result.get("device"))


def versions(result: Result) -> str:
    known = {**result, **(result.get("peers") or {})}
    names = ("jax", "flax", "torch", "transformers")
    return ", ".join(f"{name} {known[name]}" for name in names if known.get(name))


def preset(result: Result) -> str:
    """The preset; a sampler's result has it in its name only."""
    name = str(result["benchmark"])
    benchmark = next((b for b in BENCHMARKS if name.startswith(b)), "")
    in_name = name.removeprefix(f"{benchmark}_").removesuffix(f"_{result.get('platform')}")
    return str(result.get("preset") or in_name)


PLACE = (Column("device", device), Column("versions", versions))


def options(result: Result) -> str:
    """What to give the benchmark to repeat the row."""
    one = " --threads 1" if result.get("threads") == 1 else ""
    lora = f" --lora-rank {rank}" if (rank := result.get("lora_rank")) else ""
    return f"`--preset {preset(result)}{lora}{one}`"


CASE = Column("case", options)

BENCHMARKS: dict[str, tuple[Column, ...]] = {
    "fused_pass": (
        CASE,
        Column("memory, of straightforward", key("temp_bytes_ratio"), percent,
               always("at most", 0.10)),
        Column("time, of straightforward", key("time_ratio"), plain, always("at most", 1.0)),
        Column("CPU time, of straightforward", key("cpu_time_ratio"), plain),
        Column("recompute over fused, CPU time", key("recompute_over_fused_cpu_time"), plain),
        Column("information, of the update's FLOPs", key("information_flops_fraction"), percent,
               always("at most", 0.01)),
        Column("of its bytes", key("information_bytes_fraction"), percent,
               always("at most", 0.02)),
        Column("gradient error", key("max_gradient_error"), plain, always("at most", 1e-5)),
        *PLACE,
    ),
    "train_step": (
        CASE,
        Column("s per step", key("seconds_per_step"), plain, quiet(recorded("seconds"))),
        Column("CPU-s per step", key("cpu_seconds_per_step"), plain, recorded("cpu_seconds")),
        Column("tokens/s", key("tokens_per_second"), plain),
        Column("MFU", key("mfu"), percent,
               on("gpu", "at least", 0.45, preset="qwen3_1.7b")),
        Column("speedup over torch", key("speedup_over_torch"), plain,
               quiet(either(on("cpu", "at least", 1.5, preset="cpu_135m"),
                            on("gpu", "at least", 1.3)))),
        Column("in CPU time", key("cpu_speedup_over_torch"), plain, one_thread),
        Column("compile s", key("compile_seconds"), plain),
        Column("peak memory", key("peak_bytes"), gib),
        Column("load", key("load_average"), plain),
        *PLACE,
    ),
    "train_step_parts": (
        CASE,
        *(Column(name, key("parts", part, "cpu_seconds"), plain)
          for name, part in (
              ("student", "student forward and backward"),
              ("teacher", "teacher forward"),
              ("vocabulary pass", "vocabulary pass"),
              ("optimizer, average", "optimizer and teacher's average"),
              ("multiplier alone", "the multiplier alone"))),
        Column("whole update", key("cpu_seconds_per_step"), plain),
        Column("device", device),
    ),
    "sampler": (
        CASE,
        Column("tokens/s", key("tokens_per_second"), plain, quiet(faster_than_tunix)),
        Column("speedup over `generate`", key("speedup_over_transformers"), plain,
               on("cpu", "at least", 2.0)),
        Column("of the memory bound", key("bound_fraction"), percent, on("gpu", "at least", 0.60)),
        Column("in CPU time", key("cpu_time_ratio"), plain),
        Column("compilations", key("compilations"), plain),
        *PLACE,
    ),
    "packing": (
        CASE,
        *(Column(f"{title}{end}", key(lengths, name), form)
          for lengths, end in (("skewed", ""), ("equal", ", equal lengths"))
          for title, name, form in (
              ("time, of padded", "time_ratio", plain),
              ("CPU time", "cpu_time_ratio", plain),
              ("temporary memory", "temp_bytes_ratio", plain),
              ("padding, padded", "padding_fraction_padded", percent),
              ("packed", "padding_fraction_packed", percent))),
        Column("columns of the published sizes", key("columns_ratio"), percent),
        Column("shapes", lambda r: f"{r['shapes_packed']} in {r['batches']} steps"),
        Column("padded", key("shapes_padded")),
        Column("load", key("load_average"), plain),
        *PLACE,
    ),
    "step_overhead": (
        CASE,
        Column("FLOPs, of plain AdamW", key("flops_ratio"), lambda v: f"{v:.6f}",
               always("at most", 1.005)),
        Column("bytes", key("bytes_ratio"), lambda v: f"{v:.6f}"),
        Column("time", key("time_ratio"), plain),
        Column("s per step", key("seconds_per_step"), plain),
        *PLACE,
    ),
    "plan": (
        Column("model", planned_model),
        Column("topology", key("topology"), lambda v: f"`{v}`"),
        Column("chips", key("chips")),
        Column("mesh", key("mesh"), lambda v: ", ".join(f"{k} {n}" for k, n in v.items())),
        Column("fits", key("fits"), lambda v: "yes" if v else "no"),
        Column("memory per chip", key("per_chip", "total"), gib),
        Column("temporaries", key("per_chip", "temporaries"), gib),
        Column("of", key("hbm_bytes"), gib),
        Column("TFLOP per chip", key("flops_per_chip"), lambda v: plain(v / 1e12)),
        Column("sent per chip", key("collective_bytes_per_chip"), gib),
        Column("update, bound", key("estimated_step_seconds"), seconds),
        Column("update, likely", key("likely_step_seconds"), seconds),
        Column("exposed collectives", key("exposed_collective_seconds"), seconds),
        Column("MFU, bound", key("estimated_mfu"), percent),
        Column("MFU, likely", key("likely_mfu"), percent),
        Column("PGPO's FLOPs over SDPO's", key("pgpo_flops_ratio"), lambda v: f"{v:.6f}",
               always("at most", 1.005)),
    ),
}  # fmt: skip


def results(benchmark_name: str, folder: pathlib.Path) -> Iterator[Result]:
    """The saved results of a benchmark, CPUs first; a file holds an object or several."""
    benchmark = benchmark_name.removesuffix("_parts")
    found = []
    for path in sorted(folder.glob(f"{benchmark}*.json")):
        value = json.loads(path.read_text())
        found += value if isinstance(value, list) else [value]
    if benchmark_name.endswith("_parts"):
        found = [result for result in found if result.get("parts")]
    if benchmark == "plan":
        return iter(sorted(found, key=lambda r: (str(r["topology"]).split(":")[0], r["chips"])))
    return iter(sorted(found, key=lambda result: result.get("platform") != "cpu"))


def cell(column: Column, result: Result) -> str:
    """The number, and whether it met its target; `-` where there is none."""
    value = column.get(result)
    if value is None:
        return "-"
    target = column.target(result)
    if target is None:
        return column.form(value)
    sign = "≥" if target.relation == "at least" else "≤"
    verdict = "met" if target.met(value) else "**missed**"
    return f"{column.form(value)} ({sign} {column.form(target.bound)}{target.unit}: {verdict})"


def table(benchmark: str, folder: pathlib.Path) -> str:
    """A Markdown table, or a line that says that there are no results."""
    columns, rows = BENCHMARKS[benchmark], list(results(benchmark, folder))
    if not rows:
        return "No results yet."
    cells = [[cell(column, row) for column in columns] for row in rows]
    shown = [i for i in range(len(columns)) if any(row[i] != "-" for row in cells)]
    lines = [[columns[i].title for i in shown], ["---"] * len(shown)]
    lines += [[row[i] for i in shown] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(text: str, folder: pathlib.Path) -> str:
    """The text with every `<!-- table: NAME -->` ... `<!-- end -->` filled anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table(match[2], folder)}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", replace, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--readme", type=pathlib.Path, default=HERE / "README.md")
    args = parser.parse_args(argv)
    text = args.readme.read_text()
    filled = fill(text, args.results)
    if filled == text:
        return
    if args.check:
        raise SystemExit(f"{args.readme}: run python benchmarks/tables.py")
    args.readme.write_text(filled)


if __name__ == "__main__":
    main()
