"""Tasks: the built-in addition, SciKnowEval, own data sets, own rewards, bad input."""

import json
from typing import get_args

import numpy as np
import pytest

from pgpo_jax import fields, tasks
from pgpo_jax.errors import InputError
from pgpo_jax.tasks import TaskConfig, addition, load, sciknoweval
from pgpo_jax.tasks.task import Name

# --- addition ------------------------------------------------------------------------------


def test_addition_questions_are_fresh_and_training_and_test_are_disjoint():
    task = load(TaskConfig(test_questions=300))
    test = {question.key for question in task.test}
    train = {task.train[index].key for index in range(3000)}
    assert (len(task.train), len(task.test)) == (1_000_000, 300)
    assert len(test) == 300
    assert len(train) == 3000
    assert not test & train
    assert load(TaskConfig()).train[5] == load(TaskConfig()).train[5]
    assert load(TaskConfig(seed=1)).train[5] != task.train[5]
    assert [task.train[-1], task.train[0]] == [*task.train[999_999:], *task.train[:1]]
    with pytest.raises(IndexError):
        task.test[300]


def test_addition_covers_all_pairs_once():
    # The rounds are a permutation whatever the hash: distinct in, distinct out, evenly spread.
    pairs = np.array([addition.operands(index, 0) for index in range(4000)])
    assert len(np.unique(pairs, axis=0)) == 4000
    assert abs(pairs.mean() / addition.COUNT - 0.5) < 0.02
    assert addition.operands(addition.COUNT**2 - 1, 0) is not None


def test_addition_digits_stand_least_significant_first():
    assert addition.prompt(12, 345) == "21000+54300"
    assert addition.true_sum(99999, 1) == "000001"
    task = load(TaskConfig())
    question = task.train[0]
    first, second = (int(number[::-1]) for number in question.messages[0]["content"].split("+"))
    assert int(question.answer[::-1]) == first + second
    assert len(question.answer) == 6


def test_addition_outcomes_tell_right_from_well_formed():
    task = load(TaskConfig())
    question = task.train[0]
    wrong = "000000" if question.answer != "000000" else "111111"
    right, six, short, other = task.verify([question] * 4, [question.answer, wrong, "12", "abcdef"])
    assert (right.reward, right.well_formed) == (1, True)
    assert (six.reward, six.well_formed) == (0, True)
    assert not short.well_formed
    assert not other.well_formed
    assert task.demonstration is not None
    assert task.verify([question], [task.demonstration(question)])[0].reward == 1


def test_a_perfect_imitator_of_the_tutor_is_right_a_quarter_of_the_time():
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, addition.COUNT, (4000, 2)).tolist()
    right = [addition.tutor_sum(a, b, rng) == addition.true_sum(a, b) for a, b in pairs]
    assert abs(np.mean(right) - 0.258) < 0.025
    assert addition.tutor_sum(11111, 22222, rng) == "333330"  # no carry, nothing to forget


def test_half_of_the_worked_examples_show_the_true_sum():
    task = load(TaskConfig())
    assert task.examples is not None
    examples = task.examples(np.random.default_rng(0), 400)
    plain = [example for example in examples if example.demonstration is None]
    shown = [example for example in examples if example.demonstration is not None]
    assert len(plain) == len(shown) == 200
    assert all(e.demonstration == e.response == e.question.answer for e in shown)
    assert 0.1 < np.mean([e.response == e.question.answer for e in plain]) < 0.6
    for kind in (plain, shown):  # every other row is short and zero padded
        padded = [e.question.key.split("+")[0].endswith("0") for e in kind]
        assert np.mean(padded[1::2]) > 0.6 > 0.3 > np.mean(padded[0::2])


def test_feedback_names_the_first_wrong_digit_and_no_right_one():
    answer = addition.true_sum(99999, 1)  # 000001
    assert addition.feedback("000001", answer) == ""
    assert addition.feedback("00001", answer) == ""  # nor is anything said of another form
    assert addition.feedback("050091", answer) == "+5++++"
    task = load(TaskConfig(options={"feedback": True, "forgets": 0.75}))
    question = task.test[0]
    wrong = "".join(str((int(digit) + 1) % 10) for digit in question.answer)
    right, told, other = task.verify([question] * 3, [question.answer, wrong, "x"])
    assert (right.reward, right.feedback) == (1, "")
    assert (told.reward, told.feedback) == (0, f"{wrong[0]}+++++")
    assert (other.reward, other.feedback, other.well_formed) == (0, "", False)
    assert not load(TaskConfig()).verify([question], [wrong])[0].feedback


