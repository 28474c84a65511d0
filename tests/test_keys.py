"""Random streams: none is another's."""

import itertools

import jax
import numpy as np

from pgpo_jax import keys
from pgpo_jax.keys import Stream

PLACES = [(), (0,), (1,), (7,)]


def test_no_two_streams_share_a_key_nor_does_one_stand_on_a_bare_seed():
    drawn = {
        tuple(jax.random.key_data(keys.key(seed, stream, *place)).tolist())
        for seed, stream, place in itertools.product((0, 1), Stream, PLACES)
    }
    assert len(drawn) == 2 * len(Stream) * len(PLACES)
    bare = [jax.random.key(seed) for seed in (0, 1)]
    halves = [half for key in bare for half in jax.random.split(key)]
    assert not drawn & {tuple(jax.random.key_data(key).tolist()) for key in [*bare, *halves]}


def test_no_leaf_of_a_model_is_drawn_with_the_key_of_a_rollout():
    """The leaves fold their number into the key of the parameters."""
    parameters = keys.key(0, Stream.PARAMETERS)
    leaves = {
        tuple(jax.random.key_data(jax.random.fold_in(parameters, leaf)).tolist())
        for leaf in range(64)
    }
    others = {
        tuple(jax.random.key_data(keys.key(0, stream, *place)).tolist())
        for stream in set(Stream) - {Stream.PARAMETERS}
        for place in PLACES
    }
    assert not leaves & others


def test_no_two_generators_draw_the_same_and_each_draws_the_same_again():
    """As lists, seeds would: numpy takes [5] and [5, 0] for one."""
    first = {
        (seed, stream, place): keys.generator(seed, stream, *place).integers(2**63)
        for seed, stream, place in itertools.product((0, 5), Stream, PLACES)
    }
    assert len(set(first.values())) == len(first)
    plain = [np.random.default_rng(seed).integers(2**63) for seed in (0, 5, [5, 0], [0, 4])]
    assert not set(first.values()) & set(plain)
    for (seed, stream, place), value in first.items():
        assert keys.generator(seed, stream, *place).integers(2**63) == value
