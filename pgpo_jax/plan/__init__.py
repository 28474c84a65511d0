"""A run on paper: what a configuration needs on devices that need not exist."""

from pgpo_jax.plan.measure import compile_program
from pgpo_jax.plan.summary import describe, main, plan

__all__ = ["compile_program", "describe", "main", "plan"]
