"""Questions that are too long are left out and counted, or refused; the others keep their order."""

import dataclasses

import pytest

from pgpo_jax import config, data, tasks
from pgpo_jax.errors import InputError
from pgpo_jax.evaluation import AlsoConfig
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.run.content import check_content
from pgpo_jax.run.questions import load_questions
from pgpo_jax.tasks import Question, addition

TOKENIZER = addition.make_tokenizer()
SHOWN = RepromptConfig(
    max_length=19,
    reprompt_template="{prompt}{solution}{feedback}",
    solution_template="{demonstration}",
    feedback_template="{feedback}",
)


def questions(*texts):
    """Of a token a character, and one for the `=` after it."""
    return [Question(({"role": "user", "content": text},), "0", text) for text in texts]


def fitting(train, test=(), **section):
    """What is left of a task's questions at a limit of 8 tokens."""
    settings = config.load(None, [], {"data.max_prompt_length": 8, **section})
    task = tasks.Task("letters", questions(*train), questions(*test), verify=lambda q, r: [])
    return load_questions(settings, task, TOKENIZER, SHOWN), settings


def texts(found):
    return [question.key for question in found]


def test_what_is_too_long_is_left_out_and_said_with_the_longest():
    found, settings = fitting(["1+1", "1234+1234", "2+2", "1234+123", "1234+12"], ["1", "12345678"])
    assert texts(found.task.train) == ["1+1", "2+2", "1234+12"]  # of 8 tokens
    assert found.left_out == (2, 5, 10)
    (own,) = found.held_out
    assert (texts(own.task.test), own.left_out, own.prefix) == (["1"], (1, 2, 9), "eval/")
    assert found.task.test == own.task.test
    limit = "their prompts have more than data.max_prompt_length = 8 tokens"
    assert found.notes(settings.data) == [
        f"2 of 5 training questions are left out: {limit}, the longest 10",
        f"1 of 2 held-out questions are left out: {limit}, the longest 9",
    ]


def test_the_content_of_a_run_is_that_of_the_questions_that_are_left():
    found, settings = fitting(["1+1", "1234+1234", "2+2"])
    same, _ = fitting(["1+1", "2+2"])
    assert tasks.digest(found.task) == tasks.digest(same.task)
    assert same.notes(settings.data) == []


def test_a_question_that_is_too_long_may_be_refused():
    with pytest.raises(InputError, match=r"question '1234\+1234' .* has 10 tokens, must be"):
        fitting(["1+1", "1234+1234"], **{"data.over_long": "error"})


def test_nothing_that_is_left_is_one_line():
    line = (
        r"data\.max_prompt_length: got 8; all 2 {}questions are longer, the shortest has 9 tokens"
    )
    with pytest.raises(InputError, match=line.format("training ")):
        fitting(["12345678", "123456789"])
    with pytest.raises(InputError, match=line.format("held-out ")):
        fitting(["1"], ["12345678", "123456789"])


def test_questions_that_are_made_when_asked_for_are_refused_before_a_step_meets_them():
    settings = config.load(None, [], {"data.max_prompt_length": 11})
    task = tasks.load(tasks.TaskConfig())
    with pytest.raises(InputError, match="has 12 tokens, must be at most 11"):
        load_questions(settings, task, TOKENIZER, SHOWN)


def test_the_longest_that_is_left_must_leave_room_for_a_demonstration():
    tight = dataclasses.replace(SHOWN, max_length=8)
    settings = config.load(None, [], {"data.max_prompt_length": 8})
    task = tasks.Task("letters", questions("1", "1234+12"), [], verify=lambda q, r: [])
    with pytest.raises(InputError, match=r"reprompt\.max_length: question '1234\+12' .* 8 tokens"):
        load_questions(settings, task, TOKENIZER, tight)


def test_the_lengths_of_many_prompts_are_those_of_their_tokens():
    asked = [question.messages for question in questions(*(str(i) for i in range(2_050)))]
    rows = data.encode(TOKENIZER, asked, max_length=9)
    assert data.lengths(TOKENIZER, asked).tolist() == [*map(len, rows)]


# ---- further evaluation sets -------------------------------------------------------------------


def further(**section):
    return config.load(None, [], {"evaluation.also": [section]}).evaluation.also


def test_a_further_set_is_a_task_with_a_label_and_comes_back_from_its_dump():
    loaded = config.load(None, ["--evaluation.also", "[{label: other, seed: 1}]"])
    assert loaded.evaluation.also == (AlsoConfig(label="other", seed=1),)
    assert config.load(None, [], {"evaluation.also": [{"label": "other", "seed": 1}]}) == loaded


def test_a_further_set_is_fitted_too_and_asked_beside_the_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "12345678", "answer": "1"}\n')
    row = {"label": "far", "name": "dataset", "path": str(path), "test_path": str(path)}
    also = [{**row, "verifier": "exact"}]
    found, _ = fitting(["1"], ["2"], **{"evaluation.also": also})
    own, far = found.held_out
    assert (own.label, far.label, far.prefix) == ("", "far", "eval/far/")
    assert [question.messages[-1]["content"] for question in far.task.test] == ["1+1"]
    assert far.left_out == (1, 2, 9)


def test_questions_of_a_further_set_that_changed_are_named():
    now = {"train": "1", "also/far/test": "3"}
    with pytest.raises(InputError, match=r"evaluation\.also: got other questions of far \(dig"):
        check_content({**now, "also/far/test": "2"}, now, config.Config())
