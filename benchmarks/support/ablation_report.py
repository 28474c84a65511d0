"""An ablation in numbers, as a Markdown table and as a figure."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from support import curves
from support.curves import Curve

Runs = Mapping[tuple[str, int], Curve]
"""Curves by arm and seed, arms in order."""

MEASURES = {
    "last": lambda curve: float(curve.accuracy[-1]),
    "best": lambda curve: float(curve.accuracy.max()),
    "mean": lambda curve: float(curve.accuracy.mean()),
}


def summarise(runs: Runs, baseline: str, pairs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The result as JSON.

    Args:
      runs: Those that are complete.
      baseline: The arm that all others are compared with.
      pairs: Further comparisons: an arm with each of several others.
    """
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    versus = [(arm, baseline) for arm in arms if arm != baseline]
    versus += [(arm, other) for arm in pairs for other in pairs[arm] if {arm, other} <= {*arms}]
    return {
        "runs": [_run(arm, seed, curve) for (arm, seed), curve in runs.items()],
        "comparisons": [_compare(runs, arm, other, "last") for arm, other in versus],
        "comparisons_best": [_compare(runs, arm, other, "best") for arm, other in versus],
        "comparisons_mean": [_compare(runs, arm, other, "mean") for arm, other in versus],
        "methods": [_method(arm, _of(runs, arm)) for arm in arms],
        "alarms": _alarms(runs),
    }


def _of(runs: Runs, arm: str) -> dict[int, Curve]:
    return {seed: curve for (name, seed), curve in runs.items() if name == arm}


def _run(arm: str, seed: int, curve: Curve) -> dict[str, Any]:
    values: dict[str, Any] = {"method": arm, "seed": seed}
    for name, index in (("first", 0), ("best", curve.best), ("last", -1)):
        low, high = curves.clustered_interval(curve.rewards[index])
        values |= {name: float(curve.accuracy[index]), f"{name}_low": low, f"{name}_high": high}
    return values | {
        "best_step": int(curve.steps[curve.best]),
        "mean": float(curve.accuracy.mean()),
        "steps": curve.steps.tolist(),
        "accuracy": curve.accuracy.tolist(),
        **_spreads([curve]),
        "updates": len(curve.updates),
        "collapsed": curves.collapsed(curve.accuracy),
        "fall": curves.fall(curve.steps, curve.accuracy),
        "alarms": {name: alarm(curve) for name, alarm in curves.ALARMS.items()},
    }


def _compare(runs: Runs, arm: str, other: str, measure: str) -> dict[str, Any]:
    """`low` and `high` are of the seeds; `_questions` of the questions, given these seeds."""
    ours, theirs = _of(runs, arm), _of(runs, other)
    value = MEASURES[measure]
    difference = curves.paired_difference(
        {seed: value(curve) for seed, curve in ours.items()},
        {seed: value(curve) for seed, curve in theirs.items()},
    )
    rewards = [
        _rewards(ours[seed], measure) - _rewards(theirs[seed], measure)
        for seed in sorted(ours.keys() & theirs.keys())
    ]
    low, high = curves.clustered_interval(np.array(rewards))
    return {
        "method": arm,
        "against": other,
        **difference._asdict(),
        "low_questions": low,
        "high_questions": high,
    }


def _rewards(curve: Curve, measure: str) -> np.ndarray:
    index = {"last": -1, "best": curve.best}.get(measure)
    return curve.rewards.mean(axis=0) if index is None else curve.rewards[index]


