"""The warnings in plain words: when they come, that they do not nag, and what ends a run."""

import json
import math
from typing import get_args

import pytest

from pgpo_jax.errors import InputError
from pgpo_jax.logs import CONDITIONS, TRENDS, AlarmsConfig, Trace, Watch, follow
from pgpo_jax.logs.alarms import Name

GOOD = {
    "loss": 0.5,
    "information": 0.1,
    "grad_norm": 1.0,
    "context_fraction": 0.8,
    "reward/mean": 0.5,
    "reward/std": 0.5,
    "entropy/student": 1.0,
    "entropy/teacher": 0.9,
    "response_length/mean": 100.0,
    "response_length/clip_fraction": 0.0,
}
NOT_FINITE = GOOD | {"grad_norm": math.nan}
INACTIVE = GOOD | {"context_fraction": 0.0, "entropy/student": 0.0, "entropy/teacher": 0.0}
LESS_CERTAIN = GOOD | {"entropy/teacher": 1.2, "information": -0.2}


def fired(rows, **config):
    """(step, name) of all that fires."""
    alarms = Watch(AlarmsConfig(**config))
    return [(step, alarm.name) for step, row in enumerate(rows, 1) for alarm in alarms.check(row)]


def text_of(name, rows, **config):
    alarms = Watch(AlarmsConfig(**config))
    return next(alarm.text for row in rows for alarm in alarms.check(row) if alarm.name == name)


def test_every_alarm_has_a_name_that_stop_on_takes():
    assert set(get_args(Name)) == {*CONDITIONS, *TRENDS}
    assert not {*CONDITIONS} & {*TRENDS}


def test_a_good_run_is_quiet():
    assert fired([GOOD] * 100) == []


@pytest.mark.parametrize(
    ("change", "name", "steps", "words"),
    [
        ({"context_fraction": 0.0}, "inactive", [3, 6, 12, 24, 48, 96], "nothing is learned"),
        ({"reward/std": 0.0}, "flat", [5, 10, 20, 40, 80], "the same reward"),
        (
            {"response_length/clip_fraction": 0.6},
            "cut_off",
            [3, 6, 12, 24, 48, 96],
            "hit the limit",
        ),
        ({"information": math.inf}, "not_finite", [1, 2, 4, 8, 16, 32, 64], "not finite"),
        ({"grad_norm": None}, "not_finite", [1, 2, 4, 8, 16, 32, 64], "not finite"),
    ],
)
def test_a_lasting_condition_is_told_ever_more_rarely(change, name, steps, words):
    rows = [GOOD | change] * 100
    assert fired(rows) == [(step, name) for step in steps]
    assert words in text_of(name, rows)


def test_a_condition_that_passes_is_not_told():
    assert fired([INACTIVE, INACTIVE, GOOD] * 10) == []


def test_nothing_succeeding_is_not_also_called_flat():
    names = {name for _, name in fired([INACTIVE | {"reward/std": 0.0}] * 10)}
    assert names == {"inactive"}


def test_everything_succeeding_is_called_so_and_ends_nothing_by_itself():
    solved = INACTIVE | {"success_fraction": 1.0, "reward/std": 0.0, "skipped": 1, "finite": 1}
    assert {name for _, name in fired([solved] * 10)} == {"solved"}
    assert {name for _, name in fired([solved | {"context_fraction": 1.0}] * 10)} == {"solved"}
    assert "every response succeeded" in text_of("solved", [solved] * 10)
    assert ends([solved] * 200) == []
    assert ends([solved] * 3, stop_on=("solved",)) == [(3, 0)]
    nothing = solved | {"success_fraction": 0.0}
    assert ends([solved] * 60 + [nothing] * 100)[0] == (160, 1)  # its own counter


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("reward_fall", "reward/mean"),
        ("entropy_fall", "entropy/student"),
        ("length_fall", "response_length/mean"),
    ],
)
def test_a_collapse_is_told_once(name, metric):
    # The teacher's entropy falls with the student's: the information stays.
    low = {metric: GOOD[metric] / 10, "entropy/teacher": 0.0}
    rows = [GOOD] * 30 + [GOOD | low] * 30
    ((step, found),) = fired(rows)
    assert found == name
    assert 31 <= step <= 45
    assert "may be a collapse" in text_of(name, rows)


def test_a_surge_of_length_is_told_once_and_one_of_the_first_steps_is_none():
    longer = GOOD | {"response_length/mean": 300.0}
    assert fired([GOOD] * 3 + [longer] * 60) == []
    rows = [GOOD] * 30 + [longer] * 30
    ((step, name),) = fired(rows)
    assert (step, name) == (37, "length_surge")  # 300 - 200 * 0.9^7 is over 200, twice the lowest
    assert "from 100 to 204 tokens" in text_of("length_surge", rows)
    assert fired(rows, surge=3.0) == []


