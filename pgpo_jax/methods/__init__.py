"""Rivals and controls: objectives, advantages and multipliers beside the paper's."""

from pgpo_jax.methods.multipliers import scale_by_relative_information, scale_by_sequence
from pgpo_jax.methods.objective import ObjectiveConfig, group_statistics, make_objective

__all__ = [
    "ObjectiveConfig",
    "group_statistics",
    "make_objective",
    "scale_by_relative_information",
    "scale_by_sequence",
]
