"""Refresh rules that look at the run, by sequences worked out by hand."""

import json

import pytest

from pgpo_jax.methods import Gate, Progress, refresh_due
from pgpo_jax.teacher import TeacherConfig


def refreshes(config, rewards, cuts=None, save_at=None) -> list[int]:
    """The steps after which the teacher becomes the student; saved and read back once if asked."""
    gate, found = Gate(), []
    for step, reward in enumerate(rewards, start=1):
        cut = 0.0 if cuts is None else cuts[step - 1]
        gate, due = refresh_due(config, gate, Progress(step, len(rewards), reward, cut))
        found += [step] if due else []
        if step == save_at:
            gate = Gate(*json.loads(json.dumps(gate)))
    return found


@pytest.mark.parametrize(
    ("steps", "expected"), [(100, [25, 50, 75]), (10, [2, 5, 8]), (2, [1, 2]), (1, [1])]
)
def test_restarts_come_at_their_parts_of_the_run(steps, expected):
    assert refreshes(TeacherConfig("restarts"), [0.0] * steps) == expected


def test_restarts_may_be_given():
    config = TeacherConfig("restarts", restart_fractions=(0.1, 0.9))
    assert refreshes(config, [0.0] * 20) == [2, 18]


# Looks after steps 2, 4, ...: means 0.25 (sets the level), 0.25, 0.5, 0.5, 0.4, 0.75.
REWARDS = [0.0, 0.5, 0.25, 0.25, 0.5, 0.5, 0.25, 0.75, 0.4, 0.4, 0.5, 1.0]


def test_the_gate_opens_where_the_mean_reward_rose_since_the_last_refresh():
    assert refreshes(TeacherConfig("gated", period=2), REWARDS) == [6, 12]
    assert refreshes(TeacherConfig("gated", period=2, gate_rise=0.24), REWARDS) == [6, 12]
    assert refreshes(TeacherConfig("gated", period=2, gate_rise=0.25), REWARDS) == [12]
    assert refreshes(TeacherConfig("gated", period=50), REWARDS) == []


def test_the_gate_stays_shut_while_too_many_responses_are_cut_off():
    cuts = [0.0] * 4 + [0.5, 0.0] + [0.0] * 6  # a quarter of the steps up to the look at 6
    config = TeacherConfig("gated", period=2, gate_tail=0.1)
    assert refreshes(config, REWARDS, cuts) == [8, 12], "at 8 it is above the level of the start"
    assert refreshes(TeacherConfig("gated", period=2, gate_tail=0.25), REWARDS, cuts) == [6, 12]


@pytest.mark.parametrize("step", range(1, len(REWARDS)))
def test_a_gate_that_was_saved_goes_on_as_it_would_have(step):
    config = TeacherConfig("gated", period=3)
    rewards = [reward / 3 for reward in REWARDS]  # no number of few digits
    assert refreshes(config, rewards, save_at=step) == refreshes(config, rewards)


def test_other_rules_do_not_look_at_the_run():
    for rule in ("ema", "frozen", "live", "periodic", "trust_region"):
        assert refresh_due(TeacherConfig(rule), Gate(), Progress(1, 2, 1.0, 0.0)) == (Gate(), None)
