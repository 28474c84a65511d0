"""What a user should hear of while a run goes on, in plain words, and what ends it early.

The conditions are those that users of such trainers report as silent failures: a loss of 0 because
nothing succeeded, flat rewards, cut-off responses, updates that are skipped; and what comes before
or with a collapse: reward, entropy or length that fall, responses that grow, information below 0.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

from pgpo_jax.errors import require

Row = Mapping[str, Any]
Name = Literal[
    "not_finite",
    "inactive",
    "solved",
    "flat",
    "cut_off",
    "reward_fall",
    "entropy_fall",
    "length_fall",
    "length_surge",
    "information",
]

Reaction = Literal["none", "lower_rate", "freeze_teacher", "refresh_teacher", "rehearse"]


@dataclass(frozen=True)
class AlarmsConfig:
    """When a run warns of itself, and what ends it early (config section `alarms`)."""

    stop_on: tuple[Name, ...] = ()
    """Alarms at which the run saves and ends, with exit code 0; the others only warn. All of them
    are named in metrics.jsonl where they fire, as `alarm`."""
    react_on: tuple[Name, ...] = ("information",)
    """Alarms at which the run reacts, the first time one of them fires."""
    reaction: Reaction = "none"
    """What it does from the next update on: a tenth of the learning rate, a teacher that stays as
    it is, one that becomes the student once, or `objective.rehearsal` of 1."""
    window: int = 10
    """Steps, about, over which the means are taken that the falls, the surge and `information`
    read (exponentially weighted); so many steps pass before the first fall or surge."""
    fall: float = 0.5
    """`reward_fall`, `entropy_fall`, `length_fall`: a mean is under this part of its best. Where
    rewards may be negative: it fell by the rest of its best's size, and of their deviation."""
    surge: float = 2.0
    """`length_surge`: the mean response length is over this multiple of its lowest."""
    information_steps: int = 10
    """`information`: the mean was that low for so many steps in a row."""
    information_fraction: float = 0.0
    """`information`: how low, as a part of its highest mean; 0 is below 0. A third comes earlier,
    but also where the student has learned all that its teacher knows (benchmarks/EVIDENCE.md)."""
    most_broken: int = 10
    """So many steps in a row with an update skipped because loss, gradient or information was not
    finite save and end the run, with exit code 1."""
    most_inactive: int | None = 100
    """The same for steps all of whose updates were skipped because no response had a teacher
    context; null goes on. Those skipped because every response succeeded do not count: that is the
    alarm `solved`."""

    def __post_init__(self):
        require(
            "alarms",
            self,
            window=(self.window >= 1, "at least 1"),
            fall=(0 < self.fall < 1, "between 0 and 1, both excluded"),
            surge=(self.surge > 1, "more than 1"),
            information_steps=(self.information_steps >= 1, "at least 1"),
            information_fraction=(0 <= self.information_fraction < 1, "at least 0 and below 1"),
            most_broken=(self.most_broken >= 1, "at least 1"),
            most_inactive=(
                self.most_inactive is None or self.most_inactive >= 1,
                "at least 1, or null",
            ),
        )


class Alarm(NamedTuple):
    """One that fired at a step."""

    name: Name
    text: str
    """What it means and what can be done, for people."""


