"""Every rival's configuration trains, from its file, and its prompts are what its method says."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
from marks import long
from test_train import ARCHITECTURE, code

from pgpo_jax import checkpoint, config, data, hf, reprompt, tasks, train
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.sampler import Policy, SamplingConfig
from pgpo_jax.tasks import Outcome

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
TOKENIZER = tasks.load(tasks.TaskConfig(name="addition")).tokenizer
RIVALS = sorted((FOLDER / "rivals").glob("*.yaml"))
SMALL = {
    "steps": 2,
    "model.architecture": json.dumps(ARCHITECTURE),
    "warm_start.steps": 0,
    "data.questions_per_step": 4,
    "data.updates_per_rollout": 1,
    "sampling.num_samples": 4,
    "optimizer.warmup_steps": 0,
    "evaluation.every": 0,
    "checkpoint.every": 0,
}


def arguments(path, folder, **changes) -> list[str]:
    fields = {**SMALL, "output_dir": str(folder), **changes}
    return [str(path), *(f"--{name}={value}" for name, value in fields.items())]


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def half_right(monkeypatch):
    """An untrained model is never right: here a digit of the sum of its answer's digits decides."""
    load = tasks.load

    def judged(section):
        def verify(questions, texts):
            return [Outcome(float(sum(map(ord, text)) % 2)) for text in texts]

        task = load(section)
        return tasks.Task(**{**vars(task), "verify": verify})

    monkeypatch.setattr(tasks, "load", judged)


LOSSES = {"demopsd", "grpo", "opsa_control", "rlsd", "srpo", "tgpo_adv", "veto"}


def when(path):
    """CEPO has both terms and every kind of evidence; those of other losses are slow tests, and the
    rest, which but choose among the same functions, are for a long run."""
    if path.stem == "cepo":
        return path
    marks = [pytest.mark.slow] if path.stem in LOSSES else [pytest.mark.slow, long]
    return pytest.param(path, marks=marks)


@pytest.mark.parametrize("path", [when(path) for path in RIVALS], ids=lambda path: path.stem)
def test_a_rival_trains(path, tmp_path, half_right):
    alpha = "1" if path.stem in ("grpo", "cepo") else "0"  # on top of each, so of these too
    assert code(train.main, *arguments(path, tmp_path, **{"optimizer.alpha": alpha})) == 0
    trained = rows(tmp_path)
    assert [row["step"] for row in trained] == [1, 2]
    for row in trained:
        assert row["skipped"] == 0
        assert row["update_norm"] > 0
        assert all(math.isfinite(row[name]) for name in ("loss", "grad_norm", "information"))
    if alpha == "1":
        assert trained[0]["multiplier"] == pytest.approx(math.exp(trained[0]["information"]))


@pytest.mark.slow
def test_a_gated_teacher_is_refreshed_where_the_reward_rose_and_an_interruption_changes_nothing(
    tmp_path, half_right
):
    path = FOLDER / "rivals/teacher_gated.yaml"
    changes = {"teacher.period": 1, "teacher.gate_tail": 1, "teacher.gate_rise": 0, "steps": 5}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert code(train.main, *arguments(path, whole, **changes)) == 0
    level, due = None, []
    for row in rows(whole):
        rose = level is not None and row["reward/mean"] > level
        level = row["reward/mean"] if rose or level is None else level
        due.append(float(rose))
    assert [row["teacher/refreshed"] for row in rows(whole)] == due
    assert 0 < sum(due[:-1]) < 4
    distances = [row["teacher_student_distance"] for row in rows(whole)]
    for refreshed, before, after in zip(due, distances, distances[1:], strict=False):
        assert (after < before) == bool(refreshed)
    for steps in (due.index(1.0), 5):  # up to the step before, so the level must be known again
        assert code(train.main, *arguments(path, parts, **{**changes, "steps": steps})) == 0
    assert checkpoint.compare(str(whole), str(parts)) is None


@pytest.mark.slow
def test_a_teacher_restarts_at_its_parts_of_the_run(tmp_path, half_right):
    path = FOLDER / "rivals/teacher_restarts.yaml"
    assert code(train.main, *arguments(path, tmp_path, steps=4)) == 0
    assert [row["teacher/refreshed"] for row in rows(tmp_path)] == [1, 1, 1, 0]


@pytest.mark.slow
def test_every_response_has_a_context_where_the_solution_is_given(tmp_path, half_right):
    path = FOLDER / "rivals/opsd.yaml"
    alone = {"sampling.num_samples": 1, "data.questions_per_step": 8}
    assert code(train.main, *arguments(path, tmp_path, **alone)) == 0
    assert [row["context_fraction"] for row in rows(tmp_path)] == [1, 1]


