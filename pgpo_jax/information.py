"""Estimates of the information I that the teacher's context carries about the student's responses.

Each estimator maps student and teacher logits to per-token terms in nats; `reduce` turns the terms
into the scalar I of PGPO (arXiv 2606.03620, eq. 8). They read the forward passes that the loss
needs anyway, and no gradient flows through them. The logits are those of the loss: full vocabulary,
already divided by the temperature.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgpo_jax import distributions

Estimator = Literal["entropy_gap", "conditional_kl", "jensen_shannon", "pointwise"]
ESTIMATORS = get_args(Estimator)


def entropy_gap(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
) -> Float[Array, "*tokens"]:
    """H(student) - H(teacher), the paper's estimator (eq. 8).

    Args:
      student_logits: Logits of the student, `[*tokens, vocab]`.
      teacher_logits: Logits of the teacher for the same response tokens, same shape.

    Returns:
      Nats per token, `[*tokens]`. Negative where the context makes the teacher less certain
      than the student.
    """
    log_s, log_q = distributions.log_probs(student_logits), distributions.log_probs(teacher_logits)
    return jax.lax.stop_gradient(distributions.entropy(log_s) - distributions.entropy(log_q))


def conditional_kl(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
) -> Float[Array, "*tokens"]:
    """KL(teacher || student), the exact integrand of a conditional mutual information; never
    negative.

    Args and Returns as `entropy_gap`.
    """
    log_s, log_q = distributions.log_probs(student_logits), distributions.log_probs(teacher_logits)
    return jax.lax.stop_gradient(distributions.kl(log_q, log_s))


def jensen_shannon(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
) -> Float[Array, "*tokens"]:
    """Jensen-Shannon divergence of student and teacher, in [0, ln 2].

    Args and Returns as `entropy_gap`.
    """
    log_s, log_q = distributions.log_probs(student_logits), distributions.log_probs(teacher_logits)
    return jax.lax.stop_gradient(distributions.jensen_shannon(log_s, log_q))


def pointwise(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    tokens: Int[Array, "*tokens"],
) -> Float[Array, "*tokens"]:
    """log teacher(y_t) - log student(y_t) at the sampled tokens.

    Its expectation under the student is -KL(student || teacher), so it is never positive in
    expectation: it means the opposite of the other estimators, and a multiplier built on it brakes
    where they accelerate.

    Args and Returns as `entropy_gap`, with the response `tokens`, `[*tokens]`.
    """
    log_s, log_q = distributions.log_probs(student_logits), distributions.log_probs(teacher_logits)
    return jax.lax.stop_gradient(at_tokens(log_q, tokens) - at_tokens(log_s, tokens))


def at_tokens(
    log_p: Float[Array, "*batch vocab"], tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The log-probabilities of the given tokens."""
    return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def terms(
    estimator: Estimator,
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    tokens: Int[Array, "*tokens"],
) -> Float[Array, "*tokens"]:
    """The per-token terms of the estimator of that name."""
    if estimator == "pointwise":
        return pointwise(student_logits, teacher_logits, tokens)
    from_logits = {
        "entropy_gap": entropy_gap,
        "conditional_kl": conditional_kl,
        "jensen_shannon": jensen_shannon,
    }
    return from_logits[estimator](student_logits, teacher_logits)


def reduce(
    terms: Float[Array, "batch time"],
    response_mask: Bool[Array, "batch time"],
    sample_mask: Bool[Array, " batch"],
) -> Float[Array, ""]:
    """Mean over a response's tokens, then mean over the responses that count.

    A sum over tokens would drive exp(alpha * I) to 0 or to rho_max; a response without a teacher
    context has a gap of 0 up to the EMA's lag and would dilute I.

    Args:
      terms: Nats per token, `[batch, time]`; values outside the masks do not matter, NaN included.
      response_mask: True at the tokens of a response.
      sample_mask: True for the responses that count (those with a teacher context), `[batch]`.

    Returns:
      I in nats per response token; 0 when no response counts.
    """
    lengths = jnp.sum(response_mask, axis=-1)
    weights = response_mask * mean_weights(lengths, sample_mask)[:, None]
    return jnp.sum(jnp.where(weights > 0, terms, 0) * weights)


def mean_weights(
    lengths: Int[Array, " batch"], sample_mask: Bool[Array, " batch"]
) -> Float[Array, " batch"]:
    """What `reduce` weighs each token of a response of so many tokens; over all tokens they sum to
    1, or to 0 when no response counts."""
    counts = sample_mask & (lengths > 0)
    return counts / (jnp.maximum(lengths, 1) * jnp.maximum(jnp.sum(counts), 1))