class End(NamedTuple):
    """Why a run ends before its last step."""

    code: int
    """Exit code: 0 for an alarm in `stop_on`, 1 for too many skipped updates in a row."""
    text: str


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is a number of Python (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> TypeGuard[int | float]:
    return is_number(value) and math.isfinite(value)


# ---- conditions of single rows -------------------------------------------------------------------


class Condition(NamedTuple):
    """Something that single rows show."""

    holds: Callable[[Row], bool]
    patience: int  # steps in a row before the first warning
    text: str


def _is_zero(name: str) -> Callable[[Row], bool]:
    return lambda row: row.get(name) == 0


def _all_succeeded(row: Row) -> bool:
    return row.get("success_fraction") == 1


def _learns_nothing(row: Row) -> bool:
    """Skipped with finite numbers; a row that does not say so is judged by its contexts."""
    if "skipped" in row:
        return row["skipped"] == 1 and row.get("finite") == 1
    return row.get("context_fraction") == 0


def _at_least(name: str, least: float) -> Callable[[Row], bool]:
    return lambda row: is_number(row.get(name)) and row[name] >= least


CONDITIONS: dict[Name, Condition] = {
    "not_finite": Condition(
        lambda row: (
            row.get("finite", 1) != 1  # one update of a step's several is enough
            or any(
                name in row and not _is_finite(row[name])
                for name in ("loss", "information", "grad_norm")
            )
        ),
        1,
        "loss, information or gradient is not finite, so the update was skipped; if it comes "
        "again, lower optimizer.learning_rate and look at the newest rows of samples.jsonl",
    ),
    "inactive": Condition(
        lambda row: _learns_nothing(row) and not _all_succeeded(row),
        3,
        "no response succeeded and there was no feedback, so the teacher saw nothing that the "
        "student did not and nothing is learned (a loss of 0 means this, not success; for a policy "
        "gradient it means equal rewards within every question); see in samples.jsonl whether the "
        "answers have the form the verifier reads, else take easier questions, a larger "
        "sampling.num_samples, or a warm start",
    ),
    "solved": Condition(
        lambda row: _learns_nothing(row) and _all_succeeded(row),
        3,
        "every response succeeded, and there is nothing left to learn from these questions; end "
        "here, or take harder ones",
    ),
    "flat": Condition(
        lambda row: (
            _is_zero("reward/std")(row)
            and not _is_zero("context_fraction")(row)
            and not (_learns_nothing(row) and _all_succeeded(row))
        ),
        5,
        "all responses got the same reward; if it stays so, the questions are too easy or too "
        "hard, or the verifier does not tell good from bad",
    ),
    "cut_off": Condition(
        _at_least("response_length/clip_fraction", 0.5),
        3,
        "half or more of the responses hit the limit and were cut off; raise "
        "sampling.max_response_length, or check that the model knows its end token",
    ),
}


# ---- trends over many rows -----------------------------------------------------------------------


class Trace(NamedTuple):
    """The running mean of a metric, and the lowest and highest that it has been."""

    mean: float
    lowest: float
    highest: float
    rows: int


def follow(trace: Trace | None, value: float, window: int) -> Trace:
    """The trace with one more value; in the first `window` rows the extremes go with the mean."""
    if trace is None:
        return Trace(value, value, value, 1)
    mean = trace.mean + (value - trace.mean) / window
    if trace.rows < window:
        return Trace(mean, mean, mean, trace.rows + 1)
    return Trace(mean, min(trace.lowest, mean), max(trace.highest, mean), trace.rows + 1)


def _under_a_teacher(value: Callable[[Row], Any]) -> Callable[[Row], Any]:
    """Entropies are means over the responses with a context, and 0 where there is none."""
    return lambda row: None if row.get("context_fraction") == 0 else value(row)


def _entropy_gap(row: Row) -> float | None:
    student, teacher = row.get("entropy/student"), row.get("entropy/teacher")
    return student - teacher if _is_finite(student) and _is_finite(teacher) else None


# The information is the paper's, whichever estimator the multiplier reads: the others cannot fall
# below 0 (`pointwise` is hardly ever above).
TRACED: dict[str, Callable[[Row], Any]] = {
    "reward": lambda row: row.get("reward/mean"),
    "reward_std": lambda row: row.get("reward/std"),
    "entropy": _under_a_teacher(lambda row: row.get("entropy/student")),
    "length": lambda row: row.get("response_length/mean"),
    "information": _under_a_teacher(_entropy_gap),
}


Holds = Callable[[Mapping[str, Trace], AlarmsConfig], bool]


class Trend(NamedTuple):
    """Something that a running mean shows."""

    traced: str
    holds: Holds
    steps: Callable[[AlarmsConfig], int]  # in a row before it is told
    text: str


def _fell(name: str) -> Holds:
    def holds(traces: Mapping[str, Trace], config: AlarmsConfig) -> bool:
        mean, highest = traces[name].mean, traces[name].highest
        return highest > 0 and mean < config.fall * highest

    return holds


def _reward_fell(traces: Mapping[str, Trace], config: AlarmsConfig) -> bool:
    """Rewards that go below 0 have no zero to fall to: by their size and how far they are apart."""
    reward, deviation = traces["reward"], traces.get("reward_std")
    if reward.lowest >= 0:
        return _fell("reward")(traces, config)
    size = max(abs(reward.highest), deviation.highest if deviation else 0.0)
    return reward.highest - reward.mean > (1 - config.fall) * size


def _surged(traces: Mapping[str, Trace], config: AlarmsConfig) -> bool:
    return traces["length"].mean > config.surge * traces["length"].lowest > 0


def _information_is_low(traces: Mapping[str, Trace], config: AlarmsConfig) -> bool:
    trace = traces["information"]
    return trace.mean < config.information_fraction * max(trace.highest, 0)


def _at_once(config: AlarmsConfig) -> int:
    del config
    return 1


_COLLAPSE = (
    " fell from {highest:.3g} to {mean:.3g}, which may be a collapse; the best student so far is "
    "kept under checkpoints/best"
)
TRENDS: dict[Name, Trend] = {
    "reward_fall": Trend("reward", _reward_fell, _at_once, "the reward" + _COLLAPSE),
    "entropy_fall": Trend(
        "entropy", _fell("entropy"), _at_once, "the student's entropy" + _COLLAPSE
    ),
    "length_fall": Trend("length", _fell("length"), _at_once, "the response length" + _COLLAPSE),
    "length_surge": Trend(
        "length",
        _surged,
        _at_once,
        "the responses grew from {lowest:.3g} to {mean:.3g} tokens; see in samples.jsonl whether "
        "they say more or only run on, and if so lower optimizer.learning_rate",
    ),
    "information": Trend(
        "information",
        _information_is_low,
        lambda config: config.information_steps,
        "the information has been low for {steps} steps (mean {mean:.3g}, once {highest:.3g}): "
        "below 0 the teacher, shown a right answer, is less certain than the student without one, "
        "so it may no longer know how to use one. Some runs collapse around here: watch "
        "eval/avg@16, and if it no longer rises end here (checkpoints/best) or lower "
        "optimizer.learning_rate",
    ),
}


# ---- the watch -----------------------------------------------------------------------------------


class Watch:
    """Finds what a user should hear of in a run's rows, and does not repeat itself much.

    A condition is told once it has held for its `patience` of rows in a row, then again each time
    that number has doubled. A trend is told once it has held for its `steps`, and again only after
    it did not hold for a `window` of rows.
    """

    def __init__(
        self, config: AlarmsConfig | None = None, state: Mapping[str, Any] | None = None
    ) -> None:
        """Starts to watch, or goes on where a watch was whose `state` was saved."""
        self._config = config or AlarmsConfig()
        state = state or {}
        # Rows in a row in which it held; below 0: in which it did not.
        self._held = dict.fromkeys((*CONDITIONS, *TRENDS), 0) | state.get("held", {})
        self._traces = {name: Trace(*trace) for name, trace in state.get("traces", {}).items()}
        self._told: set[str] = set(state.get("told", ()))
        self._fired: list[str] = list(state.get("fired", ()))

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON): a resumed run warns as if it had never stopped."""
        return {
            "held": dict(self._held),
            "traces": {name: list(trace) for name, trace in self._traces.items()},
            "told": sorted(self._told),
            "fired": list(self._fired),
        }

    @property
    def running_information(self) -> float | None:
        """The running mean of H(student) - H(teacher), nats per response token."""
        trace = self._traces.get("information")
        return None if trace is None else trace.mean

    def check(self, row: Row) -> list[Alarm]:
        """Returns what fires at the next row of metrics (a row without `loss` is no step)."""
        if "loss" not in row:
            return []
        fired = []
        for name, condition in CONDITIONS.items():
            held = self._count(name, condition.holds(row))
            times, rest = divmod(max(held, 0), condition.patience)
            if times and not rest and times & (times - 1) == 0:
                steps = f" ({held} steps in a row)" if held > 1 else ""
                fired.append(Alarm(name, condition.text + steps))
        for name, value_of in TRACED.items():
            if _is_finite(value := value_of(row)):
                self._traces[name] = follow(self._traces.get(name), value, self._config.window)
        for name, trend in TRENDS.items():
            if (trace := self._traces.get(trend.traced)) is None:
                continue
            held = self._count(name, trend.holds(self._traces, self._config))
            if held <= -self._config.window:
                self._told.discard(name)
            if held >= trend.steps(self._config) and name not in self._told:
                self._told.add(name)
                text = trend.text.format(**trace._asdict(), steps=held)
                fired.append(Alarm(name, text))
        self._fired = [alarm.name for alarm in fired]
        return fired

    def end(self) -> End | None:
        """Whether the newest row ends the run, and why."""
        for name in self._fired:
            if name in self._config.stop_on:
                return End(0, f"the alarm {name} fired, which alarms.stop_on names")
        broken, inactive = self._config.most_broken, self._config.most_inactive
        held = self._held["not_finite"]
        if held > 0 and held % broken == 0:  # whoever goes on gets as many tries again
            return End(
                1,
                f"{held} updates in a row were skipped, because loss, information or gradient was "
                f"not finite (alarms.most_broken = {broken}); lower optimizer.learning_rate, and "
                "look at the newest rows of samples.jsonl",
            )
        held = self._held["inactive"]
        if inactive is not None and held > 0 and held % inactive == 0:
            return End(
                1,
                f"{held} updates in a row were skipped, because no response succeeded and there "
                f"was no feedback (alarms.most_inactive = {inactive}); see in samples.jsonl "
                "whether the answers have the form the verifier reads, else take easier questions, "
                "a larger sampling.num_samples, or a warm start",
            )
        return None

    def _count(self, name: Name, holds: bool) -> int:
        before = self._held[name]
        self._held[name] = max(before, 0) + 1 if holds else min(before, 0) - 1
        return self._held[name]
