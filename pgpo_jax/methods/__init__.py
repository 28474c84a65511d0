"""Rivals and controls: objectives, advantages and multipliers beside the paper's."""

from pgpo_jax.methods.multipliers import scale_by_relative_information, scale_by_sequence
from pgpo_jax.methods.objective import (
    SDPO,
    Judged,
    ObjectiveConfig,
    Policy,
    advantage_weight,
    distillation_coefficient,
    judge,
    policy_terms,
    question_weights,
    route,
    token_weights,
)

__all__ = [
    "SDPO",
    "Judged",
    "ObjectiveConfig",
    "Policy",
    "advantage_weight",
    "distillation_coefficient",
    "judge",
    "policy_terms",
    "question_weights",
    "route",
    "scale_by_relative_information",
    "scale_by_sequence",
    "token_weights",
]
