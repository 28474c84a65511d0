"""The state of training: what an update changes, before the first one and as shapes alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from pgpo_jax.optimizer import init_state, state_shardings


class TrainState(NamedTuple):
    """All that changes from step to step; random keys and data order derive from `step`."""

    step: Any
    """Steps done, a scalar int32; one with skipped updates counts."""
    student: Any
    """What is trained, float32: all parameters, or adapters."""
    teacher: Any
    """The student's exponential moving average, float32."""
    opt_state: Any
    """State of the optimizer chain."""


def train_state_shardings(
    params: Any, optimizer: optax.GradientTransformation, teacher: Any = None
) -> TrainState:
    """Where a state lives, given parameters (or `jax.ShapeDtypeStruct`) that live on a mesh, and
    those of the teacher where it is another model."""
    where = jax.tree.map(lambda p: p.sharding, params)
    everywhere = NamedSharding(jax.tree.leaves(where)[0].mesh, PartitionSpec())
    theirs = where if teacher is None else jax.tree.map(lambda p: p.sharding, teacher)
    return TrainState(everywhere, where, theirs, state_shardings(optimizer, params))


def init_train_state(
    params: Any, optimizer: optax.GradientTransformation, teacher: Any = None
) -> TrainState:
    """The state before the first update: the teacher is a copy of the student, or another model."""
    where = train_state_shardings(params, optimizer, teacher)
    return TrainState(
        step=jax.jit(lambda: jnp.zeros([], jnp.int32), out_shardings=where.step)(),
        student=params,
        # A copy: the student's buffers are donated.
        teacher=jax.tree.map(jnp.copy, params) if teacher is None else teacher,
        opt_state=init_state(optimizer, params),
    )


def with_fresh_teacher(state: TrainState) -> TrainState:
    """The state whose teacher is the student of now, in memory of its own."""
    return state._replace(teacher=jax.tree.map(jnp.copy, state.student))


def abstract_train_state(
    params: Any, optimizer: optax.GradientTransformation, teacher: Any = None
) -> TrainState:
    """Shapes, types and shardings of a state, without its memory."""
    student, theirs = (
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), tree)
        for tree in (params, params if teacher is None else teacher)
    )
    opt_state = jax.eval_shape(optimizer.init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), student, theirs, opt_state)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        train_state_shardings(params, optimizer, teacher),
    )