def test_a_worked_example_with_feedback_is_right_where_it_was_told():
    examples = load(TaskConfig(options={"feedback": True, "forgets": 0.75})).examples
    assert examples is not None
    rows = examples(np.random.default_rng(0), 400)
    told = [row for row in rows if row.feedback]
    assert 50 < len(told) < 100  # where the tutor was right there is nothing to tell
    assert not [row for row in told if row.demonstration]
    for row in told:
        place = next(i for i, digit in enumerate(row.feedback) if digit != "+")
        assert row.feedback[place] != row.question.answer[place]
        assert row.feedback[place] != row.response[place]
    plain = rows[::2]
    assert not [row for row in plain if row.feedback or row.demonstration]
    assert np.mean([row.response == row.question.answer for row in plain]) < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget": 0.5}, "task.options: got forget; addition has forgets, feedback"),
        ({"forgets": 1}, "task.options: got forgets 1; must be at least 0 and below 1"),
        ({"forgets": "half"}, "task.options: got forgets 'half'; must be at least 0 and below 1"),
        ({"feedback": 1}, "task.options: got feedback 1; must be true or false"),
    ],
)
def test_a_setting_of_addition_that_there_is_not_is_refused(options, message):
    with pytest.raises(InputError) as error:
        load(TaskConfig(options=options))
    assert str(error.value) == message


def test_the_tokenizer_is_small_and_round_trips(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load(TaskConfig()).tokenizer
    assert len(tokenizer) == 16
    assert tokenizer.pad_token_id == 0
    text = "12345+67890#802350="
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids
    assert again.chat_template == tokenizer.chat_template


# --- SciKnowEval ---------------------------------------------------------------------------


def test_the_published_split_is_reproduced_by_position():
    # The first positions of the published files of two domains.
    train, test = sciknoweval.published_split(2100)
    assert (len(train), len(test)) == (1890, 210)
    assert test[:5] == [1522, 1033, 1476, 837, 1966]
    assert train[:5] == [743, 608, 2026, 283, 357]
    train, test = sciknoweval.published_split(935)
    assert (len(train), len(test)) == (841, 94)
    assert test[:3] == [273, 829, 2]
    assert sorted(train + test) == list(range(935))


def hub_row(index, domain="Material", level="L3", kind="mcq-4-choices"):
    return {
        "question": f"Which {index}?",
        "answerKey": "B",
        "type": kind,
        "domain": domain,
        "details": {"level": level, "task": "t"},
        "choices": {"text": ["one", "two"], "label": ["A", "B"]},
    }


def test_the_hub_rows_are_filtered_and_written_as_published():
    raw = [
        hub_row(0),
        hub_row(1, domain="Physics"),
        hub_row(2, level="L2"),
        hub_row(3, kind="open-ended-qa"),
        hub_row(4, kind="mcq-2-choices"),
    ]
    found = sciknoweval.level_3_rows([(f"test:{i}", row) for i, row in enumerate(raw)], "materials")
    assert [row["idx"] for _, row in found] == [0, 1]
    assert found[1][1]["prompt"] == "Which 4?\n\nA: one\nB: two\nPlease reason step by step."
    assert found[1][1]["answer"] == "B"


def test_the_hub_data_set_is_split_as_published_or_says_that_it_is_not(tmp_path, monkeypatch):
    write(tmp_path / "test.jsonl", *(hub_row(index) for index in range(20)))
    monkeypatch.setattr(sciknoweval, "HUB", str(tmp_path))
    monkeypatch.setitem(sciknoweval.SIZES, "materials", 20)
    config = TaskConfig(name="sciknoweval", domain="materials")
    train, test = sciknoweval.published_split(20)
    task = load(config)
    assert [question.key for question in task.train] == [f"materials/{index}" for index in train]
    assert [question.key for question in task.test] == [f"materials/{index}" for index in test]
    assert task.train[0].messages[0]["content"] == sciknoweval.SYSTEM
    monkeypatch.setitem(sciknoweval.SIZES, "materials", 935)
    with pytest.warns(UserWarning, match="20 materials questions.* from 935"):
        load(config)
    with pytest.raises(InputError, match=r"task.domain: got 'physics'"):
        load(TaskConfig(name="sciknoweval", domain="physics"))


def sciknoweval_folder(tmp_path, **changes):
    folder = tmp_path / "physics"
    folder.mkdir()
    row = {"idx": 7, "system": "S", "prompt": "P {x}", "answer": "C", **changes}
    for part in ("train", "test"):
        (folder / f"{part}.jsonl").write_text(json.dumps(row) + "\n")
    return str(tmp_path)


def test_sciknoweval_reads_a_local_folder_and_gives_no_feedback(tmp_path):
    path = sciknoweval_folder(tmp_path)
    task = load(TaskConfig(name="sciknoweval", path=path, domain="physics"))
    question = task.train[0]
    assert [message["role"] for message in question.messages] == ["system", "user"]
    assert question.messages[1]["content"] == "P {x}"
    assert (question.answer, question.key) == ("C", "physics/7")
    outcomes = task.verify([question] * 3, ["<answer>C</answer>", "C", "<answer>A</answer>"])
    assert [outcome.reward for outcome in outcomes] == [1, 1, 0]
    assert not any(outcome.feedback for outcome in outcomes)
    assert task.demonstration is not None
    assert task.verify([question], [task.demonstration(question)])[0].well_formed
    strict = load(TaskConfig(name="sciknoweval", path=path, domain="physics", require_tags=True))
    assert strict.verify([question], ["C"])[0].reward == 0


def test_a_missing_domain_folder_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"task.path: got .*biology/train.jsonl"):
        load(TaskConfig(name="sciknoweval", path=str(tmp_path), domain="biology"))


