"""The objective: what a response weighs in the loss, and the loss of its tokens; by default SDPO's.

Rivals are other values of `Objective`, made in `methods/`; the update knows none of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgpo_jax import losses
from pgpo_jax.fused import Side, Terms


class GroupStatistics(NamedTuple):
    """What the rewards of a group say of each of its responses; made on the host."""

    success: Bool[Array | np.ndarray, "*response"]
    """Whether the reward reaches the threshold."""
    success_rate: Float[Array | np.ndarray, "*response"]
    """The share of successes in the response's group."""
    advantages: Float[Array | np.ndarray, "*response"]
    """The reward relative to the group's."""


class Responses(NamedTuple):
    """What is known of every response of a batch, on all devices."""

    lengths: Int[Array, " response"]
    """Its tokens."""
    has_context: Bool[Array, " response"]
    """Whether its teacher got a demonstration or feedback."""
    group: GroupStatistics | None = None
    """What the rewards say; None where nobody judged them."""
    has_wrong: Bool[Array, " response"] | None = None
    """Whether the group has a wrong response that a prompt can show."""


class Weights(NamedTuple):
    """What the tokens of every response weigh; taken from the whole batch, so that micro-batches
    cannot change it. The update spreads each array over the response's tokens."""

    distillation: Float[Array, "*response"]
    """Weight of the divergence from the teacher."""
    policy: Any = None
    """What a policy gradient reads, its field `weights` included (`fused.Tokens.policy`)."""
    rehearsal: Float[Array, "*response"] | None = None
    """Weight of a response's log-likelihood after the teacher's prompt."""


class Forward(NamedTuple):
    """The forward passes over one micro-batch, for a loss to call."""

    student: Callable[[str], Side]
    """The student after the prompts of a view; the gradient flows here."""
    teacher: Callable[[str], Side]
    """The teacher after the prompts of a view."""
    distill: Callable[..., tuple[Array, Terms]]
    """`fused.distill` of two sides, the weights of the divergence, a policy gradient or None, and
    the teacher's hidden states without its context, for a target that reads them."""
    score: Callable[[Side], Float[Array, " tokens"]]
    """Log-probs of the response tokens, without gradient."""
    cross_entropy: Callable[[Side, Float[Array, " tokens"]], Array]
    """Sum over the response tokens of weight * -log-prob, nats; the gradient flows."""
    to_mean_1: Callable[[Float[Array, " tokens"]], Float[Array, " tokens"]]
    """Positive values of tokens over their mean over each response."""
    estimator: str
    """Name of the information estimate that the multiplier reads, among `Terms.information`."""


class Objective(NamedTuple):
    """Which loss the student minimises."""

    weights: Callable[[Responses, Int[Array, ""], losses.Aggregation], tuple[Weights, Array]]
    """(responses, steps done, aggregation) -> the weights, and whether anything is learned. That is
    for masks and counts to say: a float computed to be 0 need not be."""
    loss: Callable[[Forward, Weights], tuple[Array, Terms, dict[str, Array]]]
    """(forward passes, weights of tokens) -> the loss, what was measured at the tokens, and further
    measurements, summed over micro-batches."""
    policy_terms: Callable[..., tuple[Array, Array]] | None = None
    """`fused.Options.policy_terms`, for objectives with a policy gradient."""
    target: Callable[..., Array] | None = None
    """`fused.Options.target`, for objectives that pull the student to another distribution."""


def sdpo_weights(
    responses: Responses, step: Int[Array, ""], aggregation: losses.Aggregation
) -> tuple[Weights, Bool[Array, ""]]:
    """Responses with a teacher context, weighed by `aggregation`."""
    del step
    lengths, context = responses.lengths, responses.has_context
    weights = Weights(losses.aggregation_weights(lengths, context, aggregation))
    return weights, jnp.any(context & (lengths > 0))


def sdpo_loss(forward: Forward, weights: Weights) -> tuple[Array, Terms, dict[str, Array]]:
    """The divergence of the student, after its prompt, from the teacher, after its own."""
    sides = forward.student("student"), forward.teacher("teacher")
    loss, terms = forward.distill(*sides, weights.distillation, None)
    return loss, terms, {}


SDPO = Objective(sdpo_weights, sdpo_loss)
"""Self-distillation alone (Hübotter et al., SDPO, https://arxiv.org/abs/2601.20802)."""


def weighted_sum(terms: Float[Array, " tokens"], weights: Float[Array, " tokens"]) -> Array:
    """Sum of the terms by their weights; where the weight is 0 a term may be anything."""
    return jnp.sum(jnp.where(weights != 0, terms, 0) * weights)
