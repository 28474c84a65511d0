"""HTML page about one or several runs, side by side.

Runs that differ only in the seed are shown together, with a
band over seeds. The page is one file that asks for nothing from a network: curves, the resolved
configuration, what differs between the runs, and a table of samples with the teacher's prompts and
the divergence of every token as colour.
"""

import base64
import hashlib
import importlib.resources
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from pgpo_jax import fields, logs
from pgpo_jax.command import Argument, Command, Option, parse
from pgpo_jax.errors import InputError, printable
from pgpo_jax.logs import Experiment, RunLog, Series
from pgpo_jax.report import figures
from pgpo_jax.report.samples import Cut, cut, sample_table

DASH = "\N{EN DASH}"
"""Stands where a run has no value."""


class Cell(NamedTuple):
    """A value of a table, and what stands beside or below it in a softer colour."""

    value: str
    beside: str = ""


def report(folders: Sequence[str], samples: int = 1000) -> str:
    """The page as HTML text.

    Args:
      folders: Folders of runs.
      samples: Most samples on the page, spread evenly over runs and steps.

    Raises:
      InputError: What was given is no run, or matplotlib is missing.
    """
    runs = logs.read_runs(folders)
    experiments = logs.experiments(runs)
    table, about_samples = sample_table(runs, samples)
    script = _file("samples.js")
    # A browser's hash begins right after the tag, hence with the template's line end.
    digest = hashlib.sha256(f"\n{script}".encode()).digest()
    return _environment().from_string(_file("page.html")).render(
        title=f"Report on {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        facts=_facts(runs),
        runs=runs,
        experiments=experiments,
        numbers=list(_NUMBERS),
        summary=_summary(experiments),
        notes=any(run.notes for run in runs),
        reading=figures.reading(experiments),
        pictures=figures.sections(experiments),
        times=_times(experiments),
        differing=_differing(runs),
        about_samples=about_samples,
        data={"runs": [run.name for run in runs], "samples": table},
        style=_file("page.css"),
        script=script,
        script_hash=base64.b64encode(digest).decode(),
    )  # fmt: skip


def _file(name: str) -> str:
    folder = importlib.resources.files("pgpo_jax.report") / "templates"
    return (folder / name).read_text("utf-8")


def _environment() -> jinja2.Environment:
    """Every value is escaped, and what is no visible character is written out, as `\\x1b`."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # `tojson` also writes <, >, & and ' as \\u003c and so on: JSON that stays inside its <script>.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.globals |= {
        "anchor": lambda title: title.lower().replace(" ", "-"),
        "colour": figures.css_colour,
        "dash": DASH,
        "everything_else": figures.EVERYTHING_ELSE,
    }
    return environment


# ---- tables --------------------------------------------------------------------------------------


def _facts(runs: Sequence[RunLog]) -> list[str]:
    """What all runs have in common, in a few words."""
    counts = sorted({run.updates_a_step for run in runs})
    each = f"steps of {' or '.join(map(str, counts))} updates"
    what = "updates" if counts == [1] else each
    facts = [f"{max(run.steps for run in runs):,} {what}"]
    for name, form in (("task.name", "task {}"), ("model.path", "model {}")):
        values = {str(run.config.get(name)) for run in runs} - {"None"}
        facts += [form.format(*values)] if len(values) == 1 else []
    return facts


def _summary(experiments: Sequence[Experiment]) -> list[tuple[int, RunLog, list[Cell]]]:
    """A row for every run: its experiment's index, the run, its results."""
    return [
        (index, run, [form(run) for form in _NUMBERS.values()])
        for index, experiment in enumerate(experiments)
        for run in experiment.runs
    ]


