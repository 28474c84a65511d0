"""Questions and their verification; knows no arrays of JAX."""

from pgpo_jax.tasks.answers import Outcome, given_answer, last_boxed
from pgpo_jax.tasks.registry import TASKS, load
from pgpo_jax.tasks.task import Example, Question, Task, TaskConfig, digest
from pgpo_jax.tasks.verifiers import exact, multiple_choice, numeric, tool_use

__all__ = [
    "TASKS",
    "Example",
    "Outcome",
    "Question",
    "Task",
    "TaskConfig",
    "digest",
    "exact",
    "given_answer",
    "last_boxed",
    "load",
    "multiple_choice",
    "numeric",
    "tool_use",
]