def test_another_model_may_be_the_teacher(tmp_path, half_right):
    section = hf.ModelSection(architecture={**ARCHITECTURE, "hidden_size": 32})
    graphdef, params, *_ = hf.from_section(section, None, jax.random.key(1))
    hf.save(tmp_path / "teacher", graphdef, params, TOKENIZER)
    changes = {
        "teacher.path": tmp_path / "teacher",
        "teacher.refresh": "frozen",
        "reprompt.demonstration": "plain",
    }
    for path in RIVALS:
        if path.stem.startswith("tgpo"):
            folder = tmp_path / path.stem
            assert code(train.main, *arguments(path, folder, **changes)) == 0
            assert [row["context_fraction"] for row in rows(folder)] == [1, 1]


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path, refused):
    section = hf.ModelSection(architecture={**ARCHITECTURE, "vocab_size": 24})
    graphdef, params, *_ = hf.from_section(section, None, jax.random.key(1))
    hf.save(tmp_path / "teacher", graphdef, params, TOKENIZER)
    changes = {"teacher.path": tmp_path / "teacher", "teacher.refresh": "frozen"}
    line = "teacher.path: got a model of 24 tokens; the student has 16"
    refused(line, "train", *arguments(FOLDER / "rivals/tgpo_reg.yaml", tmp_path / "run", **changes))


def test_the_worst_answer_is_the_first_with_the_lowest_reward():
    texts = ["<answer>A</answer>", r"so \boxed{B}", "<answer>C</answer>", "<answer></answer>"]
    outcomes = [Outcome(reward) for reward in (1.0, 0.25, 0.0, 0.0)]
    assert reprompt.worst_answer(texts, outcomes, 0.5) == "C"
    assert reprompt.worst_answer(texts[:2], outcomes[:2], 0.5) == "B"
    assert reprompt.worst_answer(texts[:1], outcomes[:1], 0.5) is None
    assert reprompt.worst_answer(texts[3:], outcomes[3:], 0.5) is None


def test_evidence_shows_the_right_answer_and_the_worst_wrong_one():
    task = tasks.load(tasks.TaskConfig(name="addition"))
    questions = [task.train[index] for index in range(2)]
    rows = data.encode(task.tokenizer, [q.messages for q in questions], max_length=19)
    prompts, mask = data.left_pad(rows, 19)
    empty = np.zeros((2, 2, 1), np.int32)
    texts = [["111111", "222222"], [questions[1].answer] * 2]
    rollouts = data.Rollouts(prompts, mask, empty, empty == 0, empty.astype(np.float32), texts)
    outcomes = [[Outcome(0.25), Outcome(0.0)], [Outcome(1.0)] * 2]
    policy = Policy(None, task.tokenizer, None, SamplingConfig(), data.DataConfig())
    config = reprompt.with_templates(RepromptConfig(), task.templates)
    shown = reprompt.answer_prompts(policy, questions, rollouts, outcomes, config)

    def text(tokens, mask):
        return task.tokenizer.decode(tokens[mask]).replace(" ", "")

    plain = [question.messages[-1]["content"] for question in questions]
    for row in range(4):
        right = text(shown.right[row], shown.right_mask[row])
        assert right == f"{plain[row // 2]}#{questions[row // 2].answer}="
        wrong = text(shown.wrong[row], shown.wrong_mask[row])
        assert wrong == (f"{plain[0]}#222222=" if row < 2 else f"{plain[1]}=")
    assert shown.has_wrong.tolist() == [True, True, False, False]


def test_a_configuration_stands_on_another(tmp_path):
    below = tmp_path / "below.yaml"
    below.write_text("steps: 7\noptimizer: {alpha: 0.5, learning_rate: 1.0e-3}\n")
    above = tmp_path / "above.yaml"
    above.write_text("base: below.yaml\noptimizer: {alpha: 0.25}\n")
    loaded = config.load(str(above))
    assert (loaded.steps, loaded.optimizer.alpha, loaded.optimizer.learning_rate) == (7, 0.25, 1e-3)
    other = tmp_path / "other.yaml"
    other.write_text("steps: 9\n")
    for form in (["--base", str(other)], [f"--base={other}"]):
        assert config.load(str(above), form).steps == 9
        assert config.load(str(above), form).optimizer.alpha == 0.25


def test_a_base_that_is_wrong_is_refused(tmp_path, refused):
    path = tmp_path / "a.yaml"
    path.write_text("base: a.yaml\n")
    refused(
        "base: FOLDER/a.yaml names FOLDER/a.yaml, which stands on it; must not be a circle",
        *("train", str(path)),
    )
    path.write_text("base: 3\n")
    refused("base: got 3 in FOLDER/a.yaml; must be a file", "train", str(path))
    path.write_text("base: none.yaml\n")
    refused(
        "CONFIG: FOLDER/none.yaml cannot be read (No such file or directory)", "train", str(path)
    )
    refused("--base: got no value; give --base FILE", "train", str(path), "--base")
