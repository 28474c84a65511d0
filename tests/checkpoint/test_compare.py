"""Two runs side by side: equal bit by bit, or what differs first."""

import pytest
import yaml
from test_train import TINY, code

from pgpo_jax import checkpoint, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in one piece, the same run in two, and one with another seed."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, **changes):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**TINY, **changes, "output_dir": str(folder / name)}))
        assert code(train.main, str(path)) == 0
        return folder / name

    run("pieces", steps=2)
    return {
        "whole": run("whole"),
        "pieces": run("pieces"),
        "other": run("other", seed=1),
    }


def compare(capsys, *names) -> tuple[int, str]:
    capsys.readouterr()
    exit_code = code(checkpoint.main, "compare", *map(str, names))
    output = capsys.readouterr()
    return exit_code, (output.out + output.err).strip()


def test_a_run_that_was_interrupted_equals_one_that_was_not(runs, capsys):
    assert compare(capsys, runs["whole"], runs["pieces"]) == (0, "equal")


def test_the_first_array_that_differs_is_named(runs, capsys):
    exit_code, line = compare(capsys, runs["whole"], runs["other"])
    assert exit_code == 1
    assert line.startswith("student/embed_tokens differs in ")


def test_a_line_that_differs_is_named(runs, capsys):
    metrics = runs["pieces"] / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.write_text(kept.replace('"loss": ', '"loss": 1', 1))
    try:
        exit_code, line = compare(capsys, runs["whole"], runs["pieces"])
    finally:
        metrics.write_text(kept)
    assert exit_code == 1
    assert line.startswith("metrics.jsonl differs in line ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "RUN_A: got none; give a run's folder (its output_dir): python -m pgpo_jax.checkpoint",
        ),
        (("nowhere",), "RUN_B: got none; give another"),
        (("nowhere", "elsewhere"), "nowhere is no run"),
        (("one", "two", "three"), "three: not expected"),
    ],
)
def test_what_is_not_two_runs_is_one_line(arguments, message, capsys):
    exit_code, line = compare(capsys, *arguments)
    assert exit_code == 2
    assert message in line
    assert "\n" not in line
