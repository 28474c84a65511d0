"""Learning curves as SVG to stand in an HTML page: a table of panels, and how one is drawn.

No text of a user's or a model's goes into an SVG: labels and legends are the page's. Colours are
the page's too (its variables), so that a picture follows its light or dark mode.
"""

import colorsys
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pgpo_jax.errors import InputError
from pgpo_jax.logs import Experiment, RunLog, Series, read_discovery

# Stand-ins, replaced by the page's variables of the same position.
PALETTE = (
    "#2f6fb0", "#d9822b", "#2e8b57", "#b8405e", "#7a5fb5", "#8c6d31", "#1f9aa6", "#6b7280",
)  # fmt: skip
_INK, _LINE = "#123456", "#abcdef"
STYLES = ("solid", "dashed", "dotted")


class Panel(NamedTuple):
    """One picture: what is drawn over the steps, and how."""

    title: str
    metrics: dict[str, str]
    """Metric (a pattern if it holds `\\d`) -> what to call it; one line style each."""
    note: str = ""
    form: str = "number"
    """`number`, `share` (0 to 100 %) or `log`."""
    mark: float | None = None
    """A value that gets a thin line."""


class Picture(NamedTuple):
    """A drawn panel."""

    title: str
    note: str
    legend: list[tuple[str, str]]
    """(line style, name) of what is drawn, where there is more than one."""
    svg: str


EVALUATION = r"eval/avg@\d+"
ANOTHER_SET = re.compile(r"eval/([\w-]+)/avg@\d+")
SECTIONS: dict[str, list[Panel]] = {
    "Learning": [
        Panel("Held-out accuracy", {EVALUATION: "avg@k"}, form="share"),
        Panel("Reward in training", {"reward/mean": "reward"}, "Mean over a step's responses."),
        Panel(
            "Any or most of the answers right",
            {r"eval/pass@\d+": "pass@k", r"eval/maj@\d+": "maj@k"},
            "Held-out questions with a right answer among k; whose most frequent answer is right.",
            "share",
        ),
    ],
    "Information and multiplier": [
        Panel("Information", {"information": "information"}, "Nats per response token.", mark=0.0),
        Panel(
            "Information by context",
            {
                "information/demonstration": "demonstration",
                "information/feedback": "feedback",
                "information/both": "both",
            },
            "Nats per response token, of the responses whose teacher was shown that.",
            mark=0.0,
        ),
        Panel("Multiplier", {"multiplier": "multiplier"}, "Factor of every update.", mark=1.0),
    ],
    "Student and teacher": [
        Panel(
            "Entropy",
            {"entropy/student": "student", "entropy/teacher": "teacher"},
            "Nats per response token.",
        ),
        Panel("Divergence", {"divergence": "divergence"}, "Nats per response token."),
        Panel("Loss", {"loss": "loss"}),
        Panel("Distance of the weights", {"teacher_student_distance": "distance"}, "L2 norm."),
    ],
    "Responses": [
        Panel(
            "Length",
            {"response_length/mean": "mean", "response_length/max": "longest"},
            "Tokens.",
        ),
        Panel(
            "Success and context",
            {"success_group_fraction": "questions solved", "context_fraction": "with a context"},
            "Questions with a successful response; responses whose teacher saw more than they did.",
            "share",
        ),
        Panel(
            "Kinds of context",
            {
                "context/demonstration": "demonstration",
                "context/feedback": "feedback",
                "context/both": "both",
            },
            "Responses whose teacher was shown that.",
            "share",
        ),
        Panel(
            "Form",
            {"format": "well-formed", "response_length/clip_fraction": "cut off"},
            "Responses that the verifier can read; that hit the length limit.",
            "share",
        ),
    ],
    "Optimizer": [
        Panel("Norms", {"grad_norm": "gradient", "update_norm": "update"}, form="log"),
        Panel("Learning rate", {"lr": "rate"}, "Before the multiplier."),
    ],
    "Time": [
        Panel(
            "Seconds a step",
            {"time/rollout": "rollout", "time/train": "update", "time/reprompt": "reprompt"},
            form="log",
        ),
        Panel(
            "Tokens a second",
            {"tokens_per_second/rollout": "rollout", "tokens_per_second/train": "update"},
            form="log",
        ),
    ],
}
DISCOVERY = "Discovery"
EVERYTHING_ELSE = "Everything else"
AGAINST = "Multiplier against information"
BESIDE_THE_VALUE = re.compile(
    r".*/(low|high)$|eval/(.+/)?(questions|reward_min|reward_max)$|.+/left_out$|context/none$"
)


