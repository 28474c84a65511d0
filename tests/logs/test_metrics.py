"""The files a run leaves, what goes to trackers, and what its user reads."""

import itertools
import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from pgpo_jax import fields
from pgpo_jax.errors import InputError
from pgpo_jax.logs import Console, MetricsConfig, Writer

EVERY_LINE = MetricsConfig(log_seconds=0)


def read(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def sample(prompt, reward=1.0, response="42"):
    return {"prompt": prompt, "response": response, "reward": reward, "teacher_prompt": "..."}


def test_a_row_is_on_disk_at_once_with_its_step(tmp_path):
    with Writer(tmp_path, total_steps=2) as writer:
        row = {"loss": jnp.float32(0.5), "reward/mean": np.float64(0.25), "count": np.int32(3)}
        writer.write(1, row)
        assert read(tmp_path / "metrics.jsonl") == [
            {"step": 1, "loss": 0.5, "reward/mean": 0.25, "count": 3}
        ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32(math.nan)])
def test_what_is_not_finite_is_null_and_warnings_follow_their_row(tmp_path, capsys, value):
    with Writer(tmp_path, EVERY_LINE, total_steps=2) as writer:
        writer.write(1, {"loss": 0.5, "information": value}, ["not finite", "flat"])
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "information": None}]
    row, *warnings = capsys.readouterr().out.splitlines()
    assert row.startswith("train 1/2: loss 0.5")
    assert warnings == ["warning: step 1: not finite", "warning: step 1: flat"]


def test_a_resumed_run_drops_later_rows_and_appends(tmp_path):
    with Writer(tmp_path, total_steps=4) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float(step)})
            writer.samples(step, [sample("a"), sample("b")])
            writer.evaluation(step, [0.25, step / 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with Writer(tmp_path, total_steps=4, resume_from=2) as writer:
        writer.write(3, {"loss": 30.0})
        writer.samples(3, [sample("c")])
        writer.evaluation(4, [1.0, 0.0])
    asked = read(tmp_path / "evaluations.jsonl")
    assert [(row["step"], row["rewards"]) for row in asked] == [
        (1, [0.25, 0.25]), (2, [0.25, 0.5]), (4, [1.0, 0.0]),
    ]  # fmt: skip
    rows = read(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    rows = read(tmp_path / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "c"),
    ]  # fmt: skip


def test_resuming_before_any_row_keeps_what_step_zero_measured(tmp_path):
    with Writer(tmp_path, total_steps=4) as writer:
        writer.write(0, {"eval/avg@16": 0.25})
        writer.write(1, {"loss": 1.0})
    with Writer(tmp_path, total_steps=4, resume_from=0):
        pass
    assert read(tmp_path / "metrics.jsonl") == [{"step": 0, "eval/avg@16": 0.25}]


def test_a_new_run_starts_its_files_anew(tmp_path):
    for _ in range(2):
        with Writer(tmp_path, total_steps=1) as writer:
            writer.write(1, {"loss": 1.0})
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1]


def test_samples_are_of_different_questions_first(tmp_path):
    with Writer(tmp_path, MetricsConfig(samples_per_step=3), total_steps=1) as writer:
        writer.samples(
            1, [sample("a", 0.0), sample("a", 1.0), sample("b"), sample("b"), sample("c")]
        )
        writer.samples(2, [sample("a", 0.0), sample("a", 1.0), sample("b")])
    rows = read(tmp_path / "samples.jsonl")
    assert [row["prompt"] for row in rows] == ["a", "b", "c", "a", "b", "a"]
    assert rows[0] == {"step": 1, **sample("a", 0.0)}


def test_more_is_asked_for_those_samples_that_are_written(tmp_path):
    asked = []

    def more(number):
        asked.append(number)
        return {"tokens": [str(number)]}

    with Writer(tmp_path, MetricsConfig(samples_per_step=2), total_steps=1) as writer:
        writer.samples(1, [sample("a"), sample("a"), sample("b")], more)
    rows = read(tmp_path / "samples.jsonl")
    assert [(row["prompt"], row["tokens"]) for row in rows] == [("a", ["0"]), ("b", ["2"])]
    assert asked == [0, 2]


def test_any_text_can_be_a_sample(tmp_path):
    text = 'quote " newline \n line separator \u2028 Greek \u03c1 lone surrogate \ud800'
    with Writer(tmp_path, total_steps=1) as writer:
        writer.samples(1, [sample(text)])
    (row,) = read(tmp_path / "samples.jsonl")
    assert row["prompt"] == text.replace("\ud800", "?")


def test_an_inactive_writer_writes_and_says_nothing(tmp_path, capsys):
    folder = tmp_path / "other_host"
    with Writer(folder, total_steps=1, active=False) as writer:
        writer.write(1, {"loss": math.nan}, ["not finite"])
        writer.samples(1, [sample("a")])
        writer.progress("train", 1, 1)
        writer.table("title", [{"question": "a"}])
        writer.warn("text")
    assert not folder.exists()
    assert capsys.readouterr().out == ""


def test_without_a_terminal_progress_is_plain_lines_with_the_time_left(tmp_path, capsys):
    with Writer(tmp_path, EVERY_LINE, total_steps=3) as writer:
        writer.write(0, {"eval/avg@16": 0.25})
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5, "information": 0.25, "multiplier": 1.28})
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "step 0: avg@16 25.0%"
    assert lines[0] == "train 1/3: loss 0.5000 information 0.250 multiplier 1.28"
    assert lines[1].startswith("train 2/3: loss")
    assert lines[1].endswith("s a step, 0:00:00 left")
    assert lines[2] == "train 3/3: loss 0.5000 information 0.250 multiplier 1.28"