def _method(arm: str, of_seed: Mapping[int, Curve]) -> dict[str, Any]:
    """An arm over its seeds; intervals are of the questions, given these seeds and best steps."""
    found = list(of_seed.values())
    values: dict[str, Any] = {"method": arm, "seeds": len(found)}
    for name, index in (("first", lambda _: 0), ("best", lambda c: c.best), ("last", lambda _: -1)):
        rewards = np.array([curve.rewards[index(curve)] for curve in found])
        low, high = curves.clustered_interval(rewards)
        values |= {name: float(rewards.mean()), f"{name}_low": low, f"{name}_high": high}
    return values | {
        "mean": float(np.mean([curve.accuracy.mean() for curve in found])),
        **_spreads(found),
        "collapsed": sum(curves.collapsed(curve.accuracy) for curve in found),
    }


def _spreads(found: Sequence[Curve]) -> dict[str, float | None]:
    return {
        f"{name}_{part}": value
        for name in ("information", "multiplier")
        for part, value in curves.spread(
            np.concatenate([getattr(curve, name) for curve in found])
        ).items()
    }


def _alarms(runs: Runs) -> list[dict[str, Any]]:
    falls = [curves.fall(curve.steps, curve.accuracy) for curve in runs.values()]
    return [
        {"alarm": name, **curves.judge([alarm(curve) for curve in runs.values()], falls)}
        for name, alarm in curves.ALARMS.items()
    ]


# ---- the table -----------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    """Methods, comparisons and alarms as three tables. Accuracies are in points."""
    methods = [
        [
            row["method"],
            row["seeds"],
            *(
                f"{row[name]:.1%} ({row[f'{name}_low']:.1%} to {row[f'{name}_high']:.1%})"
                for name in ("first", "best", "last")
            ),
            _range(row, "information"),
            _range(row, "multiplier"),
            f"{row['collapsed']} of {row['seeds']}",
        ]
        for row in result["methods"]
    ]
    head = ["method", "seeds", "first", "best", "last", "information", "multiplier", "collapsed"]
    paired = [
        [last["method"], last["against"], *(_points(row) for row in rows), last["seeds"]]
        for rows in zip(
            *(result[f"comparisons{part}"] for part in ("", "_best", "_mean")), strict=True
        )
        for last in rows[:1]
    ]
    alarms = [
        ["-" if value is None else value for value in row.values()] for row in result["alarms"]
    ]
    return "\n\n".join(
        [
            _table(head, methods),
            _table(["method", "against", "last", "best", "mean of the curve", "seeds"], paired),
            _table([name.replace("_", " ") for name in result["alarms"][0]], alarms),
        ]
    )


def _range(row: Mapping[str, Any], name: str) -> str:
    low, mean, high = (row[f"{name}_{part}"] for part in ("min", "mean", "max"))
    if mean is None:
        return "-"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _points(row: Mapping[str, Any]) -> str:
    if row["low"] is None:
        return f"{100 * row['difference']:+.1f}"
    return f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    shown = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)


# ---- the figure ----------------------------------------------------------------------------------

GREY, BLUE, ORANGE = "#8a8a8a", "#1f5fa8", "#c65102"
PANELS = (2.2, 1.2, 1.0)
"""Heights in inches of an arm's accuracy, its difference from the baseline, and its information."""


