"""One update as one jitted function: both forwards, divergence, information, optimizer, teacher."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pgpo_jax import information, losses, methods, sharding
from pgpo_jax.data import Batch, Packed, packing
from pgpo_jax.fused import distill, score
from pgpo_jax.methods import SDPO, ObjectiveConfig, Policy
from pgpo_jax.models import GraphDef, merge
from pgpo_jax.optimizer import information_state
from pgpo_jax.state import TrainState
from pgpo_jax.teacher import AVERAGE, TeacherConfig, mix_logits, refresh


def make_train_step(
    graphdef: GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    config: losses.DistillationConfig,
    shardings: TrainState,
    *,
    objective: ObjectiveConfig = SDPO,
    teacher_config: TeacherConfig = AVERAGE,
    teacher_graphdef: GraphDef | None = None,
    micro_batches: int = 1,
    vocab_size: int | None = None,
    estimators: Sequence[information.Estimator] = (),
    per_token: bool = False,
) -> Callable[[TrainState, Batch | Packed], tuple[TrainState, dict[str, Float[Array, "..."]]]]:
    """Builds the jitted update: both forwards, divergence, information, optimizer, teacher.

    An update is skipped, the state but for `step` left as it was, when no token adds to the loss
    (for SDPO: none of a response with a teacher context is there; Adam's momentum would still move
    the weights) or when loss, information or gradient is not finite; the measurements `skipped`
    and `finite` say so.

    Args:
      graphdef: The model of student and teacher.
      optimizer: A chain whose `update` takes `information`.
      config: Divergence, estimator, aggregation.
      shardings: Where the state lives (`train_state_shardings`); rows are split over the `data`
        and `fsdp` axes of its mesh.
      objective: Which loss; the default is SDPO's. Others read `Batch.judged`, some
        `Batch.evidence`.
      teacher_config: How the teacher follows the student.
      teacher_graphdef: The teacher's model where it is another one, of the same vocabulary.
      micro_batches: Parts that the rows of a batch are worked through in. Loss, information and
        gradients are those of the whole batch, however it is split. A `Packed` batch has its own.
      vocab_size: Vocabulary rows from this one on are padding.
      estimators: Further estimators to measure, besides the one that the multiplier reads.
      per_token: Whether to give the divergence of every token too, as `token_divergence`,
        in the shape of the batch's `responses`; outside the response mask it may be anything.

    Returns:
      `(state, batch) -> (state, measurements)`; the state is donated. Measurements are float32
      scalars in the units of their definitions (nats per response token).
    """
    mesh = shardings.step.mesh
    wanted = tuple(dict.fromkeys((config.estimator, *estimators)))
    vocabulary = {"config": config, "vocab_size": vocab_size, "mesh": mesh}
    vocabulary_pass: Any = functools.partial(distill, **vocabulary)

    def policy_of(batch: Batch | Packed, weights, log_probs_in) -> Policy | None:
        """What the policy gradient reads; `log_probs_in(view)` scores the responses."""
        if not objective.policy:
            return None
        names = ("policy", "advantages", "advantage_weight")
        policy = Policy(*(_flat(weights[name]) for name in names))
        if objective.needs_evidence:
            policy = policy._replace(with_right=log_probs_in("right"))
        if objective.advantage == "contrast":
            has_wrong = packing.to_tokens(batch, packing.has_wrong(batch))
            policy = policy._replace(with_wrong=log_probs_in("wrong"), has_wrong=_flat(has_wrong))
        return policy

    def rehearse(model, batch: Batch | Packed, weights: Array) -> tuple[Array, Array]:
        """A term whose gradient is that of the cross-entropy after the teacher's prompts, and this.

        It is the policy gradient of an advantage of 1 on the student's own ratio.
        """
        inputs = packing.response_hidden(model, batch, "teacher"), model.head()
        none = jnp.zeros_like(weights)
        policy = Policy(weights, advantages=none + 1, advantage_weight=none)
        fixed = jax.lax.stop_gradient(inputs)
        term, terms = vocabulary_pass(
            *(*inputs, *fixed, _flat(batch.responses), none), None, policy, estimators=()
        )
        return term, _weighted(-terms.token_log_probs, weights)

    def loss_fn(student, teacher, batch: Batch | Packed, weights):
        tokens, sampled = _flat(batch.responses), _flat(batch.sampler_log_probs)
        model = merge(graphdef, student)
        teacher_model = merge(teacher_graphdef or graphdef, teacher)
        hidden = packing.response_hidden(model, batch, "student")
        teaching = packing.response_hidden(teacher_model, batch, "teacher"), teacher_model.head()
        if teacher_config.refresh == "trust_region":
            live = merge(graphdef, jax.lax.stop_gradient(student))
            its = packing.response_hidden(live, batch, "teacher"), live.head()
            teaching = mix_logits(*teaching, *its, teacher_config.mix)
        inputs = (hidden, model.head(), *teaching, tokens)

        def log_probs_in(view: str):
            seen = packing.response_hidden(teacher_model, batch, view)
            return score(seen, teacher_model.head(), tokens, **vocabulary)

        weight = weights["distillation"]
        if objective.token_weight != "uniform":  # they need every token of a response at once
            _, terms = vocabulary_pass(
                *jax.lax.stop_gradient(inputs), _flat(weight), estimators=(config.estimator,)
            )
            gaps = terms.information[config.estimator]
            raw = methods.token_weights(objective, terms.teacher_entropy, gaps)
            weight *= packing.to_mean_1(batch, raw.reshape(weight.shape))
        policy = policy_of(batch, weights, log_probs_in)
        loss, terms = vocabulary_pass(
            *inputs, _flat(weight), sampled, policy, objective=objective, estimators=wanted
        )
        context, every = _flat(weights["context"]), _flat(weights["every"])
        mismatch = jnp.abs(terms.token_log_probs - sampled)
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
        measured["loss"] = loss
        if policy is not None:
            measured["loss/policy"] = _weighted(terms.policy, policy.weights)
        if objective.rehearsal:
            term, measured["loss/rehearsal"] = rehearse(model, batch, _flat(weights["rehearsal"]))
            loss += term
        return loss, (measured, terms.divergence.reshape(batch.responses.shape))

    def gradients(student, teacher, batch: Batch | Packed, weights):
        """Summed over micro-batches, whose weights were fixed on the whole batch; and per token."""
        grad_fn = jax.grad(loss_fn, has_aux=True)
        packed = isinstance(batch, Packed)
        count = packing.micro_batches(batch, mesh) if packed else micro_batches
        if count == 1:
            return grad_fn(student, teacher, batch, weights)

        def accumulate(total, part):
            grads, (measured, divergence) = grad_fn(student, teacher, *part)
            return jax.tree.map(jnp.add, total, (grads, measured)), divergence

        parts = jax.tree.map(functools.partial(_split, parts=count, mesh=mesh), (batch, weights))
        first = jax.tree.map(lambda x: x[0], parts)
        grads, (measured, _) = jax.eval_shape(grad_fn, student, teacher, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, measured))
        (grads, measured), divergence = jax.lax.scan(accumulate, zeros, parts)
        return grads, (measured, _join(divergence))

    def train_step(state: TrainState, batch: Batch | Packed):
        per_response, active = _weights(config, objective, batch, state.step)
        weights = {name: packing.to_tokens(batch, x) for name, x in per_response.items()}
        grads, (measured, divergence) = gradients(state.student, state.teacher, batch, weights)
        grad_norm = optax.tree.norm(grads)
        numbers = (measured["loss"], measured["information"], grad_norm)
        finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, numbers))
        learns = finite & active

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

        state, update_norm = jax.lax.cond(learns, update, skip, state)
        if teacher_graphdef is None:
            distance = optax.tree.norm(jax.tree.map(jnp.subtract, state.student, state.teacher))
            measured["teacher_student_distance"] = distance
        measured |= {
            "multiplier": information_state(state.opt_state).multiplier,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "finite": finite.astype(jnp.float32),
            "skipped": 1.0 - learns,
            "padding_fraction": packing.padding_fraction(batch),
        }
        if per_token:
            measured["token_divergence"] = divergence
        return state._replace(step=state.step + 1), jax.tree.map(place, measured)

    def place(x: Array) -> Array:
        """Numbers are on every device, rows where the batch's are."""
        where = sharding.row_sharding(x.shape, mesh) if x.ndim else shardings.step
        return jax.lax.with_sharding_constraint(x, where)

    # Without stated shardings the partitioner may move the state from one step to the next.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _weights(
    config: losses.DistillationConfig,
    objective: ObjectiveConfig,
    batch: Batch | Packed,
    step: Array,
) -> tuple[dict[str, Array], Array]:
    """The weight of every response's tokens in the loss and in the measurements, from the whole
    batch, so that micro-batches cannot change it; and whether the batch adds to the loss at all."""
    lengths, context = packing.response_lengths(batch), jnp.asarray(batch.has_context).ravel()
    unknown = methods.Judged(jnp.zeros_like(context), *[jnp.zeros(context.shape)] * 2)
    judged = jax.tree.map(jnp.ravel, batch.judged or unknown)
    routes = methods.route(objective, judged.success, context)
    per_token = losses.response_weights(
        lengths, routes.policy | routes.distillation, config.aggregation
    )
    weights = {
        "distillation": methods.distillation_coefficient(objective, step)
        * methods.question_weights(objective, judged.share)
        * per_token
        * routes.distillation,
        "context": information.response_weights(lengths, context),
        "every": information.response_weights(lengths, jnp.ones_like(context)),
    }
    if objective.rehearsal:
        rehearsed = information.response_weights(lengths, context & judged.success)
        weights["rehearsal"] = objective.rehearsal * rehearsed
    counts = lengths > 0
    active = jnp.any((weights["distillation"] != 0) & counts)
    if objective.policy:
        evidence = jnp.full(context.shape, methods.advantage_weight(objective, step))
        matters = judged.advantages != 0
        if objective.advantage == "choice":  # without a context its choice is the student's own
            evidence *= context
            matters |= evidence != 0  # a gradient even where all rewards are equal
        weights |= {
            "policy": objective.policy * per_token * routes.policy,
            "advantages": judged.advantages,
            "advantage_weight": evidence,
        }
        active |= jnp.any((weights["policy"] != 0) & matters & counts)
    return weights, active


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


def _join(x: Array) -> Array:
    """`[part, row, ...]` -> rows, as they were before `_split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
