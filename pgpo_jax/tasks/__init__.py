"""Questions and their verification; knows no arrays of JAX."""

from pgpo_jax.tasks.answers import Outcome, given_answer, last_boxed
from pgpo_jax.tasks.task import TASKS, Example, Question, Task, TaskConfig, load
from pgpo_jax.tasks.verifiers import exact, multiple_choice, numeric, tool_use

__all__ = [
    "TASKS",
    "Example",
    "Outcome",
    "Question",
    "Task",
    "TaskConfig",
    "exact",
    "given_answer",
    "last_boxed",
    "load",
    "multiple_choice",
    "numeric",
    "tool_use",
]
