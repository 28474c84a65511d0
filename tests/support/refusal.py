"""How the tables of bad inputs are driven: the commands, a tiny run, and the line that is expected.

In an expected line FOLDER is the test's folder, and `...` any text, where another library says what
is wrong.
"""

import re
from pathlib import Path

import pytest
import yaml

from pgpo_jax import convert, discover, evaluate, plan, report, train
from pgpo_jax.errors import command

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
    "steps": 1,
    "output_dir": "run",
    "model": {"architecture": ARCHITECTURE, "dtype": "float32"},
    "data": {"questions_per_step": 4, "max_prompt_length": 19},
    "sampling": {"num_samples": 2, "max_response_length": 2},
    "evaluation": {"every": 0},
    "mesh": {"data": 1},
}
COMMANDS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "discover": discover.main,
    "convert": convert.main,
    "plan": plan.main,
    "report": report.main,
}


def assert_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, expected: str, name: str, *arguments: str
) -> None:
    """The command says this one line and exits with 2."""
    with pytest.raises(SystemExit) as stop:
        command(COMMANDS[name], arguments)
    assert_line(capsys.readouterr().err, expected, folder)
    assert stop.value.code == 2


def assert_line(stderr: str, expected: str, folder: Path) -> None:
    """stderr is the expected line and nothing else."""
    pattern = re.escape(f"error: {expected}").replace(re.escape("..."), ".+")
    said = stderr.replace(str(folder), "FOLDER")
    assert re.fullmatch(pattern + "\n", said), said


def write_config(**changes) -> str:
    """TINY with changed fields, as a file."""
    sections = {**TINY}
    for name, value in changes.items():
        old = sections.get(name)
        sections[name] = {**old, **value} if isinstance(old, dict) else value
    Path("run.yaml").write_text(yaml.safe_dump(sections))
    return "run.yaml"


def table(rows: dict) -> pytest.MarkDecorator:
    """What goes in, what is said of it; the rows' names are the tests' ids."""
    return pytest.mark.parametrize(("given", "expected"), rows.values(), ids=rows)
