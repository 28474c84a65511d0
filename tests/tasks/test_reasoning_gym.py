"""Reasoning Gym as a task: its questions, its scores, and what its process may not do."""

import subprocess
import sys
from pathlib import Path

import pytest

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import (
    Outcome,
    TaskConfig,
    load,
    reasoning_gym,
    reasoning_gym_worker,
    workers,
)
from pgpo_jax.tasks.answers import NO_TAGS

WORKER = Path(workers.__file__).with_name("reasoning_gym_worker.py")


def config(dataset="word_sequence_reversal", **changes):
    # One worker: starting one takes seconds, for the package imports all its data sets.
    changes = {"train_questions": 8, "test_questions": 4, "workers": 1} | changes
    return TaskConfig(name="reasoning_gym", dataset=dataset, **changes)


@pytest.fixture(scope="module")
def reversal():
    return load(config(options={"min_words": 3, "max_words": 4}))


def test_questions_are_those_of_the_data_set_and_none_is_in_both_parts(reversal):
    texts = [question.messages[-1]["content"] for question in (*reversal.train, *reversal.test)]
    assert len(set(texts)) == 12
    for text, question in zip(texts, (*reversal.train, *reversal.test), strict=True):
        words = text.rpartition(": ")[2].split(", ")
        assert question.answer == ", ".join(reversed(words))
        assert len(words) in (3, 4)


def test_the_same_seed_gives_the_same_questions_and_the_next_one_gives_others(reversal):
    made = [load(config(options={"min_words": 3, "max_words": 4}, seed=seed)) for seed in (0, 1)]
    texts = [
        {question.messages[0]["content"] for question in (*task.train, *task.test)}
        for task in (reversal, *made)
    ]
    assert texts[0] == texts[1]
    assert not texts[0] & texts[2]  # the package itself would share all but one


def test_the_reward_is_the_score_of_the_data_set(reversal):
    question = reversal.test[0]
    answers = [question.answer, "no", f"<answer>{question.answer}</answer>", f"{question.answer}!"]
    outcomes = reversal.verify([question] * 4, answers)
    assert [outcome.reward for outcome in outcomes[:3]] == [1, 0, 1]
    size = len(question.answer)
    assert outcomes[3].reward == pytest.approx(
        size / (size + 1)
    )  # a part of 1, as the score has it


def test_tags_that_are_required_are_asked_for_shown_and_checked():
    task = load(config(options={"max_words": 3}, require_tags=True))
    question = task.train[0]
    assert question.messages[0] == {"role": "system", "content": reasoning_gym.TAGS}
    assert task.demonstration is not None
    right = task.demonstration(question)
    assert right == f"<answer>{question.answer}</answer>"
    assert task.verify([question] * 2, [right, question.answer]) == [
        Outcome(1.0),
        Outcome(0.0, NO_TAGS, well_formed=False),
    ]


def test_a_training_question_that_is_held_out_is_left_out_and_said():
    task = load(config("coin_flip", options={"max_trials": 3}, train_questions=40))
    held_out = {question.messages[0]["content"] for question in task.test}
    assert not held_out & {question.messages[0]["content"] for question in task.train}
    assert len(task.train) < 40
    assert f"{40 - len(task.train)} training questions" in task.notes[0]


def test_a_data_set_that_denies_its_own_answers_has_no_worked_examples(monkeypatch, reversal):
    made = [(question, 0.5) for question in (*reversal.test, *reversal.train)]
    monkeypatch.setattr(reasoning_gym, "_make", lambda *_: made)
    task = load(config())
    assert task.examples is None and task.demonstration is None
    assert "no worked examples" in task.notes[0]


def test_a_data_set_of_which_all_questions_are_held_out_is_refused(monkeypatch, reversal):
    monkeypatch.setattr(reasoning_gym, "_make", lambda *_: [(reversal.test[0], 1.0)] * 12)
    with pytest.raises(InputError, match="only 1 different ones, all held out"):
        load(config())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"max_words": 1}}, "task.options: got .*max_words must be >= min_words"),
        ({"dataset": None}, "task.dataset: got nothing; "),
        ({"domain": "physics"}, "task.domain: got 'physics'; task.name = reasoning_gym"),
        ({"verifier": "math"}, "task.verifier: got 'math'; task.name = reasoning_gym"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(changes, said):
    with pytest.raises(InputError, match=said):
        load(config(**changes))


@pytest.mark.filterwarnings("ignore")  # of the package's own imports
@pytest.mark.parametrize(
    ("dataset", "options", "said"),
    [
        ("spel_backward", {}, "task.dataset: got 'spel_backward'; .* has spell_backward"),
        ("spell_backward", {"max_word": 3}, "task.options: got max_word; .* has data_file, max_"),
        ("spell_backward", {"seed": 1}, "task.options: got seed; "),
    ],
)
def test_its_process_names_what_there_is(dataset, options, said):
    with pytest.raises(ValueError, match=said):
        reasoning_gym_worker.create(dataset, options, 0, 1)


def test_the_package_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setattr(reasoning_gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'pgpo-jax\[reasoning-gym\]'"):
        load(config())


def test_an_answer_that_hangs_or_crashes_the_scorer_is_a_counted_reward_of_0(monkeypatch):
    task = load(config("countdown", time_limit=3.0))
    question = task.test[0]
    assert task.verify([question], ["9**9**9**9"]) == [Outcome(0.0, failed=True)]
    assert task.verify([question], [question.answer]) == [Outcome(1.0)]
    monkeypatch.setattr(workers.Pool, "ask", lambda *_: float("nan"))
    assert task.verify([question], ["1"]) == [Outcome(0.0, failed=True)]


@pytest.mark.parametrize(
    "attempt",
    [
        "open('written', 'w')",
        "os.open('written', os.O_WRONLY | os.O_CREAT)",
        "os.remove('x')",
        "os.system('ls')",
        "subprocess.run(['ls'])",
        "socket.socket().connect(('127.0.0.1', 9))",
        "bytearray(2**33)",
    ],
)
def test_what_scoring_needs_not_is_refused_in_its_process(attempt, tmp_path):
    code = (
        "import os, runpy, socket, subprocess\n"
        f"runpy.run_path({str(WORKER)!r})['confine']()\n{attempt}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert ("MemoryError" if "bytearray" in attempt else "PermissionError") in done.stderr
    assert not list(tmp_path.iterdir())
