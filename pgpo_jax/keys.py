"""Random streams of a run, one for each use: none is another's, whatever the seed and the step."""

import enum

import jax
import numpy as np
from jaxtyping import Array


class Stream(enum.IntEnum):
    """What is drawn. A number that was given away stays its stream's, or old runs change; they are
    large, for `jax.random.split(key)[i]` is `fold_in(key, i)`."""

    PARAMETERS = 1_000_001
    """The first weights of a model without a checkpoint."""
    ROLLOUT = 1_000_002
    """The tokens of a step's responses."""
    EVALUATION = 1_000_003
    """The tokens of an evaluation's responses, the same at every step."""
    ORDER = 1_000_004
    """The questions of an epoch."""
    REPROMPT = 1_000_005
    """The demonstrations of a step."""
    WARM_START = 1_000_006
    """The worked examples of a supervised step."""
    MINI_BATCHES = 1_000_007
    """The order of a step's questions in a pass over its rollout."""
    SCREENING = 1_000_021
    """The tokens of the responses that tell which questions are hard."""
    DISCOVERY = 1_000_022
    """The tokens of the attempts at a hard question, and what a teacher is shown of them."""
    ADAPTERS = 1_000_011
    """The first adapters, folded into the key of the parameters."""


def key(seed: int, stream: Stream, *place: int) -> Array:
    """The key of a stream, at a place in it such as the step.

    A bare `jax.random.key(seed)` is nobody's: what one part splits off it, another would fold in.
    """
    found = jax.random.fold_in(jax.random.key(seed), stream)
    for index in place:
        found = jax.random.fold_in(found, index)
    return found


def generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """The same for what is drawn on the host.

    Seeds that are lists would not do: numpy fills them up with zeros, so `[seed]` is `[seed, 0]`.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *place)))
