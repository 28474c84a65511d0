"""The picture of README.md: what training changed, of the quickstart and of a real model.

python benchmarks/readme_figure.py     # writes results/readme.png

Each panel is a saved ablation (`ablation.py --save NAME`), if it is there: accuracy on held-out
questions, the mean over seeds with its 95 % t interval. A result without curves (made before they
were kept) is drawn as its first and its last evaluation, with dots between.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

HERE = pathlib.Path(__file__).parent
PANELS = (
    (("quickstart", "ablation_addition"), "Addition, 108,000 parameters"),
    (("lm_word_reversal",), "Word reversal, SmolLM2-135M"),
)
"""Results of a panel, of which the first that is there is drawn, and the panel's title."""
ARMS = {
    "sdpo": ("SDPO", "#888888"),
    "grpo": ("GRPO", "#009e73"),
    "sdpo_matched_rate": ("SDPO at PGPO's mean rate", "#d55e00"),
    "pgpo_1.0": ("PGPO, alpha 1", "#0072b2"),
}

BANDS = ("sdpo", "pgpo_1.0")
"""Arms whose interval is drawn too; those of paired seeds nearly coincide."""


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the panels whose results are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    folder = parser.parse_args(argv).results
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = [(names, title) for names, title in PANELS if first_of(folder, names)]
    figure, all_axes = pyplot.subplots(
        1, len(found), figsize=(4.6 * len(found), 3.0), squeeze=False, layout="constrained"
    )
    for axes, (names, title) in zip(all_axes[0], found, strict=True):
        path = first_of(folder, names)
        panel(axes, json.loads(path.read_text()), title)
    figure.savefig(folder / "readme.png", dpi=120)
    print(f"wrote {folder / 'readme.png'}")


def first_of(folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    """The first of these results that is there."""
    paths = (folder / f"{name}.json" for name in names)
    return next((path for path in paths if path.exists()), None)


def panel(axes: Any, result: Mapping[str, Any], title: str) -> None:
    """Accuracy of the arms that a result has."""
    for arm, (label, color) in ARMS.items():
        runs = [run for run in result["runs"] if run["method"] == arm]
        if not runs:
            continue
        whole = all("accuracy" in run for run in runs)
        steps = runs[0]["steps"] if whole else [0, runs[0]["updates"]]
        values = 100 * np.array(
            [run["accuracy"] if whole else (run["first"], run["last"]) for run in runs]
        )
        axes.plot(
            steps,
            values.mean(0),
            "o-" if whole else "o:",
            color=color,
            markersize=3,
            label=f"{label} ({len(runs)} seeds)",
        )
        if len(runs) > 1 and arm in BANDS:
            half = stats.t.ppf(0.975, len(runs) - 1) * stats.sem(values, axis=0)
            low, high = np.clip([values.mean(0) - half, values.mean(0) + half], 0, 100)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("held-out accuracy, %", fontsize=9)
    axes.set_ylim(0, 100)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    main()
