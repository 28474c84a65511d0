"""Runs in which something goes wrong with the numbers, through the command: what is skipped and
counted, what ends a run and how it goes on, and batches of an odd shape."""

import math

import pytest
from test_train import TINY, checkpoint, code, dataset, rows, without_time, write  # noqa: F401

from pgpo_jax import config, train
from pgpo_jax.checkpoint import Checkpoints

SHORT = {"warm_start": {"steps": 0}, "evaluation": {"every": 0}}
# Token 15 ends a response, and is padding to the sampler.
CUT_OFF = {"sampling": {"end_tokens": [15], "vocab_size": 15, "max_response_length": 3}}


def steps(folder):
    return [row for row in rows(folder / "metrics.jsonl") if "loss" in row]


def saved_step(folder):
    with Checkpoints(str(folder / "checkpoints"), read_only=True) as checkpoints:
        return checkpoints.latest_step()


def test_broken_updates_are_skipped_and_counted_and_so_many_save_and_end_the_run(
    write,  # noqa: F811
    tmp_path,
    capsys,
):
    # The first update makes the weights of the norms infinite, so no number is finite after it.
    path = write(
        steps=9,
        optimizer={
            "learning_rate": 1e38,
            "weight_decay": 1e3,
            "warmup_steps": 0,
            "max_grad_norm": None,
        },
        **SHORT,
    )
    assert code(train.main, path, "--alarms.most_broken", "2") == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ended at step 3: 2 updates in a row were skipped, because loss")
    assert "lower optimizer.learning_rate" in line
    assert "warning: step 2: loss, information or gradient is not finite" in captured.out
    found = steps(tmp_path / "run")
    assert [row["skipped"] for row in found] == [0, 1, 1]
    assert [row["skipped/total"] for row in found] == [0, 1, 2]
    alarms = [row.get("alarm", "") for row in found]  # a model of NaN also runs on
    assert ["not_finite" in alarm for alarm in alarms] == [False, True, True]
    assert saved_step(tmp_path / "run") == 3
    # The same command goes on, and gets as many tries again.
    assert code(train.main, path, "--alarms.most_broken", "2") == 1
    assert [row["skipped/total"] for row in steps(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert saved_step(tmp_path / "run") == 5


def test_a_run_in_which_nothing_succeeds_ends_when_that_was_asked_for(
    write,  # noqa: F811
    tmp_path,
    capsys,
):
    path = write(steps=9, reprompt={"threshold": 1.0}, alarms={"most_inactive": 3}, **SHORT)
    assert code(train.main, path) == 1
    assert "ended at step 3: 3 updates in a row were skipped, because no response succeeded" in (
        capsys.readouterr().err
    )
    found = steps(tmp_path / "run")
    assert [row["skipped/total"] for row in found] == [1, 2, 3]
    assert not any("multiplier" in row for row in found)  # none was applied
    assert [row["alarm"] for row in found if "alarm" in row] == ["inactive, cut_off"]
    assert saved_step(tmp_path / "run") == 3


def test_an_alarm_in_stop_on_saves_evaluates_and_ends_the_run_and_it_can_go_on(
    write,  # noqa: F811
    tmp_path,
    capsys,
):
    changes = {"alarms": {"stop_on": ["cut_off"]}, "evaluation": {"every": 50}}
    path = write(steps=5, **{**SHORT, **CUT_OFF, **changes})
    assert code(train.main, path) == 0
    captured = capsys.readouterr()
    assert "ended at step 3: the alarm cut_off fired, which alarms.stop_on names" in captured.out
    assert "error" not in captured.err
    found = rows(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row.get("alarm")) for row in found] == [
        *((0, None), (1, None), (2, None), (3, "cut_off"), (3, None))
    ]
    assert "eval/avg@16" in found[-1]
    assert saved_step(tmp_path / "run") == 3
    # Again: it has ended. Without the alarm in stop_on: it goes on.
    assert code(train.main, path) == 0
    assert rows(tmp_path / "run" / "metrics.jsonl") == found
    assert code(train.main, path, "--alarms.stop_on", "[]") == 0
    assert [row["step"] for row in steps(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert config.load(str(tmp_path / "run" / "config.yaml")).alarms.stop_on == ()


def test_a_resumed_run_warns_as_one_that_never_stopped(write, tmp_path):  # noqa: F811
    changes = {**SHORT, **CUT_OFF}
    assert code(train.main, write("whole", steps=4, **changes)) == 0
    for last in (1, 2, 4):
        assert code(train.main, write("parts", steps=last, **changes)) == 0
    whole, parts = (list(map(without_time, steps(tmp_path / name))) for name in ("whole", "parts"))
    assert parts == whole
    assert [row.get("alarm") for row in whole] == [None, None, "cut_off", None]
    assert all(math.isfinite(row["information/running_mean"]) for row in whole)


ALL_RIGHT = "def reward(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"sampling": {"vocab_size": 1}},
            {"entropy/student": 0.0, "information": 0.0, "identical_group_fraction": 1.0},
        ),
        ({"sampling": {"end_tokens": [*range(16)]}}, {"response_length/mean": 1.0}),
        (CUT_OFF, {"response_length/clip_fraction": 1.0}),
        (ALL_RIGHT, {"success_fraction": 1.0, "context_fraction": 1.0, "reward/mean": 1.0}),
    ],
    ids=["one token", "empty responses", "all cut off", "all succeed"],
)
def test_odd_batches_train_with_finite_numbers(changes, expected, write, dataset, tmp_path):  # noqa: F811
    changes = dataset(changes) if isinstance(changes, str) else changes
    optimizer = {"warmup_steps": 0}
    assert code(train.main, write(steps=2, optimizer=optimizer, **{**SHORT, **changes})) == 0
    for row in steps(tmp_path / "run"):
        assert row["skipped"] == 0
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        numbers = [value for name, value in row.items() if name != "alarm"]
        assert all(math.isfinite(value) for value in numbers)


def test_one_sample_is_warned_of_and_success_without_a_sibling_is_no_failure(
    write,  # noqa: F811
    dataset,  # noqa: F811
    tmp_path,
    capsys,
):
    changes = {**SHORT, **dataset(ALL_RIGHT), "sampling": {"num_samples": 1}}
    path = write(steps=4, alarms={"most_inactive": 2}, **changes)
    assert code(train.main, path) == 0
    assert "warning: sampling.num_samples = 1: no response has a sibling" in capsys.readouterr().out
    found = steps(tmp_path / "run")
    assert [row["skipped"] for row in found] == [1] * 4
    assert found[2]["alarm"].startswith("solved")
