"""Rivals and controls: objectives, targets, multipliers and refresh rules beside the paper's."""

from pgpo_jax.methods.multipliers import scale_by_relative_information, scale_by_sequence
from pgpo_jax.methods.objective import ObjectiveConfig, group_statistics, make_objective
from pgpo_jax.methods.refresh import Gate, Progress, refresh_due

__all__ = [
    "Gate",
    "ObjectiveConfig",
    "Progress",
    "group_statistics",
    "make_objective",
    "refresh_due",
    "scale_by_relative_information",
    "scale_by_sequence",
]
