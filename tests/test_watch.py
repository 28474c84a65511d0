"""The warnings in plain words: when they come, and that they do not nag."""

import math

import pytest

from pgpo_jax.watch import Watch

GOOD = {
    "loss": 0.5,
    "information": 0.1,
    "grad_norm": 1.0,
    "context_fraction": 0.8,
    "reward/mean": 0.5,
    "reward/std": 0.5,
    "entropy/student": 1.0,
    "response_length/mean": 100.0,
    "response_length/clip_fraction": 0.0,
}


def warned_steps(rows):
    watch = Watch()
    return [(step, text) for step, row in enumerate(rows, 1) for text in watch.check(row)]


def test_a_good_run_is_quiet():
    assert warned_steps([GOOD] * 100) == []


@pytest.mark.parametrize(
    ("change", "steps", "words"),
    [
        ({"context_fraction": 0.0}, [3, 6, 12, 24, 48, 96], "nothing is learned"),
        ({"reward/std": 0.0}, [5, 10, 20, 40, 80], "the same reward"),
        ({"response_length/clip_fraction": 0.6}, [3, 6, 12, 24, 48, 96], "hit the limit"),
        ({"information": math.inf}, [1, 2, 4, 8, 16, 32, 64], "not finite"),
        ({"grad_norm": None}, [1, 2, 4, 8, 16, 32, 64], "not finite"),
    ],
)
def test_a_lasting_condition_is_told_ever_more_rarely(change, steps, words):
    warned = warned_steps([GOOD | change] * 100)
    assert [step for step, _ in warned] == steps
    assert all(words in text for _, text in warned)


def test_a_condition_that_passes_is_not_told():
    inactive = GOOD | {"context_fraction": 0.0}
    assert warned_steps([inactive, inactive, GOOD] * 10) == []


def test_nothing_succeeding_is_not_also_called_flat():
    warned = warned_steps([GOOD | {"context_fraction": 0.0, "reward/std": 0.0}] * 10)
    assert {text.split(",")[0] for _, text in warned} == {
        "no response succeeded and there was no feedback"
    }


@pytest.mark.parametrize("name", ["reward/mean", "entropy/student", "response_length/mean"])
def test_a_collapse_is_told_once(name):
    rows = [GOOD] * 30 + [GOOD | {name: GOOD[name] / 10}] * 30
    ((step, text),) = warned_steps(rows)
    assert 31 <= step <= 45
    assert "may be a collapse" in text


def test_rewards_below_zero_are_no_collapse():
    assert warned_steps([GOOD | {"reward/mean": -1.0}] * 50) == []


def test_a_row_of_an_evaluation_is_no_step():
    assert warned_steps([{"eval/avg@16": 0.5}] * 10) == []
