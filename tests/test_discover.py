"""Discovery in a folder: the same however often it is interrupted, and comparable methods."""

import importlib
import json
from pathlib import Path

import pytest
import yaml
from refusal import write_config
from test_train import TINY, code, rows

from pgpo_jax import discover
from pgpo_jax.config import Config
from pgpo_jax.data import DataConfig
from pgpo_jax.errors import InputError
from pgpo_jax.logs import read_discovery, read_runs
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.run import Run
from pgpo_jax.run.discovery import Records, next_prompt
from pgpo_jax.sampler import Policy, SamplingConfig
from pgpo_jax.tasks import Question, addition

METHODS = ("distillation", "best_of", "multi_turn")

REWARD = """
import os, signal

calls = []

def reward(prompts, completions, **columns):
    calls.append(len(completions))
    if os.environ.get("STOP_AT") == str(len(calls)):
        os.kill(os.getpid(), signal.SIGTERM)
    return [(1.0, "") if text[:1] in tuple("379") else (0.0, "+1++++") for text in completions]
"""
"""A success for any model now and then, and feedback on everything else."""
SECTIONS = TINY | {
    "warm_start": {"steps": 1, "examples_per_step": 8},
    "task": {"test_questions": 8, "reward": "discovery_rewards:reward"},
    "reprompt": {"max_length": 19},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    "discovery": {
        **{"questions": 3, "candidates": 8, "screening_samples": 4, "max_success_rate": 0.5},
        **{"attempts": 8, "samples_per_step": 4, "turns": 1},
    },
}