def test_lines_come_every_so_often_and_at_the_end(tmp_path, capsys):
    with Writer(tmp_path, MetricsConfig(log_seconds=3600), total_steps=9) as writer:
        for step in range(1, 10):
            writer.write(step, {"loss": 0.5})
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "train 1/9",
        "train 9/9",
    ]


def test_a_terminal_gets_a_bar_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Writer(tmp_path, MetricsConfig(samples_shown_every=1), total_steps=2) as writer:
        writer.progress("warm start", 5, 10, {"loss": 0.5})
        for step in (1, 2):
            for done in (0, 2, 4):  # a bar that comes and goes
                writer.progress("evaluation", done, 4)
            writer.begin("train", step - 1, 2)
            writer.write(step, {"loss": 0.25})
            writer.samples(step, [sample(f"[red]{step}+1="), sample("7+1=", 0.0)])
        writer.warn("rewards are flat")
    out = capsys.readouterr().out
    for text in ("warm start", "train", "2/2", "loss 0.2500", "[red]1+1=", "warning: rewards"):
        assert text in out


def test_a_table_without_a_terminal_is_plain_lines(tmp_path, capsys):
    with Writer(tmp_path, total_steps=2) as writer:
        writer.table("answers", [{"question": "1+1=", "before": "3\n", "after": 2.0}])
        writer.table("nothing", [])
    assert capsys.readouterr().out == "answers (question | before | after)\n  1+1= | 3 | 2\n"


def test_samples_are_shown_now_and_then(tmp_path, capsys):
    config = MetricsConfig(samples_shown=1, samples_shown_every=2)
    with Writer(tmp_path, config, total_steps=4) as writer:
        for step in (1, 2, 3):
            writer.samples(step, [sample("x" * 1000), sample("b")])
    title, line = capsys.readouterr().out.splitlines()
    assert title == "samples of step 2 (prompt | response | reward)"
    assert line.endswith("| 42 | 1")
    assert len(line) < 400
    assert " ... " in line


def fake_modules(calls):
    """Stand-ins for the trackers' packages, which take an account or a server."""

    def record(name):
        def call(*args, **named):
            calls.append((name, args, named))
            return session

        return call

    session = types.SimpleNamespace(
        log=record("log"), finish=record("finish"), add_scalar=record("log"), close=record("finish")
    )
    module = types.ModuleType("tracker")
    vars(module).update(
        init=record("init"),
        SummaryWriter=record("init"),
        log=record("log"),
        finish=record("finish"),
    )
    return module


