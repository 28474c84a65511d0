"""What a user should hear of while a run goes on, in plain words.

The conditions are those that users of such trainers report as silent failures: a loss of 0 because
nothing succeeded, flat rewards, cut-off responses, collapse.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

Row = Mapping[str, Any]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is a number of Python (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> TypeGuard[int | float]:
    return is_number(value) and math.isfinite(value)


class Condition(NamedTuple):
    """Something a user should hear of."""

    holds: Callable[[Row], bool]
    patience: int  # steps in a row before the first warning
    text: str


def _is_zero(name: str) -> Callable[[Row], bool]:
    return lambda row: row.get(name) == 0


def _at_least(name: str, least: float) -> Callable[[Row], bool]:
    return lambda row: is_number(row.get(name)) and row[name] >= least


CONDITIONS = {
    "not finite": Condition(
        lambda row: any(
            name in row and not _is_finite(row[name])
            for name in ("loss", "information", "grad_norm")
        ),
        1,
        "loss, information or gradient is not finite; if it comes again, lower "
        "optimizer.learning_rate and look at the newest rows of samples.jsonl",
    ),
    "inactive": Condition(
        _is_zero("context_fraction"),
        3,
        "no response succeeded and there was no feedback, so the teacher saw nothing that the "
        "student did not and nothing is learned (a loss of 0 means this, not success); see in "
        "samples.jsonl whether the answers have the form the verifier reads, else take easier "
        "questions, a larger sampling.num_samples, or a warm start",
    ),
    "flat": Condition(
        lambda row: _is_zero("reward/std")(row) and not _is_zero("context_fraction")(row),
        5,
        "all responses got the same reward; if it stays so, the questions are too easy or too "
        "hard, or the verifier does not tell good from bad",
    ),
    "cut off": Condition(
        _at_least("response_length/clip_fraction", 0.5),
        3,
        "half or more of the responses hit the limit and were cut off; raise "
        "sampling.max_response_length, or check that the model knows its end token",
    ),
}

# What should not collapse: (metric, how to call it). Half of its best smoothed value is an alarm.
FALLS = {
    "reward/mean": "the reward",
    "entropy/student": "the student's entropy",
    "response_length/mean": "the response length",
}


class Watch:
    """Finds what a user should hear of in a run's rows, and does not repeat itself much.

    A condition is told once it has held for its `patience` of rows in a row, then again each time
    that number has doubled. A fall (of reward, entropy or length to under half of their best, both
    smoothed over about ten rows) is told once.
    """

    def __init__(self) -> None:
        self._held = dict.fromkeys(CONDITIONS, 0)
        self._smooth: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._rows = 0
        self._fallen: set[str] = set()

    def check(self, row: Row) -> list[str]:
        """Returns the warnings for the next row of metrics (a row without `loss` is no step)."""
        if "loss" not in row:
            return []
        self._rows += 1
        warnings = []
        for name, condition in CONDITIONS.items():
            self._held[name] = self._held[name] + 1 if condition.holds(row) else 0
            times, rest = divmod(self._held[name], condition.patience)
            if times and not rest and times & (times - 1) == 0:
                steps = f" ({self._held[name]} steps in a row)" if self._held[name] > 1 else ""
                warnings.append(condition.text + steps)
        for name, called in FALLS.items():
            value = row.get(name)
            if not _is_finite(value):
                continue
            smooth = self._smooth.get(name, value)
            self._smooth[name] = smooth = smooth + 0.1 * (value - smooth)
            if self._rows >= 10:
                self._best[name] = best = max(self._best.get(name, smooth), smooth)
                if smooth < best / 2 and best > 0 and name not in self._fallen:
                    self._fallen.add(name)
                    warnings.append(
                        f"{called} fell from {best:.3g} to {smooth:.3g}, which may be a collapse; "
                        "the best student so far is kept under checkpoints/best"
                    )
        return warnings
