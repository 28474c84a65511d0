"""Conversations to responses, on the devices; knows tokens, not tasks."""

from pgpo_jax.sampler.rollout import Conversation, Policy, rollout
from pgpo_jax.sampler.sampling import Samples, SamplingConfig, compilations, lower_decode, sample

__all__ = [
    "Conversation",
    "Policy",
    "Samples",
    "SamplingConfig",
    "compilations",
    "lower_decode",
    "rollout",
    "sample",
]
