"""Tasks by name."""

from collections.abc import Callable

from pgpo_jax.tasks import addition, code, dataset, reasoning_gym, sciknoweval
from pgpo_jax.tasks.task import Task, TaskConfig

TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "addition": addition.load,
    "code": code.load,
    "sciknoweval": sciknoweval.load,
    "reasoning_gym": reasoning_gym.load,
    "dataset": dataset.load,
}


def load(config: TaskConfig) -> Task:
    """Builds the task that the config names.

    Raises:
      InputError: a missing file, split or column, rows that cannot be used (counted, the first
        ones named), an empty data set, or a reward function that cannot be imported.
    """
    return TASKS[config.name](config)