def test_a_sciknoweval_row_without_an_answer_names_its_line(tmp_path):
    path = sciknoweval_folder(tmp_path, answer=None)
    with pytest.raises(InputError, match=r"train.jsonl:1: .*must have 'answer'"):
        load(TaskConfig(name="sciknoweval", path=path, domain="physics"))


# --- data sets -----------------------------------------------------------------------------


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def dataset(path, **options):
    if "reward" not in options:
        options.setdefault("verifier", "exact")
    return load(TaskConfig(name="dataset", path=str(path), **options))


def test_a_jsonl_file_holds_out_a_tenth(tmp_path):
    path = write(tmp_path / "d.jsonl", *({"prompt": f"p{i}", "answer": i} for i in range(20)))
    task = dataset(path)
    assert (len(task.train), len(task.test)) == (18, 2)
    assert {q.key for q in task.train}.isdisjoint(q.key for q in task.test)
    texts = {q.messages[0]["content"] for q in (*task.train, *task.test)}
    assert len(texts) == 20
    assert [q.key for q in dataset(path).test] == [q.key for q in task.test]
    assert [q.key for q in dataset(path, seed=1).test] != [q.key for q in task.test]
    assert len(dataset(path, test_fraction=0.0).test) == 0
    assert len(dataset(path, train_questions=3).train) == 3
    assert isinstance(task.train[0].answer, str)


def test_a_folder_with_train_and_test_files(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "a", "answer": "1"})
    write(tmp_path / "test.jsonl", {"prompt": "b", "answer": "2"})
    other = write(tmp_path / "other.jsonl", {"prompt": "c", "answer": "3"})
    assert dataset(tmp_path).test[0].answer == "2"
    assert dataset(tmp_path, test_path=other).test[0].answer == "3"


def test_a_folder_of_another_format_is_read_by_the_datasets_library(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,answer\nhow many,3\n")
    (tmp_path / "test.csv").write_text("prompt,answer\nhow few,2\n")
    task = dataset(tmp_path, verifier="numeric")
    assert task.train[0].messages == ({"role": "user", "content": "how many"},)
    assert task.test[0].answer == "2"
    with pytest.raises(InputError, match=r"task.train_split: got 'dev'"):
        dataset(tmp_path, train_split="dev")


def test_conversations_systems_feedback_and_solutions(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    path = write(
        tmp_path / "train.jsonl",
        {"prompt": chat, "answer": "x", "feedback": "look again", "solution": "<answer>x</answer>"},
        {"prompt": "plain", "answer": "y", "system": "S"},
    )
    task = dataset(path, test_fraction=0.0)
    first, second = task.train
    assert first.messages == tuple(chat)
    assert [message["role"] for message in second.messages] == ["system", "user"]
    outcomes = task.verify([first, first, second], ["x", "no", "no"])
    assert [outcome.feedback for outcome in outcomes[:2]] == ["", "look again"]
    assert outcomes[2].feedback != "look again"
    assert task.examples is not None
    examples = task.examples(np.random.default_rng(0), 4)
    assert {example.question.key for example in examples} == {first.key}
    assert [example.demonstration is None for example in examples] == [True, False, True, False]
    assert task.solution is not None
    assert [task.solution(question) for question in task.train] == ["<answer>x</answer>", None]


@pytest.mark.parametrize(
    ("verifier", "answer"),
    [
        ("multiple_choice", "B"),
        ("exact", "blue"),
        ("numeric", "1,234"),
        ("math", "\\frac{1}{2}"),
        ("tool_use", [{"Action": "f", "Action_Input": '{"a": 1}'}]),
    ],
)
def test_the_demonstration_of_every_verifier_is_right(tmp_path, verifier, answer):
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "answer": answer})
    task = dataset(path, verifier=verifier, test_fraction=0.0)
    assert task.demonstration is not None
    outcome = task.verify(task.train, [task.demonstration(task.train[0])])[0]
    assert (outcome.reward, outcome.well_formed) == (1, True)
    assert task.solution is None, "an answer is no solution"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"d.jsonl', which has no rows"),
        ('{"prompt": "a", "answer": "1"}\n\n{bad\n', r"d.jsonl:3: got .*one JSON object"),
        ("[1]\n", r"d.jsonl:1: got a list"),
        ('{"question": "a"}\n', r"d.jsonl:1: got the columns question; must have 'answer'"),
        ('{"answer": "a"}\n', r"d.jsonl:1: got the columns answer; must have 'prompt'"),
        ('{"prompt": 3, "answer": "a"}\n', r"d.jsonl:1: got the prompt '3'"),
        ('{"prompt": [{"role": "user"}], "answer": "a"}\n', r"d.jsonl:1: got the prompt"),
        ('{"prompt": [], "answer": "a"}\n', r"d.jsonl:1: got the prompt"),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}], "answer": "a"}\n',
            r"d.jsonl:1: got a prompt whose last message is the assistant's",
        ),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, text, message):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        dataset(tmp_path / "d.jsonl", test_fraction=0.0)


