"""The run as a user sees it: files, resume, signals, mistakes."""

import json
import os
import re
import signal

import jax
import numpy as np
import pytest
import yaml

from pgpo_jax import config, evaluate, hf, train
from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.errors import command
from pgpo_jax.run import setup
from pgpo_jax.tasks import addition

ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
TINY = {
    "steps": 4,
    "model": {"architecture": ARCHITECTURE, "dtype": "float32"},
    # A model that knows nothing yet: every answer counts as a success and may be shown.
    "reprompt": {"threshold": 0.0},
    "data": {"questions_per_step": 4, "max_prompt_length": 19},
    "warm_start": {"steps": 2, "examples_per_step": 8},
    "sampling": {"num_samples": 2, "max_response_length": 7},
    "distillation": {"top_k": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    "evaluation": {"every": 2, "questions": 4, "preflight_questions": 2},
    "mesh": {"data": 1},
}


@pytest.fixture
def write(tmp_path):
    """A configuration file, TINY with changes, whose run goes to its own folder."""

    def write(name="run", **changes):
        sections = {**TINY, "output_dir": str(tmp_path / name)}
        for field, value in changes.items():
            old = sections.get(field)
            sections[field] = {**old, **value} if isinstance(old, dict) else value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(sections))
        return str(path)

    return write


def code(main, *arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        command(main, arguments)
    return int(stop.value.code or 0)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(row):
    return {
        name: value
        for name, value in row.items()
        if not name.startswith(("time/", "tokens_per_second/")) and name != "compilations"
    }


def test_a_run_leaves_the_files_and_metrics_that_scripts_rely_on(write, tmp_path, capsys):
    assert code(train.main, write()) == 0
    folder = tmp_path / "run"
    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 2, 3, 4, 4]
    seen = set().union(*metrics)
    assert seen >= {
        *("loss", "information", "multiplier", "reward/mean", "context_fraction", "lr"),
        *("success_group_fraction", "grad_norm", "update_norm", "entropy/student"),
        *("entropy/teacher", "response_length/mean", "time/rollout", "time/train"),
        *("eval/avg@16", "eval/pass@16", "eval/maj@16", "eval/format"),
        *("preflight/plain", "preflight/with_demonstration"),
    }
    steps = [row for row in metrics if "loss" in row]
    assert steps[0]["lr"] == 0
    assert steps[1]["lr"] == pytest.approx(5e-4)
    assert steps[0]["compilations"] > 0
    assert steps[3]["compilations"] == steps[2]["compilations"]  # nothing new in the last step
    samples = rows(folder / "samples.jsonl")
    assert {"prompt", "response", "reward", "teacher_prompt", "step"} <= set(samples[0])
    for step in steps:  # all responses are written, so that the metric is that of the samples
        mine = [row for row in samples if row["step"] == step["step"] and row["has_context"]]
        average = np.mean([np.mean(row["divergence"]) for row in mine])
        assert average == pytest.approx(step["divergence"], rel=5e-3)  # three digits are written
        assert average > 0 or step["divergence"] == 0
    for row in samples:
        assert len(row["tokens"]) == len(row["divergence"]) <= 7
        shown = [token for token in row["tokens"] if token not in ("<pad>", "<end>")]
        assert "".join(shown) == row["response"]
    assert config.load(str(folder / "config.yaml")).sampling.num_samples == 2
    screen = capsys.readouterr().out
    assert "pre-flight" in screen
    assert "held-out answers at step 4" in screen
    assert "done at step 4" in screen


def test_without_samples_no_token_is_measured(write, tmp_path):
    arguments = (write(steps=1, evaluation={"every": 0}), "--metrics.samples_per_step", "0")
    assert code(train.main, *arguments) == 0
    assert (tmp_path / "run" / "samples.jsonl").read_text() == ""
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert "token_divergence" not in row


