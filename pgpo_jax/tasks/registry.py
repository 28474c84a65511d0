"""Tasks by name."""

import dataclasses
from collections.abc import Callable

from pgpo_jax.tasks import addition, code, dataset, outside, reasoning_gym, rewards, sciknoweval
from pgpo_jax.tasks.task import Task, TaskConfig

TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "addition": addition.load,
    "code": code.load,
    "sciknoweval": sciknoweval.load,
    "reasoning_gym": reasoning_gym.load,
    "dataset": dataset.load,
}


def load(config: TaskConfig) -> Task:
    """Builds the task that the config names, judged by the reward functions that it names.

    Raises:
      InputError: a missing file, split or column, rows that cannot be used (counted, the first
        ones named), an empty data set, or a function that cannot be imported.
    """
    judge = rewards.load(config)
    task = TASKS.get(config.name, outside.load)(config)
    if judge is None:
        return task
    return dataclasses.replace(task, verify=judge.verify, code=judge.digest, rewards=judge.names)
