"""Where questions are read from: what a path and a split name is there, or is refused by name."""

import gzip
import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import TaskConfig, load, rows

ROWS = [{"prompt": f"Question {i}?", "answer": str(i)} for i in range(20)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with splits as parquet, one with splits as JSON lines, and files of every format."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pq").mkdir()
    (tmp_path / "lines").mkdir()
    for name, other, part in (("train", "train", ROWS[:16]), ("test", "validation", ROWS[16:])):
        Dataset.from_list(part).to_parquet(str(tmp_path / "pq" / f"{name}.parquet"))
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / "lines" / f"{other}.jsonl").write_text(text)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    rows = Dataset.from_list(ROWS)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    rows.to_csv(str(tmp_path / "rows.csv"))
    rows.save_to_disk(str(tmp_path / "saved"))
    return tmp_path


def read(path, **fields):
    return load(TaskConfig(name="dataset", path=path, verifier="exact", **fields))


@pytest.mark.parametrize(
    "path, fields, line",
    [
        ("pq", {"test_split": "tset"}, r"task\.test_split: got 'tset'; .* splits test, train"),
        ("lines", {"test_split": "no"}, r"task\.test_split: got 'no'; .* splits train, validation"),
        ("pq", {"train_split": "trian"}, "'trian'"),
        ("pq", {"subset": "algebra"}, r"task\.subset: got 'algebra'"),
        ("rows.json", {"test_split": "test"}, r"task\.test_split: got 'test'; .* no splits"),
        ("rows.json", {"subset": "algebra"}, r"task\.subset: got 'algebra'"),
        ("rows.json", {"train_split": "nosuch"}, r"task\.train_split: got 'nosuch'; .* no splits"),
    ],
)
def test_a_split_or_a_subset_that_is_not_there_is_refused_by_name(path, fields, line, folder):
    with pytest.raises(InputError, match=line):
        read(path, **fields)


@pytest.mark.parametrize("path, split", [("pq", "test"), ("lines", "validation")])
def test_a_split_that_is_named_is_the_one_held_out(path, split, folder):
    task = read(path, test_split=split)
    assert [question.answer for question in task.test] == ["16", "17", "18", "19"]
    assert len(task.train) == 16


@pytest.mark.parametrize(
    "path", ["rows.parquet", "rows.csv", "rows.jsonl.gz", "rows.json", "saved"]
)
def test_a_file_of_every_format_is_read_by_its_own_path(path, folder):
    task = read(path, test_fraction=0.0)
    assert sorted(int(question.answer) for question in task.train) == list(range(20))


def test_a_file_of_an_unknown_format_is_refused_by_name(folder):
    (folder / "rows.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"rows\.xlsx"):
        read("rows.xlsx")


def test_the_files_of_a_folder_that_are_not_read_are_named(folder):
    (folder / "mixed" / "deep").mkdir(parents=True)
    (folder / "mixed" / "one.json").write_text(json.dumps(ROWS))
    (folder / "mixed" / "deep" / "two.json").write_text(json.dumps(ROWS))
    (folder / "mixed" / "three.csv").write_text("prompt,answer\nq,1\n")
    task = read("mixed")
    assert len(task.train) + len(task.test) == 2 * len(ROWS)
    assert task.notes[0].startswith("questions from the folder mixed (train) without three.csv;")


def test_messages_may_stand_in_the_prompts_place_and_labels_have_their_names(folder):
    chat = [{"role": "user", "content": "Is it?", "name": None}]
    features = Features(
        messages=[{"role": Value("string"), "content": Value("string"), "name": Value("string")}],
        label=ClassLabel(names=["no", "yes"]),
    )
    Dataset.from_list([{"messages": chat, "label": 1}] * 3, features).to_parquet("labelled.parquet")
    task = read("labelled.parquet", columns={"prompt": "messages", "answer": "label"})
    assert task.train[0].messages == ({"role": "user", "content": "Is it?"},)
    assert task.train[0].answer == "yes"


PARTS = [{"type": "text", "text": "q"}, {"type": "image"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
ASK = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"question": "q"},
            r"got the columns question; must have 'prompt', or name the one that is meant, as "
            r"task.columns \{prompt: question\}",
        ),
        ({"other": "q"}, r"got the columns other; must have 'prompt'$"),
        (
            {"prompt": [{"role": "user", "content": PARTS}]},
            r"got a message whose content is a list \(image, text\); content lists are not supp",
        ),
        ({"prompt": [ASK], "tools": [{"name": "f"}]}, "got a column 'tools'; tools are not supp"),
        ({"prompt": [ASK, CALL, ASK]}, "got a message with tool calls; tools are not supported"),
        ({"prompt": [{"role": "tool", "content": "5"}, ASK]}, "got a message with tool calls"),
        ({"prompt": json.dumps([ASK])}, "got a conversation written as JSON text; must be the li"),
        ({"prompt": [ASK, {"role": "assistant", "content": "a"}]}, "so leave out what answers it"),
    ],
)
def test_what_a_chat_template_would_need_is_refused_by_name(row, line):
    with pytest.raises(rows.RowError, match=line):
        rows.conversation(row)
