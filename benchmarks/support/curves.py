"""Runs read back from their folders, and the statistics by which an ablation compares them.

Every accuracy is avg@k in [0, 1]. Two kinds of uncertainty are kept apart: which questions were
asked (a bootstrap over questions, since the k responses to one question belong together, and all
runs answer the same ones) and which seed a run had (Student's t over differences of runs of the
same seed, which share warm start, questions and random keys).
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from pgpo_jax.logs import Watch

COLLAPSE = 0.10
"""A run collapsed where its last accuracy is this far under its best."""
RESAMPLES = 2000
TOLERANCE = 1e-9  # so that a fall from 0.9 to 0.8 is not less than 0.1 by rounding


class Curve(NamedTuple):
    """One run. Evaluations and updates are counted apart; skipped updates are left out. Where a
    step has several, each has the means of its step but for its own multiplier."""

    steps: np.ndarray
    """Of the evaluations, `[evaluation]`."""
    accuracy: np.ndarray
    """avg@k, `[evaluation]`."""
    rewards: np.ndarray
    """Mean reward of each question, `[evaluation, question]`."""
    updates: np.ndarray
    """Steps after which each update was done, `[update]`."""
    information: np.ndarray
    """Nats per response token, `[update]`."""
    multiplier: np.ndarray
    """`[update]`."""
    reward: np.ndarray
    """Mean reward of the training responses, `[update]`."""
    fired: Mapping[str, int]
    """Alarms of `pgpo_jax.logs`, as they stand by default, by name: the step of the first."""

    @property
    def best(self) -> int:
        """Index of the best evaluation, the first of equals."""
        return int(np.argmax(self.accuracy))


def read(folder: str | pathlib.Path) -> Curve:
    """A run's curve from its `metrics.jsonl` and `evaluations.jsonl`."""
    rows, asked = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (pathlib.Path(folder) / f"{name}.jsonl" for name in ("metrics", "evaluations"))
    )
    updates = [each for row in rows for each in _updates(row)]
    rewards = np.array([row["rewards"] for row in asked])
    watch, fired = Watch(), {}
    for row in rows:
        for alarm in watch.check(row):
            fired.setdefault(alarm.name, row["step"])
    return Curve(
        np.array([row["step"] for row in asked]),
        rewards.mean(axis=1),
        rewards,
        *(
            np.array([row[name] for row in updates], float)
            for name in ("step", "information", "multiplier", "reward/mean")
        ),
        fired,
    )