@pytest.mark.parametrize(
    ("tracker", "module"),
    [("wandb", "wandb"), ("tensorboard", "tensorboardX"), ("trackio", "trackio")],
)
def test_a_tracker_gets_the_finite_numbers(tmp_path, monkeypatch, tracker, module):
    calls = []
    monkeypatch.setitem(sys.modules, module, fake_modules(calls))
    config = MetricsConfig(trackers=(tracker, tracker))
    with Writer(tmp_path, config, total_steps=1, run_config={"seed": 0}) as writer:
        writer.write(1, {"loss": 0.5, "information": math.nan, "note": "text"})
    assert [name for name, _, _ in calls] == ["init", "log", "finish"]
    _, args, named = calls[1]
    if tracker == "tensorboard":
        assert args == ("loss", 0.5, 1)
    else:
        assert args == ({"loss": 0.5},)
        assert named == {"step": 1}


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_resumed_run_is_one_run_for_a_tracker_and_sends_no_step_twice(
    tmp_path, monkeypatch, tracker
):
    calls = []
    monkeypatch.setitem(sys.modules, tracker, fake_modules(calls))
    config = MetricsConfig(trackers=(tracker,))

    def run(folder, first, last, resume_from):
        calls.clear()
        with Writer(folder, config, total_steps=9, resume_from=resume_from) as writer:
            for step in range(first, last + 1):
                writer.write(step, {"loss": 0.5})
        (_, _, told), *logged = calls
        steps = [named["step"] for name, _, named in logged if name == "log"]
        return told.get("id", told["name"]), told["name"], told["resume"], steps

    identity, name, resume, steps = run(tmp_path / "run", 1, 3, None)
    assert name.startswith("run")
    assert (resume, steps) == ("never", [1, 2, 3])
    (tmp_path / "run").rename(tmp_path / "kept")
    assert run(tmp_path / "kept", 2, 5, 1) == (identity, name, "allow", [4, 5])
    assert run(tmp_path / "kept", 6, 6, 5) == (identity, name, "allow", [6])
    other, _, resume, steps = run(tmp_path / "kept", 1, 1, None)  # anew
    assert (resume, steps) == ("never", [1])
    assert other != identity
    (tmp_path / "kept" / "trackers.json").unlink()  # a run of an earlier version
    other, _, resume, steps = run(tmp_path / "kept", 1, 1, 1)
    assert (resume, steps) == ("allow", [1])


def test_a_run_has_one_identity_for_all_its_trackers_and_keeps_it(tmp_path, monkeypatch):
    config, seen = MetricsConfig(trackers=("wandb", "trackio")), []
    for resume_from in (None, 1):
        calls = []
        for module in config.trackers:
            monkeypatch.setitem(sys.modules, module, fake_modules(calls))
        with Writer(tmp_path, config, total_steps=2, resume_from=resume_from) as writer:
            writer.write(1, {"loss": 0.5})
        wandb, trackio = (named for name, _, named in calls if name == "init")
        assert trackio["name"] == f"{wandb['name']}-{wandb['id']}"
        seen.append(wandb["id"])
    assert seen[0] == seen[1]


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="the dev extra brings it")
    with Writer(tmp_path, MetricsConfig(trackers=("tensorboard",)), total_steps=1) as writer:
        writer.write(1, {"loss": 0.5})
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_missing_tracker_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Writer(tmp_path, total_steps=1) as writer:
        writer.write(1, {"loss": 0.5})
    with pytest.raises(InputError, match=r"metrics\.trackers: got wandb, .* pip install"):
        Writer(tmp_path, MetricsConfig(trackers=("wandb",)), total_steps=1)
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_an_output_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir: .* cannot be written"):
        Writer(tmp_path / "file", total_steps=1)
    with pytest.raises(InputError, match=r"output_dir: got gs://bucket/run; .* a local folder"):
        Writer("gs://bucket/run", total_steps=1)


