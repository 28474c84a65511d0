"""Conversations to responses, on the devices."""

from pgpo_jax.sampler.rollout import rollout
from pgpo_jax.sampler.sampling import Samples, SamplingConfig, compilations, lower_decode, sample

__all__ = ["Samples", "SamplingConfig", "compilations", "lower_decode", "rollout", "sample"]