def _updates(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A row for each update that a step did; none for an evaluation."""
    if row.get("skipped", 1) == 1:
        return []
    return [{**row, "multiplier": each} for each in row.get("multipliers", [row["multiplier"]])]


def spread(values: np.ndarray) -> dict[str, float | None]:
    """`min`, `mean` and `max`; null where there are no values (a run may skip every update)."""
    if not len(values):
        return dict.fromkeys(("min", "mean", "max"))
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def collapsed(accuracy: Sequence[float], drop: float = COLLAPSE) -> bool:
    """Whether the last accuracy is more than `drop` under the best."""
    return bool(accuracy[-1] < max(accuracy) - drop - TOLERANCE)


def clustered_interval(rewards: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap over questions of a mean over runs and questions.

    Args:
      rewards: Mean reward (or difference of two) of each question, `[question]` or
        `[run, question]`; a question drawn is drawn for all runs.
      seed: Of the resampling.
    """
    means = np.atleast_2d(rewards).mean(axis=0)
    count = len(means)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    low, high = np.quantile(drawn @ means / count, [0.025, 0.975])
    return float(low), float(high)


class Difference(NamedTuple):
    """A mean of paired differences with its 95 % interval; null where one pair allows none."""

    difference: float
    low: float | None
    high: float | None
    seeds: int


def paired_difference(values: Mapping[int, float], against: Mapping[int, float]) -> Difference:
    """Mean over the seeds that both have, with Student's t interval.

    Args:
      values: By seed.
      against: By seed.
    """
    seeds = sorted(values.keys() & against.keys())
    differences = np.array([values[seed] - against[seed] for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) < 2:
        return Difference(mean, None, None, len(seeds))
    half = stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(differences)
    return Difference(mean, mean - float(half), mean + float(half), len(seeds))


# ---- alarms --------------------------------------------------------------------------------------


def fall(steps: Sequence[int], accuracy: Sequence[float], drop: float = COLLAPSE) -> int | None:
    """The evaluated step from which on the accuracy stays more than `drop` under its best.

    None where the run ends within `drop` of its best, whatever dips it came through.
    """
    within = np.flatnonzero(np.asarray(accuracy) >= max(accuracy) - drop - TOLERANCE)
    return None if within[-1] == len(accuracy) - 1 else int(steps[within[-1] + 1])


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the last `window` values (of all where there are fewer), `[update]`."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def first_stretch(holds: Sequence[bool], length: int) -> int | None:
    """Index at which a condition has first held `length` times in a row."""
    row = 0
    for index, held in enumerate(holds):
        row = row + 1 if held else 0
        if row == length:
            return index
    return None


WINDOW, PATIENCE = 20, 5


def information_alarm(curve: Curve, below: float = 0.0) -> int | None:
    """The step at which the running mean of I was `below` so much for PATIENCE updates in a row."""
    index = first_stretch(running_mean(curve.information, WINDOW) < below, PATIENCE)
    return None if index is None else int(curve.updates[index])


def information_fraction_alarm(curve: Curve, fraction: float = 1 / 3) -> int | None:
    """As `information_alarm`, below a fraction of the mean of the first WINDOW updates."""
    return information_alarm(curve, fraction * float(curve.information[:WINDOW].sum()) / WINDOW)


def reward_alarm(curve: Curve, drop: float = 0.05) -> int | None:
    """The rival that is free as well: the training reward's running mean `drop` under its best."""
    smooth = running_mean(curve.reward, WINDOW)[WINDOW - 1 :]  # a mean of few is no best
    index = first_stretch(smooth < np.maximum.accumulate(smooth) - drop, PATIENCE)
    return None if index is None else int(curve.updates[WINDOW - 1 + index])


ALARMS = {
    "watch: information": lambda curve: curve.fired.get("information"),
    "watch: reward_fall": lambda curve: curve.fired.get("reward_fall"),
    "information below 0": information_alarm,
    "information below a third of its start": information_fraction_alarm,
    "reward 5 points below its best": reward_alarm,
}
"""The first two are those of a run itself (section `alarms`); the others take a running mean over
WINDOW updates, and want it for PATIENCE updates in a row."""


def judge(alarms: Sequence[int | None], falls: Sequence[int | None]) -> dict[str, Any]:
    """What an alarm was worth over runs.

    Args:
      alarms: Step of each run's alarm, or None.
      falls: Step of each run's fall of accuracy, or None.

    Returns:
      `falls`; of these `before` (alarm at or before the fall), `late` (after it) and `missed`; the
      `lead` of those before in steps (mean, least, most; null without any); `calm` runs that did
      not fall, and `false_alarms` among them.
    """
    pairs = list(zip(alarms, falls, strict=True))
    fell = [(alarm, at) for alarm, at in pairs if at is not None]
    leads = [at - alarm for alarm, at in fell if alarm is not None and alarm <= at]
    return {
        "falls": len(fell),
        "before": len(leads),
        "late": sum(alarm is not None and alarm > at for alarm, at in fell),
        "missed": sum(alarm is None for alarm, _ in fell),
        "lead_mean": float(np.mean(leads)) if leads else None,
        "lead_min": min(leads, default=None),
        "lead_max": max(leads, default=None),
        "calm": len(pairs) - len(fell),
        "false_alarms": sum(alarm is not None and at is None for alarm, at in pairs),
    }
