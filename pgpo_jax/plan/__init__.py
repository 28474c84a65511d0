"""Plan of a run: memory, work and time on devices that need not exist, compiled ahead of time."""

from pgpo_jax.plan.measure import compile_program
from pgpo_jax.plan.summary import describe, main, plan

__all__ = ["compile_program", "describe", "main", "plan"]