def sections(experiments: Sequence[Experiment]) -> dict[str, list[Picture]]:
    """All pictures by section; a panel that no run has values for is left out.

    Raises:
      InputError: matplotlib is missing.
    """
    matplotlib = _matplotlib()
    rest = {name for each in experiments for run in each.runs for name in run.metrics}
    planned = {title: [_with_sets(p, rest) for p in panels] for title, panels in SECTIONS.items()}
    with matplotlib.rc_context(_RC):
        drawn = {
            title: [picture for panel in panels if (picture := _curves(experiments, panel))]
            for title, panels in planned.items()
        }
        drawn["Information and multiplier"] += _against(experiments)
        drawn = {DISCOVERY: _discovery(experiments)} | drawn
        known = [name for panels in planned.values() for panel in panels for name in panel.metrics]
        drawn[EVERYTHING_ELSE] = [
            picture
            for name in sorted(rest)
            if not any(re.fullmatch(pattern, name) for pattern in known)
            and not BESIDE_THE_VALUE.match(name)
            and (picture := _curves(experiments, Panel(name, {re.escape(name): name})))
        ]
    return {title: pictures for title, pictures in drawn.items() if pictures}


def _with_sets(panel: Panel, metrics: Iterable[str]) -> Panel:
    """The panel of the accuracy with that of every further set (`evaluation.also`) beside it."""
    if EVALUATION not in panel.metrics:
        return panel
    labels = {found[1] for name in metrics if (found := ANOTHER_SET.fullmatch(name))}
    if any(re.fullmatch("eval/(.+/)?reward_min", name) for name in metrics):
        panel = panel._replace(title="Held-out reward", form="number")  # means, and no shares
    others = {rf"eval/{re.escape(label)}/avg@\d+": label for label in sorted(labels)}
    return panel._replace(metrics=panel.metrics | others)


def reading(experiments: Sequence[Experiment]) -> str:
    """How the curves are to be read, in a sentence or two."""
    said = []
    if any(len(experiment.runs) > 1 for experiment in experiments):
        said.append("Runs that differ only in the seed: the mean, each seed thin, and a band from ")
        said[-1] += "the lowest to the highest seed."
    if any(len(experiment.runs) == 1 for experiment in experiments):
        said.append("A single run's accuracy has the evaluation's 95 % interval as its band.")
    runs = [run for experiment in experiments for run in experiment.runs]
    window = max(_window(series) for run in runs for series in run.metrics.values())
    if window > 1:
        said.append(
            f"Curves with many values are smoothed over a twentieth of them (at most {window})."
        )
    return " ".join(said)


def find(run: RunLog, pattern: str) -> tuple[str, Series] | None:
    """The first metric of a run that a pattern names and that has a value, with its name."""
    for name, series in run.metrics.items():
        if re.fullmatch(pattern, name) and np.isfinite(series.values).any():
            return name, series
    return None


def css_colour(index: int) -> str:
    """The CSS colour of the experiment `index`."""
    return f"var(--c{index})" if index < len(PALETTE) else _stand_in(index)


# ---- drawing -------------------------------------------------------------------------------------


def _curves(experiments: Sequence[Experiment], panel: Panel) -> Picture | None:
    """Every metric of every experiment over the steps."""
    fits = {
        (row, metric): [
            found
            for run in experiment.runs
            if (found := find(run, metric)) and _fits(found[1], panel)
        ]
        for row, experiment in enumerate(experiments)
        for metric in panel.metrics
    }
    present = [m for m in panel.metrics if any(fits[row, m] for row in range(len(experiments)))]
    if not present:
        return None
    from matplotlib.ticker import MaxNLocator, NullFormatter

    figure, axes = _axes()
    if panel.mark is not None:
        axes.axhline(panel.mark, color=_LINE, linewidth=1, zorder=1)
    for row in range(len(experiments)):
        for metric in present:
            style = _style(panel, metric)
            found = fits[row, metric]
            if len(found) == 1:
                _one(axes, found[0], experiments[row], _stand_in(row), style)
            elif found:
                _several(axes, [series for _, series in found], _stand_in(row), style)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.form == "share":
        most = min(max(axes.get_ylim()[1], 0.1), 1.03)
        axes.set_ylim(-0.03 * most, most)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    if panel.form == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    legend = [(_style(panel, metric), panel.metrics[metric]) for metric in present]
    return Picture(panel.title, panel.note, legend if len(legend) > 1 else [], _svg(figure))


