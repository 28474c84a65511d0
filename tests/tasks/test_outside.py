"""Tasks from outside: the page's example, entry points, and what is said of one that is none."""

import re
import sys
from pathlib import Path

import pytest

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import TaskConfig, digest, load

PAGE = Path(__file__).parent.parent.parent / "docs" / "custom_task.md"
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported in this test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)

    return write


def test_the_example_of_the_page_is_a_task(module):
    assert len(EXAMPLE.splitlines()) <= 30
    module("backwards", EXAMPLE)
    task = load(TaskConfig(name="backwards:task", options={"held_out": 2}))
    assert (len(task.train), len(task.test)) == (2, 2)
    question = task.train[0]
    assert task.demonstration is not None
    right, wrong = task.verify([question] * 2, [task.demonstration(question), "revil"])
    assert (right.reward, right.feedback) == (1, "")
    assert (wrong.reward, wrong.feedback) == (0.8, "4 of 5 letters stand in their place.")
    assert set(digest(task)) == {"train", "test", "task"}


def test_a_package_brings_tasks_by_entry_points(module, tmp_path):
    module("backwards_of_a_package", EXAMPLE)
    folder = tmp_path / "words-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: words\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[pgpo_jax.tasks]\nbackwards = backwards_of_a_package:task\n"
    )
    assert load(TaskConfig(name="backwards")).name == "backwards"
    with pytest.raises(InputError, match=r"must be one of addition, .*, backwards, or `module:"):
        TaskConfig(name="forwards")


def test_a_task_of_ones_own_may_be_judged_by_a_reward_function(module):
    module("backwards", EXAMPLE + "\ndef flat(completions, **columns):\n    return [0.25]\n")
    task = load(TaskConfig(name="backwards:task", reward="backwards:flat"))
    assert task.verify(task.train[:1], ["x"])[0].reward == 0.25
    assert {"task", "reward"} < set(digest(task))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = 1", r"task.name: got 'mine:task', but 'mine' has no function 'task'"),
        (
            "def task(size): ...",
            r"task.options: got \{\}; must be keyword arguments of mine:task \(m",
        ),
        (
            "def task(): return 1 / 0",
            r"task.name: mine:task raised ZeroDivisionError: .* at mine.py:1",
        ),
        (
            "def task(): return [1]",
            r"task.name: mine:task returned \[1\]; must be a pgpo_jax.tasks.T",
        ),
        (
            "from pgpo_jax.tasks import Task\n"
            "def task(): return Task('mine', [], [], lambda q, r: [])",
            "task.name: mine:task returned a task without a training question",
        ),
        (
            "from pgpo_jax.tasks import Question, Task\n"
            "ask = Question(({'role': 'user', 'content': 'q'},), 'a', 'k')\n"
            "bad = Question(({'role': 'system', 'content': 'q'},), 'a', 'k')\n"
            "def task(): return Task('mine', [ask, bad], [], lambda q, r: [])",
            "task.name: question 1 of mine:task: got a prompt whose last message is the system's",
        ),
    ],
)
def test_what_is_no_task_is_one_clear_error(module, text, message):
    module("mine", text)
    with pytest.raises(InputError, match=message):
        load(TaskConfig(name="mine:task"))
