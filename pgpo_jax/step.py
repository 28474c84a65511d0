"""One update as one jitted function: both forwards, divergence, information, optimizer, teacher."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pgpo_jax import fused, information, sharding
from pgpo_jax.data import (
    Batch,
    micro_batches,
    padding_fraction,
    response_hidden,
    responses_of,
    to_mean_1,
    to_means,
    to_tokens,
)
from pgpo_jax.fused import Side, Terms
from pgpo_jax.models import GraphDef, Params, join, merge
from pgpo_jax.objective import SDPO, Forward, Objective, weighted_sum
from pgpo_jax.optimizer import information_state
from pgpo_jax.state import TrainState
from pgpo_jax.teacher import AVERAGE, TeacherConfig, refresh, taught

Measured = dict[str, Float[Array, "..."]]


class _Each(NamedTuple):
    """Measurements that are no sums."""

    token_divergence: Float[Array, "part token"]
    response_information: Float[Array, "part response"]


def make_train_step(
    graphdef: GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    options: fused.Options,
    shardings: TrainState,
    *,
    objective: Objective = SDPO,
    teacher_config: TeacherConfig = AVERAGE,
    teacher_graphdef: GraphDef | None = None,
) -> Callable[..., tuple[TrainState, Measured]]:
    """Builds the jitted update: both forwards, divergence, information, optimizer, teacher.

    An update is skipped, the state but for `step` left as it was, when nothing is learned (for
    SDPO: no response with a teacher context is there; Adam's momentum would still move the
    weights) or when loss, information or gradient is not finite; the measurements `skipped` and
    `finite` say so. Micro-batches are those of the batch (`data.pack`): loss, information and
    gradients are those of the whole.

    Args:
      graphdef: The model of student and teacher.
      optimizer: A chain whose `update` takes `information`.
      options: Of the vocabulary pass. The multiplier reads `options.config.estimator`; the others
        are measured.
      shardings: Where the state lives (`train_state_shardings`), and on which mesh.
      objective: Which loss; the default is SDPO's. Others read `Batch.group`, some further views.
      teacher_config: How the teacher follows the student.
      teacher_graphdef: The teacher's model where it is another one, of the same vocabulary.

    Returns:
      `(state, batch, frozen=None, steps=1) -> (state, measurements)`; the state is donated, the
      parameters `frozen` beside adapters are not, and `steps` is 0 for all but the last of a step's
      updates. Measurements are float32 scalars in the units of their definitions (nats per response
      token); `token_divergence` of the batch's `responses`, anything outside their mask; and
      `response_information`, `[part, response]`, nats per token.
    """
    mesh, aggregation = shardings.step.mesh, options.config.aggregation
    hooks = {"policy_terms": objective.policy_terms, "target": objective.target}
    options = dataclasses.replace(options, mesh=mesh, **hooks)
    models = graphdef, teacher_graphdef or graphdef

    def loss_fn(student, teacher, frozen, batch: Batch, weights):
        weights = jax.tree.map(_flat, weights)
        whole = join(student, frozen), join(teacher, frozen if teacher_graphdef is None else None)
        forward = _forward(whole, models, batch, options, teacher_config)
        loss, terms, measured = objective.loss(forward, weights["loss"])
        measured |= _measure(terms, weights, batch, options) | {"loss": loss}
        gaps = to_means(batch, terms.information[options.config.estimator])
        return loss, (measured, _Each(terms.divergence.reshape(batch.responses.shape), gaps))

    def train_step(state: TrainState, batch: Batch, frozen: Params | None = None, steps: Any = 1):
        weights, learns = _weights(objective, batch, state.step, aggregation)
        params = state.student, state.teacher, frozen
        grad_fn = functools.partial(jax.grad(loss_fn, has_aux=True), *params)
        grads, (measured, each) = _accumulate(grad_fn, batch, weights, mesh)
        grad_norm = optax.tree.norm(grads)
        numbers = jnp.stack([measured["loss"], measured["information"], grad_norm])
        finite = jnp.all(jnp.isfinite(numbers))

        def update(state: TrainState):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.student, information=measured["information"]
            )
            student = optax.apply_updates(state.student, updates)
            count = information_state(opt_state).count
            teacher = refresh(student, state.teacher, count, teacher_config)
            return TrainState(state.step, student, teacher, opt_state), optax.tree.norm(updates)

        def skip(state: TrainState):
            return state, jnp.zeros([])

        state, update_norm = jax.lax.cond(learns & finite, update, skip, state)
        if teacher_graphdef is None:
            distance = optax.tree.norm(jax.tree.map(jnp.subtract, state.student, state.teacher))
            measured["teacher_student_distance"] = distance
        measured |= {
            "multiplier": information_state(state.opt_state).multiplier,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "finite": finite.astype(jnp.float32),
            "skipped": 1.0 - (learns & finite),
            "padding_fraction": padding_fraction(batch),
            **each._asdict(),
        }
        place = functools.partial(_place, mesh=mesh, replicated=shardings.step)
        return state._replace(step=state.step + steps), jax.tree.map(place, measured)

    # Without stated shardings the partitioner may move the state from one step to the next.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_score(
    graphdef: GraphDef, options: fused.Options, mesh: Mesh
) -> Callable[..., Float[Array, "part token"]]:
    """Builds the jitted forward pass that gives the log-probs of a batch's response tokens.

    Args:
      graphdef: The student's model.
      options: Of the vocabulary pass: temperature, vocabulary, chunks.
      mesh: Where the batch is.

    Returns:
      `(student, batch, frozen=None) -> log-probs`, nats, in the shape of the batch's `responses`.
    """
    options = dataclasses.replace(options, mesh=mesh)

    @jax.jit
    def score(student, batch: Batch, frozen: Params | None = None):
        model = merge(graphdef, student, frozen)

        def over(part: Batch):
            side = Side(response_hidden(model, part, "student"), model.head())
            found = fused.score(side, _flat(part.responses), options)
            return found.reshape(part.responses.shape)

        count = micro_batches(batch, mesh)
        if count == 1:
            found = over(batch)
        else:
            parts = jax.tree.map(functools.partial(_split, parts=count, mesh=mesh), batch)
            found = _join(jax.lax.map(over, parts))
        where = sharding.row_sharding(found.shape, mesh)
        return jax.lax.with_sharding_constraint(found, where)

    return score


def _weights(
    objective: Objective, batch: Batch, step: Array, aggregation: Any
) -> tuple[dict[str, Any], Array]:
    """The weight of every token, in the loss and in the measurements, from the whole batch; and
    whether anything is learned."""
    responses = responses_of(batch)
    weights, learns = objective.weights(responses, step, aggregation)
    lengths, context = responses.lengths, responses.has_context
    per_response = {
        "loss": weights,
        "context": information.mean_weights(lengths, context),
        "every": information.mean_weights(lengths, jnp.ones_like(context)),
    }
    return jax.tree.map(functools.partial(to_tokens, batch), per_response), learns


def _forward(
    params: tuple[Any, Any],
    models: tuple[GraphDef, GraphDef],
    batch: Batch,
    options: fused.Options,
    teacher_config: TeacherConfig,
) -> Forward:
    """The forward passes over a micro-batch; `params` and `models` are student's and teacher's."""
    tokens, sampled = _flat(batch.responses), _flat(batch.sampler_log_probs)
    old = None if batch.old_log_probs is None else _flat(batch.old_log_probs)
    student, teacher = (merge(model, tree) for model, tree in zip(models, params, strict=True))
    live = merge(models[0], jax.lax.stop_gradient(params[0]))

    def after(model, view: str) -> Side:
        return Side(response_hidden(model, batch, view), model.head())

    def distill(student: Side, teacher: Side, weights: Array, policy: Any, plain: Any = None):
        rows = fused.Tokens(tokens, weights, sampled, policy, old)
        return fused.distill(student, teacher, rows, options, plain)

    return Forward(
        student=lambda view: after(student, view),
        teacher=lambda view: taught(lambda m: after(m, view), teacher, live, teacher_config),
        distill=distill,
        score=lambda side: fused.score(side, tokens, options),
        cross_entropy=lambda side, weights: fused.cross_entropy(side, tokens, weights, options),
        to_mean_1=lambda values: to_mean_1(batch, values),
        estimator=options.config.estimator,
    )


def _measure(
    terms: Terms, weights: dict[str, Any], batch: Batch, options: fused.Options
) -> dict[str, Array]:
    """Means over the tokens of responses with a teacher context, or of every response."""
    ours = terms.token_log_probs
    if batch.old_log_probs is not None:  # the updates since then are not the sampler's
        ours = _flat(batch.old_log_probs)
    mismatch = jnp.abs(ours - _flat(batch.sampler_log_probs))
    of_context = {
        "information": terms.information[options.config.estimator],
        "divergence": terms.divergence,
        "entropy/student": terms.student_entropy,
        "entropy/teacher": terms.teacher_entropy,
        **{f"information/{name}": terms.information[name] for name in options.estimators},
    }
    of_every = {"importance_weight": terms.weight, "sampler_mismatch": mismatch}
    return {
        name: weighted_sum(values, weights[kind])
        for kind, means in (("context", of_context), ("every", of_every))
        for name, values in means.items()
    }


def _accumulate(grad_fn: Callable[..., Any], batch: Batch, weights: Any, mesh: Mesh) -> Any:
    """Gradients and measurements summed over micro-batches, whose weights were fixed on the whole
    batch; and those of every token or response."""
    count, whole = micro_batches(batch, mesh), (batch, weights)
    if count == 1:
        return grad_fn(*whole)

    def add(total, part):
        grads, (measured, each) = grad_fn(*part)
        return jax.tree.map(jnp.add, total, (grads, measured)), each

    parts = jax.tree.map(functools.partial(_split, parts=count, mesh=mesh), whole)
    first = jax.tree.map(lambda x: x[0], parts)
    grads, (measured, _) = jax.eval_shape(grad_fn, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, measured))
    (grads, measured), each = jax.lax.scan(add, zeros, parts)
    return grads, (measured, jax.tree.map(_join, each))


def _place(x: Array, mesh: Mesh, replicated: Any) -> Array:
    """Numbers are on every device, rows where the batch's are."""
    where = sharding.row_sharding(x.shape, mesh) if x.ndim else replicated
    return jax.lax.with_sharding_constraint(x, where)


def _flat(x: Any) -> Array:
    """`[part, token]` -> `[token]`."""
    return x.reshape(-1)


def _split(x: Array, parts: int, mesh: Mesh) -> Array:
    """The first axis, which is by device, then by micro-batch -> `[micro-batch, device, ...]`, each
    micro-batch spread over all devices."""
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    where = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
    return jax.lax.with_sharding_constraint(x, where)


def _join(x: Array) -> Array:
    """`[micro-batch, device, ...]` -> as it was before `_split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
