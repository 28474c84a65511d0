"""The examples run, are short, and the launch files are valid."""

import ast
import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from pgpo_jax import __main__ as commands
from pgpo_jax.command import parse
from pgpo_jax.train import COMMAND

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "examples/quickstart.ipynb"
SHORT = (
    "--steps 1 --warm_start.steps 1 --evaluation.every 0 --evaluation.preflight_questions 0 "
    "--data.questions_per_step 2"
)


def cells():
    """The code of the notebook's cells, commands as calls of ours; what installs is left out."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "!pip" not in source:
            yield re.sub(r"^!pgpo-jax (.+)$", r"command('\1')", source, flags=re.M)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert f"python examples/{path.name}" in text or f"&& python {path.name}" in text


def test_there_is_an_example_for_each_reader():
    assert {path.stem for path in EXAMPLES} == {
        *("custom_reward", "custom_task", "flax_nnx", "linen", "optax_only", "trl_dataset")
    }


@pytest.mark.parametrize("name", ["optax_only", "flax_nnx", "linen"])
def test_a_training_loop_of_ones_own_learns(name, capsys):
    runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_task_of_ones_own_judges_with_feedback(capsys):
    runpy.run_path(str(ROOT / "examples/custom_task.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert "6 questions, 2 held out" in told
    assert "pmal: reward 1.00" in told
    assert "plam: reward 0.50 2 of 4 letters are in their place." in told


def test_trls_rows_and_reward_are_used_as_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = runpy.run_path(str(ROOT / "examples/trl_dataset.py"))
    example["main"](str(tmp_path))
    told = capsys.readouterr().out
    assert "58 questions, 6 held out" in told
    assert re.search(r"'It is \d+': reward 1\n'I do not know': reward 0", told)
    words = shlex.split(told.partition("pgpo-jax train")[2].replace("\\\n", " "))
    assert parse(COMMAND, words).fields["task.reward"] == "trl_dataset:right"


def test_the_reward_of_ones_own_scores_digits():
    digits = runpy.run_path(str(ROOT / "examples/custom_reward.py"))["digits"]
    assert digits(["1+1="] * 3, ["445170", "445160", ""], ["445170"] * 3) == [1, 5 / 6, 0]
    assert digits([[]], [[{"role": "assistant", "content": "12"}]], ["12"]) == [1]


@pytest.mark.slow
def test_the_reward_of_ones_own_trains(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    main = runpy.run_path(str(ROOT / "examples/custom_reward.py"))["main"]
    assert main([*SHORT.split(), "--output_dir", str(tmp_path / "run")]) == 0
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(rows[-1])["reward/mean"] < 1


def test_the_notebook_is_empty_and_its_commands_and_code_are_valid():
    notebook = json.loads(NOTEBOOK.read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    for cell in cells():
        ast.parse(cell)
        for line in re.findall(r"command\('train (.+)'\)", cell):
            parse(COMMAND, shlex.split(line))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def command(line):
        words = shlex.split(line) + (SHORT.split() if line.startswith("train") else [])
        assert not commands.run(words)

    space = {"command": command}
    for cell in cells():
        exec(compile(cell, NOTEBOOK.name, "exec"), space)
    assert (tmp_path / "report.html").exists()
    space["pyplot"].close("all")


# ---- launch files --------------------------------------------------------------------------------

LAUNCH = ROOT / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_a_launch_file_is_yaml_that_trains(path):
    (content,) = yaml.safe_load_all(path.read_text())
    assert isinstance(content, dict)
    assert "pgpo-jax train" in path.read_text()


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch"])
def test_a_launch_script_is_valid_shell(name):  # shellcheck is run in .ci/run
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    assert "set -euo pipefail" in (LAUNCH / name).read_text()


def test_every_launch_file_says_who_ran_it():
    for path in LAUNCH.iterdir():
        assert re.search(r"(not )?(built|run) by (us|nobody)", path.read_text(), re.I), path.name