def test_a_resumed_run_is_the_run_without_an_interruption(write, tmp_path):
    assert code(train.main, write("whole")) == 0
    assert code(train.main, write("halves", steps=2)) == 0
    assert code(train.main, write("halves", steps=4)) == 0
    whole, halves = (rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves"))
    assert list(map(without_time, halves)) == list(map(without_time, whole))
    students = []
    for name in ("whole", "halves"):
        loaded = setup.load_run(config.load(str(tmp_path / name / "config.yaml")))
        with Checkpoints(str(tmp_path / name / "checkpoints"), read_only=True) as checkpoints:
            step, student = checkpoints.restore_student(loaded.params)
        assert step == 4
        students.append(jax.device_get(student))
    jax.tree.map(np.testing.assert_array_equal, *students)


def test_fewer_steps_than_were_done_is_said_and_changes_nothing(write, tmp_path, capsys):
    assert code(train.main, write(steps=3, evaluation={"every": 0})) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.jsonl")}
    capsys.readouterr()
    assert code(train.main, write(steps=1, evaluation={"every": 0})) == 0
    said = capsys.readouterr().out
    assert "steps = 1 lies before step 3, which the run has reached: no update is left" in said
    assert "done at step 3" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.jsonl")} == before


def test_another_run_in_the_same_folder_is_refused_and_nothing_is_lost(write, tmp_path, capsys):
    assert code(train.main, write(steps=1, evaluation={"every": 0})) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert code(train.main, write(evaluation={"every": 0}), "--optimizer.alpha", "0") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: optimizer.alpha: got 0.0; ")
    assert "holds a run with 1.0: choose another output_dir" in error
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny model saved as a Hugging Face folder."""
    section = hf.ModelSection(architecture=ARCHITECTURE, dtype="float32")
    graphdef, params, *_ = hf.from_section(section, None, jax.random.key(0))
    hf.save(tmp_path / "model", graphdef, params, addition.make_tokenizer())
    return str(tmp_path / "model")


@pytest.fixture
def dataset(tmp_path, checkpoint, monkeypatch):
    """Changes to TINY for a data set of the user's with the user's own reward function."""
    lines = [{"prompt": f"{i:05d}+00000", "answer": str(i)} for i in range(8)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def changes(reward):
        name = f"rewards_{abs(hash(reward))}"
        (tmp_path / f"{name}.py").write_text("import os, signal\nseen = []\n" + reward)
        return {
            "model": {"path": checkpoint, "architecture": None},
            "task": {"name": "dataset", "path": str(path), "reward": f"{name}:reward"},
            "warm_start": {"steps": 0},
            "evaluation": {"every": 0},
        }

    return changes


STOPPING = """
def reward(prompts, completions, answer, **columns):
    seen.append(len(completions))
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(text.startswith(right)) for text, right in zip(completions, answer)]
"""


def test_a_signal_saves_and_the_same_command_goes_on(write, dataset, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    path = write(**dataset(STOPPING))
    assert code(train.main, path) == train.STOPPED == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert code(train.main, path) == 0
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("def reward(prompts, completions, **columns):\n    raise KeyError('x')\n", "KeyError"),
        ("def reward(prompts, completions, **columns):\n    return [1.0]\n", "1"),
        ("def reward(prompts, completions, **columns):\n    return [None] * 8\n", "None"),
    ],
)
def test_a_broken_reward_function_is_one_line_and_exit_code_2(
    reward, message, write, dataset, capsys
):
    assert code(train.main, write(**dataset(reward))) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert "rewards_" in error[0]
    assert message in error[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"architecture": {"model_type": "gpt2"}}}, "gpt2"),
        ({"model": {"architecture": None, "path": "no/such/folder"}}, "no/such/folder"),
        ({"model": {"architecture": None}}, "model.path"),
        ({"task": {"name": "dataset", "path": "none.jsonl", "verifier": "exact"}}, "none.jsonl"),
        ({"data": {"max_prompt_length": 3}}, "data.max_prompt_length"),
        ({"data": {"questions_per_step": 3}, "mesh": {"data": 8}}, "data.questions_per_step"),
        ({"mesh": {"data": 3, "fsdp": 5}}, "mesh"),
        ({"task": {"train_questions": 2}}, "data.questions_per_step"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(changes, message, write, capsys):
    assert code(train.main, write(**changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_the_evaluate_command_scores_the_newest_student(write, tmp_path, capsys):
    path = tmp_path / "far.jsonl"
    lines = [{"prompt": "1" * count, "answer": "1"} for count in (3, 19, 11)]
    path.write_text("\n".join(map(json.dumps, lines)))
    far = {"label": "far", "name": "dataset", "path": str(path), "test_path": str(path)}
    also = [{**far, "verifier": "exact"}]
    assert code(train.main, write(steps=1, evaluation={"also": also})) == 0
    last = rows(tmp_path / "run" / "metrics.jsonl")[-1]
    (_, asked) = rows(tmp_path / "run" / "evaluations.jsonl")
    assert (len(asked["rewards"]), len(asked["also"]["far"])) == (4, 2)
    counts = [last[f"eval/{name}"] for name in ("questions", "far/questions", "far/left_out")]
    assert counts == [4, 2, 1]
    assert rows(tmp_path / "run" / "metrics.jsonl")[-2]["data/left_out"] == 0
    said = capsys.readouterr().out
    assert "warning: 1 of 3 held-out questions of far are left out: their prompts have more" in said
    assert "addition: 1,000,000 questions, 256 held out + 2 of far (train " in said
    over = "1 of 3 held-out questions of far are left out as over-long: averages are over 2"
    assert f"warning: step 1: {over}" in said
    assert re.search(r"step 1: avg@16 .* far avg@16 ", said)
    assert code(evaluate.main, str(tmp_path / "run" / "config.yaml")) == 0
    *before, result = capsys.readouterr().out.splitlines()
    assert before == [f"warning: {over}"]
    printed = json.loads(result)
    own = {name for name in printed if name.startswith("eval/far/")}
    assert own >= {"eval/far/avg@16", "eval/far/pass@16", "eval/far/format"}
    assert {name: last[name] for name in own} == {name: printed[name] for name in own}
    assert printed["step"] == 1
    assert printed["eval/avg@16"] == last["eval/avg@16"]
    assert os.path.exists(tmp_path / "run" / "checkpoints")
