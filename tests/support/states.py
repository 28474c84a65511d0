"""Small states of training, to be saved and restored."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class TrainState(NamedTuple):
    step: Any
    student: Any
    teacher: Any
    opt_state: Any


OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.adamw(1e-3), {"layers": {"kernel": True}, "scale": False}),
    optax.scale_by_schedule(lambda count: 1.0 / (count + 1)),
)


def make_state(step=3, width=16):
    student = {
        "layers": {"kernel": jax.random.normal(jax.random.key(step), (8, width))},
        "scale": jnp.arange(width, dtype=jnp.bfloat16),
    }
    teacher = jax.tree.map(lambda leaf: leaf * 2, student)
    state = TrainState(jnp.int32(step), student, teacher, OPTIMIZER.init(student))
    return one_update(state)


def one_update(state):
    gradients = jax.tree.map(jnp.sin, state.student)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.student)
    student = optax.apply_updates(state.student, updates)
    return state._replace(student=student, opt_state=opt_state)


def assert_bitwise_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
