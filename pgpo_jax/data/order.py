"""The order of the questions: one permutation an epoch, and one a pass over a step's responses;
replayable at any step."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from pgpo_jax import keys
from pgpo_jax.data.records import DataConfig
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


def mini_batches(
    seed: int, step: int, questions: int, config: DataConfig
) -> Iterator[Int[Host, " question"]]:
    """Which of a host's questions each update of step `step` (from 0) uses, in their order.

    Each of the `passes` deals all of them, in an order of its own, into `updates_per_rollout` equal
    parts. All hosts draw the same places, so their parts meet in the same updates.

    Args:
      seed: The run's.
      step: Whose updates.
      questions: This host's, divisible by `updates_per_rollout`.
      config: Passes and updates.
    """
    for index in range(config.passes):
        rng = keys.generator(seed, keys.Stream.MINI_BATCHES, step, index)
        order = rng.permutation(questions).reshape(config.updates_per_rollout, -1)
        yield from np.sort(order, axis=1)