def test_the_section_is_read_from_yaml():
    config = fields.decode(MetricsConfig, {"trackers": ["wandb", "trackio"], "log_seconds": 1})
    assert config == MetricsConfig(trackers=("wandb", "trackio"), log_seconds=1.0)
    with pytest.raises(InputError, match=r"metrics\.samples_shown: got -1"):
        MetricsConfig(samples_shown=-1)


# ---- progress in a log ---------------------------------------------------------------------------


@pytest.fixture
def log(capsys):
    """A console whose clock stands still, and `log(seconds)`: its lines so many seconds later."""
    now = [0.0]
    with Console(10.0, clock=lambda: now[0]) as console:

        def after(seconds):
            now[0] += seconds
            console.beat()
            return capsys.readouterr().out.splitlines()

        yield console, after


def test_a_log_hears_of_a_long_step_within_half_a_minute_and_then_every_minute(log):
    console, after = log
    console.begin("warm start", 0, 8)
    assert after(20) == []
    assert after(9) == ["warm start 0/8: 0:00:29 in the next"]
    assert after(30) == []
    assert after(29) == ["warm start 0/8: 0:01:28 in the next"]
    console.progress("warm start", 1, 8, {"loss": 2.0})  # the first may compile
    assert after(40) == []
    console.progress("warm start", 2, 8, {"loss": 1.5})
    assert after(0) == ["warm start 2/8: loss 1.5000, 40 s a step, 0:04:00 left"]
    assert after(59) == ["warm start 2/8: 0:00:59 in the next, 40 s a step, 0:03:01 left"]
    console.progress("warm start", 8, 8, {"loss": 1.0})
    assert after(0) == ["warm start 8/8: loss 1.0000"]
    assert after(300) == []  # nothing goes on


def test_a_short_evaluation_is_not_heard_of_and_a_long_one_says_how_far_it_is(log):
    console, after = log
    console.begin("train", 3, 9)
    for done in (0, 64, 128):
        console.progress("evaluation", done, 128)
        assert after(4) == []
    for done in (0, 64, 128, 192):
        console.progress("evaluation", done, 192)
        after(8)
    for done in (0, 64):
        console.progress("evaluation", done, 192)
        assert after(20) == (["evaluation 64/192: 0:00:40 left"] if done else [])
    console.progress("evaluation", 192, 192)
    assert after(61) == ["train 3/9: 0:02:25 in the next"]  # which the evaluation was part of


def test_lines_of_others_and_a_longer_pause_that_was_asked_for_are_enough(log, capsys):
    console, after = log
    console.begin("train", 0, 9)
    after(24)
    console.say("something else")
    assert after(20) == ["something else"]
    with Console(3600.0, clock=itertools.count(0.0, 1000.0).__next__) as quiet:
        quiet.begin("train", 0, 9)
        quiet.beat()
    assert capsys.readouterr().out == ""


def test_the_line_of_an_evaluation_names_the_metric_that_was_asked_for_and_every_set(
    tmp_path, capsys
):
    with Writer(tmp_path, EVERY_LINE, total_steps=3) as writer:
        row = {"eval/avg@4": 0.25, "eval/avg@4/low": 0.1, "eval/pass@4": 0.5, "eval/format": 1.0}
        writer.write(0, {**row, "eval/far/avg@4": 0.125, "eval/far/avg@4/low": 0.0})
        writer.evaluation(0, [0.25], {"far": [0.0, 0.25]})
        writer.write(0, {"warm_start/left_out": 3.0}, ["3 left out"])
    assert capsys.readouterr().out.splitlines() == [
        "step 0: avg@4 25.0% pass@4 50.0% well-formed 100% far avg@4 12.5%",
        "warning: step 0: 3 left out",
    ]
    (asked,) = read(tmp_path / "evaluations.jsonl")
    assert asked == {"step": 0, "rewards": [0.25], "also": {"far": [0.0, 0.25]}}