def test_a_file_that_is_not_text_is_one_clear_error(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"d.jsonl:1: .*utf-8"):
        dataset(tmp_path / "d.jsonl")


def test_missing_files_and_folders_are_one_clear_error(tmp_path):
    with pytest.raises(InputError, match=r"task.path: got .*none.jsonl', which does not exist"):
        dataset(tmp_path / "none.jsonl")
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "answer": "a"})
    with pytest.raises(InputError, match=r"task.test_path: got 'none.jsonl'"):
        dataset(path, test_path="none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"task.path: got .*empty', which is a folder and does not load"
    ):
        dataset(tmp_path / "empty")


# --- own rewards ---------------------------------------------------------------------------


def test_a_reward_function_gets_what_trl_gives_it(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_test_tasks.py").write_text(
        "calls = []\n"
        "def accuracy(prompts, completions, answer, level, **columns):\n"
        "    calls.append((prompts, completions, level, sorted(columns)))\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return [(float(t == a), f'hint {a}') for t, a in zip(texts, answer)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    chat = [{"role": "user", "content": "q"}]
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "q", "answer": "1", "level": 3},
        {"prompt": chat, "answer": "2", "extra": True},
    )
    task = dataset(path, reward="rewards_of_test_tasks:accuracy", test_fraction=0.0)
    outcomes = task.verify(task.train, ["1", "1"])
    assert [outcome.reward for outcome in outcomes] == [1.0, 0.0]
    assert outcomes[1].feedback == "hint 2"
    import rewards_of_test_tasks

    (call,) = rewards_of_test_tasks.calls
    assert call[0] == ["q", chat]
    assert call[1] == ["1", [{"role": "assistant", "content": "1"}]]
    assert call[2:] == ([3, None], ["extra"])


def test_the_built_in_task_takes_a_reward_function_too(tmp_path, monkeypatch):
    (tmp_path / "flat_reward_of_test_tasks.py").write_text(
        "def flat(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task = load(TaskConfig(reward="flat_reward_of_test_tasks:flat"))
    question = task.train[0]
    assert task.verify([question], [question.answer])[0].reward == 0


# --- configuration -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"name": "dataset"}, "path"),
        ({"name": "dataset", "path": "x"}, "verifier"),
        ({"name": "dataset", "path": "x", "verifier": "math", "reward": "a:b"}, "verifier"),
        ({"reward": "no_colon"}, "reward"),
        ({"reward": ":f"}, "reward"),
        ({"time_limit": 0}, "time_limit"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"train_questions": 0}, "train_questions"),
        ({"test_questions": -1}, "test_questions"),
        ({"seed": -1}, "seed"),
        ({"name": "chess"}, "name"),
        ({"domain": "history"}, "domain"),
        ({"name": "dataset", "path": "x", "verifier": "guess"}, "verifier"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_unusable_settings_are_refused(options, field):
    with pytest.raises(InputError, match=f"task.{field}: got"):
        TaskConfig(**options)


def test_more_questions_than_addition_has_are_refused():
    with pytest.raises(InputError, match=r"task.train_questions: got 10000000000"):
        load(TaskConfig(train_questions=10**10))


def test_a_config_file_can_state_every_field():
    config = TaskConfig(name="dataset", path="d.jsonl", verifier="numeric", test_questions=5)
    text = fields.dump_yaml(fields.encode(config))
    assert fields.decode(TaskConfig, fields.load_yaml(text)) == config
    assert tasks.TASKS.keys() == set(get_args(Name))
