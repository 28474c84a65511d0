"""Configurations: files, overrides, and one clear line for every mistake."""

import pathlib
import re
from typing import get_args, get_origin

import pytest

from pgpo_jax import config, fields, tasks, train
from pgpo_jax.errors import InputError

CONFIGS = sorted(pathlib.Path(__file__).parent.parent.glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_dumped_configuration_is_the_same_configuration(path, tmp_path):
    loaded = config.load(str(path), ["--seed", "7", "--optimizer.alpha", "0.25"])
    assert (loaded.seed, loaded.optimizer.alpha) == (7, 0.25)
    copy = tmp_path / "config.yaml"
    copy.write_text(config.dump(loaded))
    assert config.load(str(copy)) == loaded


def test_overrides_take_both_forms_and_null():
    overrides = ["--steps=3", "--distillation.top_k", "null", "--mesh.fsdp", "2"]
    loaded = config.load(None, overrides)
    assert (loaded.steps, loaded.distillation.top_k, loaded.mesh.fsdp) == (3, None, 2)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("optimizer: {alpah: 1}", [], "alpah"),
        ("optimizer: {alpha: fast}", [], "optimizer.alpha"),
        ("optimizer: {rho_max: 0.5, rho_min: 1.0}", [], "optimizer.rho_max: got 0.5; must be"),
        ("distillation: {kind: kl}", [], "kind"),
        ("steps: 1.5", [], "steps"),
        ("- a list", [], "must be fields and values"),
        ("a: [", [], "not valid YAML"),
        ("steps: 1", ["--optimizer.alfa", "1"], "did you mean --optimizer.alpha"),
        ("steps: 1", ["--distillation.kind", "kl"], "kind"),
        ("steps: 1", ["--steps", "many"], "steps"),
        ("steps: -1", [], "steps: got -1; must be at least 0"),
        ("steps: 1", ["--steps", "2", "--steps", "3"], "--steps: got 2 and 3; give it once"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(text, overrides, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        config.load(str(path), overrides)
    assert message in str(error.value)


FLOATS = [
    name
    for name, kind in fields.kinds(config.Config).items()
    if float in (kind, *get_args(kind)) and get_origin(kind) is not tuple
]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [".inf", "-.inf"])
def test_no_setting_may_be_infinite(name, value):
    with pytest.raises(InputError, match=rf"^{re.escape(name)}: got -?inf; must be finite"):
        config.load(None, [f"--{name}", value])


def test_nor_may_a_number_of_a_list():
    with pytest.raises(
        InputError, match=r"^teacher\.restart_fractions: got \(0\.5, inf\); must be"
    ):
        config.load(None, ["--teacher.restart_fractions", "[0.5, .inf]"])


@pytest.mark.parametrize("setting", [("top_p", "0.9"), ("top_k", "20")])
def test_a_policy_gradient_is_refused_with_a_policy_that_leaves_tokens_out(setting):
    name, value = setting
    overrides = [f"--sampling.{name}", value]
    config.load(None, overrides)  # the importance weights of a distillation correct for it
    with pytest.raises(InputError, match=rf"sampling\.{name}: got {value}; must be .* objective"):
        config.load(None, [*overrides, "--objective.policy", "0.5"])


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"no-such-file\.yaml cannot be read"):
        config.load("no-such-file.yaml")


def test_no_configuration_at_all_says_what_to_give():
    with pytest.raises(InputError, match=r"python -m pgpo_jax\.train configs/"):
        train.main([])


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_seed_has_32_bits(seed):
    assert config.load(None, ["--seed", str(seed)]).seed == seed
    with pytest.raises(InputError, match=r"seed: got 4294967296; must be .* below 2\*\*32"):
        config.load(None, ["--seed", str(2**32)])


def test_values_given_to_load_stand_over_the_overrides():
    values = {"steps": 3, "optimizer.alpha": "0.5", "metrics.name": "1"}
    loaded = config.load(None, ["--steps", "2", "--seed", "1"], values)
    assert (loaded.steps, loaded.seed, loaded.optimizer.alpha) == (3, 1, 0.5)
    assert loaded.metrics.name == "1"
    with pytest.raises(InputError, match=r"optimizer\.alfa: no such field"):
        config.load(None, values={"optimizer.alfa": 1})


def test_what_is_encoded_is_decoded_as_the_same():
    changes = ["--metrics.trackers", "[wandb]", "--sampling.end_tokens", "[1, 2]"]
    loaded = config.load(None, [*changes, "--data.template_options", "{a: [1, {b: null}]}"])
    encoded = fields.encode(loaded)
    assert encoded["metrics"]["trackers"] == ["wandb"]  # plain values only, as YAML has them
    assert encoded["data"]["template_options"] == {"a": [1, {"b": None}]}
    assert fields.decode(config.Config, encoded) == loaded


EARLIER = """
task: {name: %s, path: %s, test_path: %s, subset: null, train_split: train, test_split: %s,
  test_fraction: 0.1, verifier: %s}
output_dir: elsewhere
"""
"""The section as a run of an earlier version wrote it: every field, and a split by default."""


def old_run(folder, text):
    (folder / "config.yaml").write_text(text)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    return str(folder / "config.yaml")


@pytest.mark.parametrize(
    "task",
    [
        ("addition", "null", "null", "test", "null"),
        ("sciknoweval", "null", "null", "test", "null"),
        ("dataset", "QUESTIONS", "null", "test", "exact"),
        ("dataset", "QUESTIONS", "QUESTIONS", "test", "exact"),
        ("dataset", "some/hub_data", "null", "test", "exact"),
    ],
    ids=["built in", "sciknoweval", "one file", "a file held out", "a hub data set"],
)
def test_a_run_of_an_earlier_version_is_read_without_the_split_that_it_did_not_mean(task, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "1", "answer": "1"}\n' * 10)
    text = (EARLIER % task).replace("QUESTIONS", str(questions))
    loaded = config.load(old_run(tmp_path, text))
    assert loaded.task.test_split is None
    assert loaded.output_dir == str(tmp_path)
    if loaded.task.path == str(questions):
        held_out = tasks.load(loaded.task).test
        assert len(held_out) == (10 if loaded.task.test_path else 1)


def test_a_split_that_a_run_means_or_a_new_file_states_stays(tmp_path):
    task = ("dataset", "some/hub_data", "null", "validation", "exact")
    assert config.load(old_run(tmp_path, EARLIER % task)).task.test_split == "validation"
    stated = config.load(None, [], {"task.name": "dataset", "task.path": "a/b"} | MEANT)
    assert stated.task.test_split == "test"
    again = config.load(old_run(tmp_path, config.dump(stated)))  # of this version
    assert again.task.test_split == "test"
    path = tmp_path / "new.yaml"  # no run's own file
    path.write_text(EARLIER % ("addition", "null", "null", "test", "null"))
    with pytest.raises(InputError, match=r"task\.test_split: got 'test'; .* does not read it"):
        config.load(str(path))
    with pytest.raises(InputError, match=r"task\.test_split: got 'test'"):  # set by hand, now
        config.load(old_run(tmp_path, path.read_text()), ["--task.test_split", "test"])


MEANT = {"task.verifier": "exact", "task.test_split": "test", "task.test_fraction": 0}


@pytest.mark.parametrize("others", [[], ["--alarms.stop_on", "[flat]"]])
def test_a_teacher_that_is_another_model_is_never_replaced_by_the_student(others):
    reaction = ["--alarms.reaction", "refresh_teacher", *others]
    config.load(None, reaction)
    teacher = ["--teacher.path", "elsewhere", "--teacher.refresh", "frozen"]
    config.load(None, teacher)
    with pytest.raises(InputError, match=r"alarms\.reaction: got refresh_teacher; .*teacher\.path"):
        config.load(None, [*reaction, *teacher])


def test_a_runs_own_file_is_read_with_what_its_choices_are_called_now(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("distillation: {kind: choice}\nobjective: {token_weight: certainty}\n")
    with pytest.raises(InputError, match=r"distillation\.kind: got 'choice'"):
        config.load(str(path))
    (tmp_path / "metrics.jsonl").write_text("")
    read = config.load(str(path))
    assert read.distillation.kind == "teacher_argmax"
    assert read.objective.token_weight == "teacher_entropy"


def test_checkpoints_in_a_runs_folder_move_with_it_and_those_elsewhere_stay(tmp_path):
    path = tmp_path / "config.yaml"
    (tmp_path / "metrics.jsonl").write_text("")
    moved, elsewhere = str(tmp_path / "saved"), "/old/runs/x"
    for stated, now in (("/old/run/saved", moved), (elsewhere, elsewhere)):
        path.write_text(f"output_dir: /old/run\ncheckpoint: {{path: {stated}}}\n")
        read = config.load(str(path))
        assert (read.output_dir, read.checkpoint.path) == (str(tmp_path), now)