def _accuracy(choose: Callable[[np.ndarray], int]) -> Callable[[RunLog], Cell]:
    """One evaluation's avg@k with its interval; `choose` finds it among the finite values."""

    def form(run: RunLog) -> Cell:
        if not (found := figures.find(run, figures.EVALUATION)):
            return Cell(DASH)
        name, series = found
        finite = np.flatnonzero(np.isfinite(series.values))
        place = int(finite[choose(series.values[finite])])
        value, step = float(series.values[place]), int(series.steps[place])
        bounds = [run.metrics.get(f"{name}/{side}") for side in ("low", "high")]
        share = f"{name.rpartition('/')[0]}/reward_min" not in run.metrics
        shown = _percent if share else "{:.3g}".format
        at = [shown(_at(bound, step)) for bound in bounds if bound]
        return Cell(shown(value), f"[{', '.join(at)}]" if len(at) == 2 else "")

    return form


def _over_steps(metric: str, *functions: Callable[[np.ndarray], Any]) -> Callable[[RunLog], Cell]:
    """Figures over all finite values of a metric, such as its mean."""

    def form(run: RunLog) -> Cell:
        if not (found := figures.find(run, metric)):
            return Cell(DASH)
        values = found[1].values[np.isfinite(found[1].values)]
        return Cell(" / ".join(f"{function(values):.3g}" for function in functions))

    return form


_NUMBERS = {
    "first avg@k": _accuracy(lambda values: 0),
    "best": _accuracy(lambda values: int(np.argmax(values))),
    "last": _accuracy(lambda values: -1),
    "mean information": _over_steps("information", np.mean),
    "multiplier: least / mean / most": _over_steps("multiplier", np.min, np.mean, np.max),
}


class Times(NamedTuple):
    """Seconds of every phase, over all of a run's steps."""

    phases: list[str]
    rows: list[tuple[int, str, list[Cell], str]]
    """The experiment's index, the run's name, its phases, their sum."""


def _times(experiments: Sequence[Experiment]) -> Times:
    every = [(index, run) for index, each in enumerate(experiments) for run in each.runs]
    names = sorted({name for _, run in every for name in run.metrics if name.startswith("time/")})
    rows = []
    for index, run in every:
        sums = [float(np.nansum(run.metrics[n].values)) if n in run.metrics else 0 for n in names]
        total = sum(sums)
        cells = [
            Cell(_seconds(value), _percent(value / total if total else math.nan)) for value in sums
        ]
        rows.append((index, run.name, cells, _seconds(total)))
    return Times([name.removeprefix("time/") for name in names], rows)


def _differing(runs: Sequence[RunLog]) -> dict[str, list[Cut]]:
    """Field -> its value in every run, where they differ."""
    return {
        name: [cut(fields.one_line(value), 300) for value in values]
        for name, values in logs.config_differences(runs).items()
    }


def _at(series: Series, step: int) -> float:
    found = series.values[series.steps == step]
    return float(found[0]) if len(found) else math.nan


def _percent(share: float) -> str:
    return DASH if math.isnan(share) else f"{100 * share:.1f} %"


def _seconds(value: float) -> str:
    if value < 600:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 36000 else f"{value / 3600:,.1f} h"


# ---- the command ---------------------------------------------------------------------------------


COMMAND = Command(
    "report",
    __doc__,
    (Argument("RUN", "a run's folder (its output_dir)", several=True),),
    (
        Option("--output", "the page to write (default: report.html)", "FILE", short="-o"),
        Option("--samples", "most samples on the page, over all runs (default: 1000)", "COUNT"),
    ),
    example="runs/quickstart",
)


def main(argv: Sequence[str]) -> int:
    """The command line; see `--help`."""
    arguments = parse(COMMAND, argv)
    text = arguments.options.get("--samples", "1000")
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InputError(f"--samples: got {text}; must be a whole number, at least 0")
    path = Path(arguments.options.get("--output", "report.html"))
    page = report(arguments.words, int(text))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: {path} cannot be written ({error.strerror})") from error
    print(f"wrote {printable(str(path))} ({len(page) / 2**20:.1f} MiB)")
    return 0
