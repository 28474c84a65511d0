"""The order of the questions: one permutation an epoch, replayable at any step."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int

from pgpo_jax import keys
from pgpo_jax.errors import InputError

Host = np.ndarray


@functools.lru_cache(maxsize=2)  # a step needs one epoch's order; the next epoch's replaces it
def _epoch_order(seed: int, epoch: int, total: int) -> np.ndarray:
    return keys.generator(seed, keys.Stream.ORDER, epoch).permutation(total)


def batch_indices(
    seed: int, step: int, total: int, questions_per_step: int
) -> Int[Host, " question"]:
    """Which questions step `step` (from 0) uses: a pure function, so any step can be replayed.

    Each epoch is a fresh permutation of all questions; its last partial batch is dropped.

    Raises:
      InputError: if there are fewer questions than one step needs.
    """
    steps_per_epoch = total // questions_per_step
    if steps_per_epoch == 0:
        raise InputError(
            f"data.questions_per_step: got {questions_per_step}, must be at most the number of "
            f"training questions, {total}"
        )
    epoch, position = divmod(step, steps_per_epoch)
    start = position * questions_per_step
    return _epoch_order(seed, epoch, total)[start : start + questions_per_step].copy()