def test_information_below_zero_for_a_stated_number_of_steps_is_told():
    # The mean of 0.1 and then -0.2 is below 0 from the 4th such step on.
    rows = [GOOD] * 20 + [LESS_CERTAIN] * 20
    assert fired(rows) == [(33, "information")]
    assert fired(rows, information_steps=3) == [(26, "information")]
    assert fired(rows, window=1) == [(30, "information")]
    text = text_of("information", rows)
    assert "low for 10 steps" in text and "no longer" in text


def test_information_below_zero_from_the_first_step_on_is_told_too():
    assert fired([LESS_CERTAIN] * 100) == [(10, "information")]


def test_the_information_of_the_alarm_is_the_entropy_gap_whatever_the_estimator():
    assert fired([GOOD | {"information": -1.0}] * 100) == []  # as `pointwise` is


def test_a_trend_is_told_again_after_it_was_over():
    rows = [GOOD] * 20 + [LESS_CERTAIN] * 20 + [GOOD] * 40 + [LESS_CERTAIN] * 40
    steps = [step for step, name in fired(rows)]
    assert len(steps) == 2
    assert 81 < steps[1] <= 105


def test_steps_without_a_teacher_context_are_no_fall_of_the_entropy():
    assert {name for _, name in fired([GOOD] * 30 + [INACTIVE] * 30)} == {"inactive"}


def test_values_that_are_not_finite_leave_the_means_alone():
    broken = dict.fromkeys(GOOD, math.nan) | {"context_fraction": 0.5}
    assert {name for _, name in fired([GOOD] * 30 + [broken] * 30 + [GOOD] * 30)} == {"not_finite"}


def test_rewards_below_zero_are_no_collapse():
    assert fired([GOOD | {"reward/mean": -1.0}] * 50) == []


def test_a_row_of_an_evaluation_is_no_step():
    assert fired([{"eval/avg@16": 0.5}] * 10) == []


def test_a_trace_is_an_exponential_mean_whose_extremes_begin_after_the_window():
    trace = None
    for value in (4.0, 0.0, 2.0):
        trace = follow(trace, value, 2)
    assert trace == Trace(mean=2.0, lowest=2.0, highest=2.0, rows=3)
    assert follow(trace, 4.0, 2) == Trace(3.0, 2.0, 3.0, 4)


# ---- resuming ------------------------------------------------------------------------------------


def test_a_watch_that_goes_on_from_its_saved_state_says_the_same():
    """Interrupted at every step of a run in which everything happens."""
    falling = [GOOD | {"reward/mean": 0.5 * 0.9**i} for i in range(25)]
    rows = [GOOD] * 15 + falling + [INACTIVE] * 7 + [LESS_CERTAIN] * 15 + [NOT_FINITE] * 4
    rows += [GOOD | {"response_length/mean": 500.0}] * 10
    config = AlarmsConfig(window=5, most_broken=3, stop_on=("reward_fall",))
    whole = Watch(config)
    expected = [(whole.check(row), whole.end()) for row in rows]
    assert {alarm.name for alarms, _ in expected for alarm in alarms} >= {
        *("reward_fall", "inactive", "information", "not_finite", "length_surge")
    }
    resumed = Watch(config)
    for row, (alarms, end) in zip(rows, expected, strict=True):
        resumed = Watch(config, json.loads(json.dumps(resumed.state, allow_nan=False)))
        assert resumed.check(row) == alarms
        assert resumed.end() == end


# ---- what ends a run -----------------------------------------------------------------------------


def ends(rows, **config):
    """(step, exit code) at which the run would end."""
    alarms = Watch(AlarmsConfig(**config))
    found = []
    for step, row in enumerate(rows, 1):
        alarms.check(row)
        if end := alarms.end():
            found.append((step, end.code))
    return found


def test_alarms_end_nothing_by_default():
    assert ends([GOOD] * 30 + [GOOD | {"reward/mean": 0.0}] * 30 + [LESS_CERTAIN] * 30) == []


def test_an_alarm_in_stop_on_ends_the_run_when_it_fires():
    rows = [GOOD] * 20 + [LESS_CERTAIN] * 20
    assert ends(rows, stop_on=("information",)) == [(33, 0)]
    assert ends(rows, stop_on=("reward_fall", "length_surge")) == []


def test_so_many_broken_updates_in_a_row_are_a_failure_and_whoever_goes_on_gets_as_many_again():
    rows = [NOT_FINITE] * 9 + [GOOD] + [NOT_FINITE] * 20
    assert ends(rows) == [(20, 1), (30, 1)]
    assert ends(rows, most_broken=30) == []


def test_so_many_updates_without_a_context_are_a_failure_unless_it_is_off():
    assert ends([INACTIVE] * 150) == [(100, 1)]
    assert ends([INACTIVE] * 150, most_inactive=40) == [(40, 1), (80, 1), (120, 1)]
    assert ends([INACTIVE] * 150, most_inactive=None) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window", 0),
        ("fall", 1.0),
        ("surge", 1.0),
        ("information_steps", 0),
        ("most_broken", 0),
        ("most_inactive", 0),
    ],
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(InputError, match=rf"alarms\.{field}: got .*; must be"):
        AlarmsConfig(**{field: value})
