"""The quickstart learns, and learns from the demonstrations: both controls fail as they should."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def run(folder, *overrides) -> list[dict]:
    # In a process of its own, as a user has it: with the compiler's optimization.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "pgpo_jax.train", str(QUICKSTART), "--output_dir", str(folder)]
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "eval/avg@16" in row]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The quickstart's warm start alone: its run folder and its evaluation."""
    folder = tmp_path_factory.mktemp("warm")
    (row,) = run(folder, "--steps", "0")
    return folder, row


@pytest.fixture
def after(warm, tmp_path):
    """The change of avg@16 that 60 updates bring, from the common warm start."""

    def after(*overrides):
        shutil.copytree(warm[0] / "checkpoints", tmp_path / "checkpoints")
        rows = run(tmp_path, "--steps", "60", "--evaluation.every", "60", *overrides)
        return rows[-1]["eval/avg@16"] - warm[1]["eval/avg@16"]

    return after


@pytest.mark.slow
def test_the_warm_start_can_use_a_demonstration_and_little_else(warm):
    _, row = warm
    assert row["eval/avg@16"] < 0.4
    assert row["preflight/with_demonstration"] > row["preflight/plain"] + 0.4


@pytest.mark.slow
def test_pgpo_raises_held_out_accuracy_by_40_points(after):
    assert after() > 0.4


@pytest.mark.slow
def test_without_a_demonstration_nothing_is_learned(after):
    assert abs(after("--reprompt.demonstration", "none")) < 0.1


@pytest.mark.slow
def test_another_questions_demonstration_destroys_the_model(after):
    assert after("--reprompt.demonstration", "other") < -0.05
