"""One update as one jitted function: both forwards, divergence, information, optimizer, teacher."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pgpo_jax import information, losses, packing, sharding
from pgpo_jax.data import Batch
from pgpo_jax.fused import distill
from pgpo_jax.optimizer import information_state, init_state, state_shardings
from pgpo_jax.packing import Packed


class TrainState(NamedTuple):
    """All that changes from step to step; random keys and data order derive from `step`."""

    step: Any
    """Steps done, a scalar int32; a skipped update counts."""
    student: Any
    """Parameters, float32."""
    teacher: Any
    """The student's exponential moving average, float32."""
    opt_state: Any
    """State of the optimizer chain."""


def train_state_shardings(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Where a state lives, given parameters (or `jax.ShapeDtypeStruct`) that live on a mesh."""
    where = jax.tree.map(lambda p: p.sharding, params)
    everywhere = NamedSharding(jax.tree.leaves(where)[0].mesh, PartitionSpec())
    return TrainState(everywhere, where, where, state_shardings(optimizer, params))


def init_train_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update: the teacher is a copy of the student."""
    where = train_state_shardings(params, optimizer)
    return TrainState(
        step=jax.jit(lambda: jnp.zeros([], jnp.int32), out_shardings=where.step)(),
        student=params,
        teacher=jax.tree.map(jnp.copy, params),  # a copy: the student's buffers are donated
        opt_state=init_state(optimizer, params),
    )


def abstract_train_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, types and shardings of a state, without its memory."""
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), shapes, shapes, jax.eval_shape(optimizer.init, params)
    )
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        train_state_shardings(params, optimizer),
    )


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    config: losses.DistillationConfig,
    shardings: TrainState,
    *,
    micro_batches: int = 1,
    vocab_size: int | None = None,
    estimators: Sequence[information.Estimator] = (),
) -> Callable[[TrainState, Batch | Packed], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Builds the jitted update: both forwards, divergence, information, optimizer, teacher.

    An update is skipped, the state but for `step` left as it was, when no response has a teacher
    context (Adam's momentum would still move the weights) or when gradient or information are
    not finite; the measurement `skipped` says so.

    Args:
      graphdef: The model of student and teacher.
      optimizer: A chain whose `update` takes `information`.
      config: Divergence, estimator, aggregation, the teacher's rate.
      shardings: Where the state lives (`train_state_shardings`); rows are split over the `data`
        and `fsdp` axes of its mesh.
      micro_batches: Parts that the rows of a batch are worked through in. Loss, information and
        gradients are those of the whole batch, however it is split. A `Packed` batch has its own.
      vocab_size: Vocabulary rows from this one on are padding.
      estimators: Further estimators to measure, besides the one that the multiplier reads.

    Returns:
      `(state, batch) -> (state, measurements)`; the state is donated. Measurements are float32
      scalars in the units of their definitions (nats per response token).
    """
    mesh = shardings.step.mesh
    wanted = tuple(dict.fromkeys((config.estimator, *estimators)))

    def loss_fn(student, teacher, batch: Batch | Packed, weights):
        model, teacher_model = nnx.merge(graphdef, student), nnx.merge(graphdef, teacher)
        loss, terms = distill(
            packing.response_hidden(model, batch, "student"),
            model.head(),
            packing.response_hidden(teacher_model, batch, "teacher"),
            teacher_model.head(),
            _flat(batch.responses),
            _flat(weights["loss"]),
            _flat(batch.sampler_log_probs),
            config=config,
            vocab_size=vocab_size,
            estimators=wanted,
            mesh=mesh,
        )
        context, every = _flat(weights["context"]), _flat(weights["every"])
        mismatch = jnp.abs(terms.token_log_probs - _flat(batch.sampler_log_probs))
        measured = {
            "information": _weighted(terms.information[config.estimator], context),
            "divergence": _weighted(terms.divergence, context),
            "entropy/student": _weighted(terms.student_entropy, context),
            "entropy/teacher": _weighted(terms.teacher_entropy, context),
            "importance_weight": _weighted(terms.weight, every),
            "sampler_mismatch": _weighted(mismatch, every),
            **{
                f"information/{name}": _weighted(terms.information[name], context)
                for name in estimators
            },
        }
        return loss, {"loss": loss, **measured}

    def gradients(student, teacher, batch: Batch | Packed, weights):
        """Summed over micro-batches; the weights were fixed on the whole batch."""
        grad_fn = jax.grad(loss_fn, has_aux=True)
        packed = isinstance(batch, Packed)
        count = packing.micro_batches(batch, mesh) if packed else micro_batches
        if count == 1:
            return grad_fn(student, teacher, batch, weights)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, grad_fn(student, teacher, *part)), None

        parts = jax.tree.map(functools.partial(_split, parts=count, mesh=mesh), (batch, weights))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(grad_fn, student, teacher, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(accumulate, zeros, parts)[0]

    def train_step(state: TrainState, batch: Batch | Packed):
        lengths, context = packing.response_lengths(batch), jnp.asarray(batch.has_context).ravel()
        per_response = {
            "loss": losses.response_weights(lengths, context, config.aggregation),
            "context": information.response_weights(lengths, context),
            "every": information.response_weights(lengths, jnp.ones_like(context)),
        }
        weights = {name: packing.to_tokens(batch, x) for name, x in per_response.items()}
        grads, measured = gradients(state.student, state.teacher, batch, weights)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & ~jnp.isnan(measured["information"])

        def update(state: TrainState):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.student, information=measured["information"]
            )
            student = optax.apply_updates(state.student, updates)
            teacher = optax.incremental_update(student, state.teacher, config.ema_rate)
            return TrainState(state.step, student, teacher, opt_state), optax.tree.norm(updates)

        def skip(state: TrainState):
            return state, jnp.zeros([])

        state, update_norm = jax.lax.cond(finite & jnp.any(context), update, skip, state)
        distance = optax.tree.norm(jax.tree.map(jnp.subtract, state.student, state.teacher))
        measured |= {
            "multiplier": information_state(state.opt_state).multiplier,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "teacher_student_distance": distance,
            "finite": finite.astype(jnp.float32),
            "skipped": 1.0 - (finite & jnp.any(context)),
            "padding_fraction": packing.padding_fraction(batch),
        }
        return state._replace(step=state.step + 1), measured

    # Without stated shardings the partitioner may move the state from one step to the next.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def _flat(x: Any) -> Array:
    """`[row, time]` or `[part, token]` -> `[token]`."""
    return x.reshape(-1)


def _weighted(terms: Array, weights: Array) -> Array:
    """Weighted sum; where the weight is 0 a term may be anything."""
    return jnp.sum(jnp.where(weights > 0, terms, 0) * weights)


def _split(x: Array, parts: int, mesh: Mesh) -> Array:
    """Rows -> `[part, row, ...]`, each spread over all devices: row r goes to part r % parts.

    The first axis of a `Packed` is by device, then by micro-batch, so it is split the same way.
    """
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    where = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
    return jax.lax.with_sharding_constraint(x, where)
