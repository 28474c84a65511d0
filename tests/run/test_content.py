"""What decides a run but stands in no field is compared when the run goes on."""

import json
import shutil

import jax
import pytest
import yaml
from test_train import TINY, code

from pgpo_jax import config, hf, train
from pgpo_jax.errors import InputError
from pgpo_jax.run.content import check_content
from pgpo_jax.tasks import addition

REWARD = "def reward(prompts, completions, **columns):\n    return [0.5 for _ in prompts]\n"


def write(folder, **changes):
    """A run on a checkpoint, a data set and a reward function of the user's."""
    section = hf.ModelSection(**TINY["model"])
    if not (folder / "model").exists():
        graphdef, params, *_ = hf.from_section(section, None, jax.random.key(0))
        hf.save(folder / "model", graphdef, params, addition.make_tokenizer())
        lines = [{"prompt": f"{i:05d}+00000", "answer": str(i)} for i in range(8)]
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "rewards_of_content.py").write_text(REWARD)
    settings = {
        **TINY,
        "steps": 1,
        "output_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "task": {
            "name": "dataset",
            "path": str(folder / "questions.jsonl"),
            "reward": "rewards_of_content:reward",
        },
        "warm_start": {},
        "evaluation": {"every": 0},
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "run.yaml")


def change_a_question(folder):
    path = folder / "questions.jsonl"
    path.write_text(path.read_text().replace("00003", "00013", 1))


def change_the_template(folder):
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "x": 1}))


def change_the_weights(folder):
    section = hf.ModelSection(**TINY["model"])
    graphdef, params, *_ = hf.from_section(section, None, jax.random.key(1))
    shutil.rmtree(folder / "model")
    hf.save(folder / "model", graphdef, params, addition.make_tokenizer())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_whose_data_or_model_changed_goes_on_only_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    assert code(train.main, write(tmp_path)) == 0
    kept = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for change, line in (
        (change_a_question, r"task: got other training questions (digest "),
        (change_the_template, "model.path: got another tokenizer (digest "),
        (change_the_weights, "model.path: got other weights (digest "),
    ):
        change(tmp_path)
        capsys.readouterr()
        assert code(train.main, write(tmp_path, steps=2)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {line}")
        assert error.count("\n") == 1
        assert "(--checkpoint.accept_changes true goes on all the same)" in error
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == kept["metrics.jsonl"]
        if change is change_the_weights:
            accepted = write(tmp_path, steps=2, checkpoint={"accept_changes": True})
            assert code(train.main, accepted) == 0
            said = capsys.readouterr().out
            assert "(changed: " in said
            assert "model.path has other weights" in said
            assert code(train.main, accepted, "--steps", "3") == 0  # it is the run's content now
            assert "other weights" not in capsys.readouterr().out
        for path in tmp_path.glob("*.jsonl"):
            path.write_bytes(kept[path.name])
        if (tmp_path / "model").exists() and change is not change_the_weights:
            for path in (tmp_path / "model").iterdir():
                path.write_bytes(kept[path.name])


def test_a_changed_reward_function_is_named():
    before = {"train": "1", "reward": "2"}
    with pytest.raises(InputError, match=r"task\.reward: got a file with another text .* \(2\)"):
        check_content(before, {"train": "1", "reward": "3"}, config.Config())


def test_a_checkpoint_that_keeps_no_content_is_gone_on_from():
    assert check_content({}, {"train": "1", "model/weights": "2"}, config.Config()) == []