def _style(panel: Panel, metric: str) -> str:
    return STYLES[list(panel.metrics).index(metric) % len(STYLES)]


def _fits(series: Series, panel: Panel) -> bool:
    """A logarithm needs something above 0."""
    return panel.form != "log" or bool((series.values > 0).any())


def _one(
    axes: Any, found: tuple[str, Series], experiment: Experiment, colour: str, style: str
) -> None:
    """A single run: its values, smoothed where there are many; its interval where it has one."""
    name, series = found
    (run,) = [run for run in experiment.runs if run.metrics.get(name) is series]
    low, high = run.metrics.get(f"{name}/low"), run.metrics.get(f"{name}/high")
    if low and high and np.array_equal(low.steps, high.steps):
        axes.fill_between(low.steps, low.values, high.values, color=colour, alpha=0.18, linewidth=0)
    window = _window(series)
    if window > 1:
        axes.plot(*series, color=colour, alpha=0.3, linewidth=0.8, linestyle=style)
    axes.plot(*_smooth(series, window), color=colour, linestyle=style, **_marker(series))


def _several(axes: Any, all_series: list[Series], colour: str, style: str) -> None:
    """Several seeds: each thin, their mean thick, a band from the lowest to the highest."""
    window = max(_window(series) for series in all_series)
    smooth = [_smooth(series, window) for series in all_series]
    for series in smooth:
        axes.plot(*series, color=colour, alpha=0.35, linewidth=0.7, linestyle=style)
    steps, mean, low, high = _over_runs(smooth)
    if len(steps):
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, mean, color=colour, linestyle=style, **_marker(Series(steps, mean)))


def _over_runs(all_series: Sequence[Series]) -> tuple[np.ndarray, ...]:
    """Steps at which two runs or more have a value; mean, lowest and highest there."""
    steps = np.unique(np.concatenate([series.steps for series in all_series]))
    table = np.full((len(all_series), len(steps)), np.nan)
    for row, series in zip(table, all_series, strict=True):
        row[np.searchsorted(steps, series.steps)] = series.values
    enough = np.isfinite(table).sum(0) >= 2
    table = table[:, enough]
    return steps[enough], np.nanmean(table, 0), np.nanmin(table, 0), np.nanmax(table, 0)


def _against(experiments: Sequence[Experiment]) -> list[Picture]:
    """Multiplier against information: a point a step, later ones stronger; the rule as a line."""
    points = [
        (row, run, *_paired(run))
        for row, experiment in enumerate(experiments)
        for run in experiment.runs
    ]
    points = [point for point in points if len(point[2])]
    if not points:
        return []
    figure, axes = _axes()
    lowest = min(x.min() for _, _, x, _ in points)
    highest = max(x.max() for _, _, x, _ in points)
    line = np.linspace(lowest, highest, 200) if highest > lowest else np.array([lowest])
    for row, run, x, y in points:
        if rule := _rule(run):
            axes.plot(line, rule(line), color=_stand_in(row), linewidth=0.8, alpha=0.6)
        keep = np.unique(np.linspace(0, len(x) - 1, 400).round().astype(int))
        opacity = np.linspace(0.15, 0.85, len(x))[keep]
        axes.scatter(x[keep], y[keep], s=9, color=_stand_in(row), alpha=opacity, linewidths=0)
    axes.set_xlabel("information, nats per token")
    note = "A point a step, the later the stronger."
    if any(run.updates_a_step > 1 for _, run, _, _ in points):
        note += " Means over a step's updates, where it has several."
    if any(_rule(run) for _, run, _, _ in points):
        note += " Line: exp(alpha x information) within its bounds."
    return [Picture(AGAINST, note, [], _svg(figure))]


