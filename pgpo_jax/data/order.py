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


def mini_batches(seed: int, step: int, config: DataConfig) -> Iterator[Int[Host, " question"]]:
    """Which of the questions of step `step` (from 0) each of its updates uses, by their places.

    Each of the `passes` deals all of them, drawn anew, into `updates_per_rollout` equal parts: of
    every so many that follow one another each part gets one. Their order is a drawn one already,
    and so every host has equally many of each update, and the same updates whatever the number of
    hosts.
    """
    for index in range(config.passes):
        rng = keys.generator(seed, keys.Stream.MINI_BATCHES, step, index)
        places = np.arange(config.questions_per_step).reshape(-1, config.updates_per_rollout)
        yield from rng.permuted(places, axis=1).T
