"""Tasks from outside: functions of the user's, or of installed packages, that return a `Task`."""

import dataclasses
import inspect
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import rows
from pgpo_jax.tasks.rows import RowError
from pgpo_jax.tasks.task import GROUP, Question, Task, TaskConfig
from pgpo_jax.tasks.user_code import digest, import_function, place, show


def load(config: TaskConfig) -> Task:
    """The task that `task.name`, a `module:function` or an entry point, makes of `task.options`.

    Raises:
      InputError: It cannot be imported, does not take these options, raises, or returns no `Task`
        with questions.
    """
    name = _function(config.name)
    function = import_function(name, "task.name")
    try:
        inspect.signature(function).bind(**config.options)
    except TypeError as error:
        raise InputError(
            f"task.options: got {show(config.options)}; must be keyword arguments of {name} "
            f"({error})"
        ) from error
    try:
        task = function(**config.options)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"task.name: {name} raised {show(error)}{place(error)}") from error
    if not isinstance(task, Task):
        raise InputError(f"task.name: {name} returned {show(task)}; must be a pgpo_jax.tasks.Task")
    if not len(task.train):
        raise InputError(f"task.name: {name} returned a task without a training question")
    train, test = (_checked(name, part) for part in (task.train, task.test))
    return dataclasses.replace(task, train=train, test=test, file=digest(name, function))


def _function(name: str) -> str:
    """`module:function` of a task's name."""
    if ":" in name:
        return name
    found = {entry.value for entry in metadata.entry_points(group=GROUP, name=name)}
    if len(found) > 1:
        raise InputError(
            f"task.name: got {name!r}, which several packages bring; name one of "
            f"{', '.join(sorted(found))}"
        )
    return found.pop()


def _checked(name: str, questions: Sequence[Any]) -> Sequence[Any]:
    """The questions, of a lazy sequence the first of them looked at."""

    def read(where: str, question: Any) -> None:
        del where
        if not isinstance(question, Question):
            raise RowError(f"got {show(question)}; must be a pgpo_jax.tasks.Question")
        rows.conversation({"prompt": [dict(message) for message in question.messages]})

    questions = list(questions) if isinstance(questions, tuple) else questions
    found = questions if isinstance(questions, list) else questions[:1]
    numbered = [(f"question {index} of {name}", item) for index, item in enumerate(found)]
    rows.read_each("task.name", numbered, read)
    return questions