def records(folder):
    """Without what is measured."""
    found = rows(folder / "discovery.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a user who gave the command for `whole` once, and for `parts`, which a signal
    stopped, twice; and the exit codes."""
    folder, codes = tmp_path_factory.mktemp("discovery"), []
    (folder / "discovery_rewards.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        rewards = importlib.import_module("discovery_rewards")
        for name, stop_at in (("whole", 0), ("parts", 5), ("parts", 0)):
            Path(f"{name}.yaml").write_text(yaml.safe_dump(SECTIONS | {"output_dir": name}))
            rewards.calls.clear()
            patch.setenv("STOP_AT", str(stop_at))
            codes.append(code(discover.main, f"{name}.yaml"))
    return folder, codes


def test_an_interrupted_discovery_ends_as_one_without_an_interruption(ran):
    folder, codes = ran
    assert codes == [0, 75, 0]
    whole, parts = folder / "whole", folder / "parts"
    assert records(whole) == records(parts)
    for name in ("screening.json", "discovery.json", "metrics.jsonl"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_every_method_has_a_record_of_every_question_within_the_budget(ran):
    found = records(ran[0] / "whole")
    places = list(dict.fromkeys(row["place"] for row in found))
    assert [(row["place"], row["method"]) for row in found] == [
        (place, method) for place in places for method in METHODS
    ]
    for row in found:
        if row["method"] == "best_of":
            assert row["attempts"] == 8
        else:  # ends with the first success
            assert row["successes"] in ([], [row["attempts"]])
            assert row["successes"] or row["attempts"] == 8
        assert (row["response"][:1] in tuple("379")) == bool(row["successes"])
        assert not row["skipped_updates"]  # every failure had feedback to learn from


def test_all_methods_begin_with_the_same_attempts(ran):
    by_place = {}
    for row in records(ran[0] / "whole"):
        by_place.setdefault(row["place"], {})[row["method"]] = row["successes"]
    for found in by_place.values():
        first = [[place for place in found[method] if place <= 4][:1] for method in METHODS[:2]]
        assert first[0] == first[1]  # before any update
        assert (1 in found["multi_turn"]) == (1 in found["best_of"])


def test_what_is_finished_is_not_done_again_and_another_configuration_is_refused(
    ran, monkeypatch, capsys
):
    folder, _ = ran
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in (folder / "whole").glob("*.json*")}
    assert code(discover.main, "whole.yaml") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == json.loads((folder / "whole" / "discovery.json").read_text())
    assert code(discover.main, "whole.yaml", "--discovery.attempts", "16") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: discovery.attempts: got 16; whole holds a run with 8: choose")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in (folder / "whole").glob("*.json*")} == before


def test_a_report_finds_the_curves(ran):
    (run,) = read_runs([ran[0] / "whole"])
    assert run.notes == []
    curves = read_discovery(run)
    assert tuple(curves) == METHODS
    assert curves["best_of"].attempts.tolist() == [1, 2, 4, 8]


def test_half_a_record_is_cut_off_and_another_object_is_refused(tmp_path):
    path = tmp_path / "discovery.jsonl"
    row = {"place": 3, "method": "best_of", "attempts": 8, "successes": [2]}
    with Records(path) as kept:
        kept.append(row)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"place": 4, "meth')
    with Records(path) as kept:
        assert kept.found == {(3, "best_of"): (8, (2,))}
    assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"step": 1}\n')
    with pytest.raises(InputError, match=r"discovery\.jsonl:2: got another object; must be the"):
        Records(path)


def test_a_prompt_holds_the_latest_feedback_that_fits():
    reprompt = RepromptConfig(
        max_length=22,
        reprompt_template="{prompt}{solution}{feedback}",
        feedback_template="#{feedback}",
    )
    policy = Policy(None, addition.make_tokenizer(), None, SamplingConfig(), DataConfig())
    run = Run(Config(), None, policy, reprompt, None)
    question = Question(({"role": "user", "content": "12345+67890"},), "802350", "12345+67890")

    def prompt(*feedback):
        kept = list(feedback)
        return next_prompt(run, question, kept)[-1]["content"], kept

    assert prompt() == ("12345+67890", [])
    assert prompt("+1") == ("12345+67890#+1", ["+1"])
    # A line end is a token of this tokenizer's too, and the template's `=` one more.
    assert prompt("+1+", "+2+") == ("12345+67890#+1+\n\n+2+", ["+1+", "+2+"])
    assert prompt("+1+", "+2+", "+3+") == ("12345+67890#+2+\n\n+3+", ["+2+", "+3+"])
    assert prompt("+" * 20) == ("12345+67890", [])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"reprompt": {"source": "solution"}},
            "reprompt.source: got solution; must be sibling, for a solution that is shown is not "
            "discovered",
        ),
        (
            {"reprompt": {"demonstration": "other"}},
            "reprompt.demonstration: got other; there is no other question whose success could be "
            "shown, so choose another",
        ),
        (
            {"objective": {"policy": 1.0, "advantage": "evidence"}},
            "objective.advantage: got evidence, which shows the model the right answer; must be "
            "another, for what is shown is not discovered",
        ),
        (
            {"reprompt": {"use_feedback": "never"}},
            "reprompt.use_feedback: got never; distillation learns from nothing else before the "
            "first success: choose without_demonstration or always",
        ),
        (
            {"data": {"updates_per_rollout": 2}},
            "data.updates_per_rollout: got 2; must be 1, for a step is about one question "
            "(data.passes goes over its responses again)",
        ),
        (
            {"teacher": {"refresh": "gated"}},
            "teacher.refresh: got gated, which goes by the steps of a run; choose ema, periodic, "
            "live, frozen or trust_region",
        ),
        (
            {"mesh": {"data": 2}, "discovery": {"samples_per_step": 1}},
            "discovery.samples_per_step: got 1; must divide by devices (data x fsdp) x "
            "micro-batches = 2",
        ),
        (
            {"task": {"test_questions": 0}},
            "discovery.split: got test; addition has no such question: choose the other split, or "
            "give some",
        ),
    ],
)
def test_what_would_mean_nothing_is_refused(changes, expected, refused):
    refused(expected, "discover", write_config(**changes))


def test_a_task_without_feedback_is_refused_once_its_attempts_were_seen(refused):
    sections = {"screening_samples": 1, "candidates": 2, "attempts": 16}
    refused(
        "discovery.methods: got distillation, best_of, multi_turn; none of 2 failed attempts got "
        "feedback from the task, so there is nothing to learn from before a success: choose a task "
        "or a task.reward that gives feedback",
        "discover",
        write_config(discovery=sections),
    )
