"""Conversations to responses, on the devices; knows tokens, not tasks."""

from pgpo_jax.sampler.rollout import Conversation, Policy, rollout
from pgpo_jax.sampler.sampling import (
    Lowered,
    Samples,
    SamplingConfig,
    compilations,
    lower_programs,
    sample,
)

__all__ = [
    "Conversation",
    "Lowered",
    "Policy",
    "Samples",
    "SamplingConfig",
    "compilations",
    "lower_programs",
    "rollout",
    "sample",
]