def _discovery(experiments: Sequence[Experiment]) -> list[Picture]:
    """Questions solved within k attempts, a line style for every method."""
    curves = [
        (row, *named)
        for row, experiment in enumerate(experiments)
        for run in experiment.runs
        for named in read_discovery(run).items()
    ]
    if not curves:
        return []
    methods = list(dict.fromkeys(method for _, method, _ in curves))
    styles = {method: STYLES[i % len(STYLES)] for i, method in enumerate(methods)}
    figure, axes = _axes()
    for row, method, (attempts, share, low, high) in curves:
        colour, style = _stand_in(row), styles[method]
        axes.fill_between(attempts, low, high, color=colour, alpha=0.1, linewidth=0)
        axes.plot(attempts, share, color=colour, linestyle=style, marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("attempts")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    note = "Hard questions solved within so many attempts, with 95 % intervals over questions."
    return [Picture("discovery@k", note, [(styles[m], m) for m in methods], _svg(figure))]


def _paired(run: RunLog) -> tuple[np.ndarray, np.ndarray]:
    """Information and multiplier of the updates that were done: a skipped one leaves the former."""
    nothing = Series(np.zeros(0, int), np.zeros(0))
    first, second, skipped = (
        run.metrics.get(name, nothing) for name in ("information", "multiplier", "skipped")
    )
    steps, i, j = np.intersect1d(first.steps, second.steps, return_indices=True)
    x, y = first.values[i], second.values[j]
    done = ~np.isin(steps, skipped.steps[skipped.values == 1])
    keep = np.isfinite(x) & np.isfinite(y) & done
    return x[keep], y[keep]


def _rule(run: RunLog) -> Callable[[np.ndarray], np.ndarray] | None:
    """Eq. 9 of PGPO with the run's constants, where it has them as numbers."""
    names = ("optimizer.alpha", "optimizer.rho_min", "optimizer.rho_max")
    alpha, low, high = (run.config.get(name) for name in names)
    if not all(isinstance(value, int | float) for value in (alpha, low, high)):
        return None
    return lambda x: np.clip(np.exp(np.clip(alpha * x, -700, 700)), low, high)


def _window(series: Series) -> int:
    """Steps to smooth over: a twentieth of them, odd; few values stay as they are."""
    return len(series.steps) // 20 // 2 * 2 + 1


def _smooth(series: Series, window: int) -> Series:
    """Centred mean over `window` values, fewer at the ends; null stays out of it."""
    if window == 1:
        return series
    finite = np.isfinite(series.values)
    ones = np.ones(min(window, len(finite)))
    total = np.convolve(np.where(finite, series.values, 0), ones, "same")
    count = np.convolve(finite.astype(float), ones, "same").round()
    return Series(series.steps, np.where(count > 0, total, np.nan) / np.where(count > 0, count, 1))


def _marker(series: Series) -> dict[str, Any]:
    """A few values are shown as points too: one alone makes no line."""
    return {"marker": "o", "markersize": 3} if np.isfinite(series.values).sum() <= 15 else {}


# ---- matplotlib and SVG --------------------------------------------------------------------------

_RC = {
    "axes.edgecolor": _LINE,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.figsize": (4.6, 2.6),
    "font.size": 9,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "pgpo_jax",  # the same runs give the same page
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.color": _LINE,
    "ytick.labelcolor": _INK,
    "ytick.left": False,
}


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "report: matplotlib is not installed; pip install 'pgpo_jax[report]'"
        ) from error
    return matplotlib


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as an element of an HTML page: no header, no fixed size, the page's colours."""
    out = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"font-family: [^;\"]+; ", "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", svg, count=5)
    # An id that is referred to is a hash of what it names; the others would repeat on the page.
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>f{zlib.crc32(svg.encode()):x}-", svg)
    colours = {_INK: "currentColor", _LINE: "var(--line)"}
    colours |= {colour: css_colour(index) for index, colour in enumerate(PALETTE)}
    for colour, name in colours.items():
        svg = svg.replace(colour, name)
    return svg.replace("<svg", '<svg role="img"', 1)


def _stand_in(index: int) -> str:
    """The colour of experiment `index` in matplotlib."""
    if index < len(PALETTE):
        return PALETTE[index]
    # The golden angle keeps neighbours apart.
    red, green, blue = colorsys.hls_to_rgb(index * 137.5 % 360 / 360, 0.5, 0.45)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