def figure(runs: Runs, result: Mapping[str, Any], baseline: str, path: pathlib.Path) -> None:
    """Learning curves of every arm beside the baseline's, and all paired differences."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    others = [row["method"] for row in result["methods"] if row["method"] != baseline]
    columns = min(5 if len(others) > 8 else 4, max(len(others), 1))
    rows = math.ceil(len(others) / columns)
    heights = [rows * (sum(PANELS) + 0.75), 0.9 + 0.3 * len(result["comparisons"])]
    figure = pyplot.figure(
        figsize=(max(2.7 * columns + 0.6, 7.0), sum(heights) + 0.4), layout="constrained"
    )
    # Two parts: the long names of the lower one must not narrow the panels of the upper one.
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    _panels(upper, runs, others, baseline, columns)
    _forest(lower.add_subplot(), result["comparisons"], result["comparisons_mean"])
    figure.suptitle(
        f"Thin lines: single seeds ({result['methods'][0]['seeds']}). Thick: their mean, with its "
        f"95 % interval over seeds. Grey: {baseline}.",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panels(figure, runs: Runs, others: Sequence[str], baseline: str, columns: int) -> None:
    """Three panels an arm, axes shared among the arms."""
    rows = math.ceil(len(others) / columns)
    grid = figure.add_gridspec(3 * rows, columns, height_ratios=PANELS * rows)
    shared: list[Any] = [None] * 3
    for index, arm in enumerate(others):
        row, column = divmod(index, columns)
        axes: list[Any] = []
        for part in range(3):
            axes.append(
                figure.add_subplot(
                    grid[3 * row + part, column],
                    sharex=axes[0] if axes else shared[0],
                    sharey=shared[part],
                )
            )
        shared = [old or new for old, new in zip(shared, axes, strict=True)]
        top, middle, bottom = axes
        ours, theirs = _of(runs, arm), _of(runs, baseline)
        both = sorted(ours.keys() & theirs.keys())
        for found, color in ((theirs, GREY), (ours, BLUE)):
            steps = next(iter(found.values())).steps
            _band(top, steps, [100 * curve.accuracy for curve in found.values()], color, (0, 100))
            every = np.arange(1, steps[-1] + 1)
            _band(
                bottom, every, [_smooth(c, every) for c in found.values() if len(c.updates)], color
            )
        differences = [100 * (ours[seed].accuracy - theirs[seed].accuracy) for seed in both]
        _band(middle, ours[both[0]].steps, differences, ORANGE)
        top.set_title(arm, fontsize=10, loc="left")
        for part, label in zip(axes, ("avg@k, %", "difference", "I, nats"), strict=True):
            part.tick_params(labelleft=column == 0, labelbottom=part is bottom, labelsize=8)
            part.spines[["top", "right"]].set_visible(False)
            part.margins(x=0.02)
            if column == 0:
                part.set_ylabel(label, fontsize=9)
        for part in (middle, bottom):
            part.axhline(0, color="black", linewidth=0.6)
        bottom.set_xlabel("update", fontsize=9)


def _smooth(curve: Curve, steps: np.ndarray) -> np.ndarray:
    """The information's running mean at these steps; where updates were skipped, interpolated."""
    smooth = curves.running_mean(curve.information, curves.WINDOW)
    return np.interp(steps, curve.updates, smooth)


def _band(
    axes,
    steps: np.ndarray,
    rows: Sequence[np.ndarray],
    color: str,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    if not rows:
        return
    values = np.array(rows)
    mean = values.mean(axis=0)
    axes.plot(steps, values.T, color=color, linewidth=0.6, alpha=0.35)
    axes.plot(steps, mean, color=color, linewidth=1.8)
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values, axis=0)
        low, high = np.clip([mean - half, mean + half], *bounds)
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)


def _forest(axes, last: Sequence[Mapping[str, Any]], mean: Sequence[Mapping[str, Any]]) -> None:
    """Paired differences with their intervals, one line a pair."""
    for rows, color, shift, label in (
        (last, ORANGE, -0.15, "of the last avg@k"),
        (mean, BLUE, 0.15, "of the curve's mean"),
    ):
        values = [100 * row["difference"] for row in rows]
        places = [index + shift for index in range(len(rows))]
        errors = [
            0.0 if row["low"] is None else 100 * (row["high"] - row["difference"]) for row in rows
        ]
        axes.errorbar(
            values, places, xerr=errors, fmt="o", color=color, markersize=4, capsize=2, label=label
        )
    axes.axvline(0, color="black", linewidth=0.6)
    names = [f"{row['method']} \N{MINUS SIGN} {row['against']}" for row in last]
    axes.set_yticks(range(len(last)), names, fontsize=9)
    axes.set_ylim(len(last) - 0.4, -0.6)
    axes.set_xlabel("difference in points, paired by seed, with its 95 % interval", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.3)
