"""The distillation loss of SDPO (arXiv 2601.20802): divergences, token weights, importance weights,
aggregation."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgpo_jax import distributions
from pgpo_jax.errors import require

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
Aggregation = Literal["sequence_mean", "token_mean"]


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """How the student is pulled towards the teacher, and how their information is estimated."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "sampled", "teacher_argmax"] = "jsd"
    """Divergence per response token; `sampled` is the cheap score-function estimate of the reverse
    KL, `teacher_argmax` the cross-entropy with the teacher's likeliest token (TGPO, reg). Where
    `objective.target` is another than the teacher, that stands in its place."""
    jsd_weight: float = 0.5
    """Weight w of the teacher in the mixture M = (1 - w) student + w teacher of `jsd`."""
    top_k: int | None = 100
    """Compare on the student's k largest logits; null takes the full vocabulary."""
    tail: bool = True
    """Keep the probability outside the top k in one more bucket; false renormalises over the k."""
    token_clip: float | None = None
    """Most nats that the divergence of one token counts, as few stylistic tokens may carry most of
    it (OPSD); a token above has this value and no gradient. null does not clip. OPSD itself clips
    every vocabulary entry's part; the clip of a token's sum is our reading."""
    temperature: float = 1.0
    """Both sides' logits are divided by it."""
    aggregation: Aggregation = "sequence_mean"
    """Mean over each response's tokens, then over all responses; or the mean over all tokens that
    count."""
    importance_cap: float | None = 2.0
    """Upper bound of the weight that corrects for the sampler's log-probs; null turns the
    correction off."""
    estimator: Literal["entropy_gap", "conditional_kl", "jensen_shannon", "pointwise"] = (
        "entropy_gap"
    )
    """What the multiplier reads as the information I."""
    chunk_size: int = 256
    """Response tokens (per device) whose logits exist at a time in the vocabulary pass."""

    def __post_init__(self):
        require(
            "distillation",
            self,
            jsd_weight=(0 < self.jsd_weight < 1, "between 0 and 1, both excluded"),
            top_k=(
                self.top_k is None or self.top_k >= 1,
                "at least 1, or null for the full vocabulary",
            ),
            token_clip=(
                self.token_clip is None or (self.token_clip > 0 and self.kind != "sampled"),
                "positive, or null; null with distillation.kind sampled, whose value is no "
                "divergence",
            ),
            temperature=(self.temperature > 0, "positive"),
            importance_cap=(
                self.importance_cap is None or self.importance_cap > 0,
                "positive, or null",
            ),
            chunk_size=(self.chunk_size >= 1, "at least 1"),
        )


def divergence(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    *,
    kind: Kind = "jsd",
    jsd_weight: float = 0.5,
    top_k: int | None = None,
    tail: bool = True,
) -> Float[Array, "*tokens"]:
    """Divergence of student S and teacher Q at every token, in nats.

    Args:
      student_logits: Logits over the temperature, `[*tokens, vocab]`; the gradient flows here
        only.
      teacher_logits: The teacher's, for the same tokens.
      kind: `forward_kl` is KL(Q || S), `reverse_kl` is KL(S || Q), `jsd` the weighted
        Jensen-Shannon divergence.
      jsd_weight: The teacher's weight in the mixture of `jsd`.
      top_k: Compare on the student's k largest logits; None takes the full vocabulary.
      tail: With `top_k`, whether the rest of both distributions is kept as one more bucket.

    Returns:
      Nats per token, `[*tokens]`.

    References:
      Hübotter et al., SDPO, https://arxiv.org/abs/2601.20802
    """
    log_s = distributions.log_probs(student_logits)
    log_q = jax.lax.stop_gradient(distributions.log_probs(teacher_logits))
    if top_k is not None and top_k < log_s.shape[-1]:
        log_s, log_q = _on_top_k(log_s, log_q, top_k, tail)
    if kind == "forward_kl":
        return distributions.kl(log_q, log_s)
    if kind == "reverse_kl":
        return distributions.kl(log_s, log_q)
    return distributions.jensen_shannon(log_s, log_q, jsd_weight)


def _on_top_k(log_s, log_q, top_k: int, tail: bool):
    """Both distributions on the student's top k, each under its own full normaliser."""
    indices = distributions.top_k_indices(jax.lax.stop_gradient(log_s), top_k)
    log_s = jnp.take_along_axis(log_s, indices, axis=-1)
    log_q = jnp.take_along_axis(log_q, indices, axis=-1)
    if tail:
        return _with_tail(log_s), _with_tail(log_q)
    return jax.nn.log_softmax(log_s, axis=-1), jax.nn.log_softmax(log_q, axis=-1)


def _with_tail(log_p):
    """Appends the bucket log(1 - sum of the top k); the bound keeps it finite where the top k hold
    everything."""
    inside = jax.nn.logsumexp(log_p, axis=-1, keepdims=True)
    rest = jnp.log(-jnp.expm1(jnp.minimum(inside, -1e-7)))
    return jnp.concatenate([log_p, rest], axis=-1)


def sampled_divergence(
    token_log_probs: Float[Array, "*tokens"], teacher_token_log_probs: Float[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """Score-function estimate of the reverse KL from the sampled tokens alone.

    Its gradient is, in expectation over the student's samples, the gradient of KL(student ||
    teacher); its value is not that divergence.
    """
    advantage = jax.lax.stop_gradient(token_log_probs - teacher_token_log_probs)
    return advantage * token_log_probs


def clip_divergence(
    per_token: Float[Array, "*tokens"], most: float | None
) -> Float[Array, "*tokens"]:
    """Nats per token, above `most` that number without a gradient; None leaves them as they are.

    References:
      Zhao et al., OPSD, https://arxiv.org/abs/2601.18734
    """
    return per_token if most is None else jnp.where(per_token > most, most, per_token)


def importance_weight(
    log_probs: Float[Array, "*tokens"],
    old_log_probs: Float[Array, "*tokens"],
    cap: float = 2.0,
) -> Float[Array, "*tokens"]:
    """min(exp(log_probs - old_log_probs), cap) without gradient; the difference is clipped to +-20
    first.

    Args:
      log_probs: Token log-probs under the policy being trained.
      old_log_probs: Token log-probs under the policy that sampled.
      cap: Upper bound of the weight.
    """
    return jax.lax.stop_gradient(jnp.minimum(importance_ratio(log_probs, old_log_probs), cap))


def importance_ratio(
    log_probs: Float[Array, "*tokens"], old_log_probs: Float[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """The probability over the old one; a gap of more than 20 nats counts as 20."""
    return jnp.exp(jnp.clip(log_probs - old_log_probs, -20.0, 20.0))


def loss_weights(
    response_mask: Bool[Array, "batch time"],
    sample_mask: Bool[Array, " batch"],
    mode: Aggregation = "sequence_mean",
) -> Float[Array, "batch time"]:
    """The weight of every token in the loss; computed once on the whole batch, so micro-batches
    cannot change it.

    `sequence_mean` gives a token of response i the weight 1 / (|y_i| N), where N counts all
    responses, those without a teacher context included; `token_mean` gives 1 / (number of tokens
    that count).
    """
    lengths = jnp.sum(response_mask, axis=-1)
    return response_mask * aggregation_weights(lengths, sample_mask, mode)[:, None]


def aggregation_weights(
    lengths: Int[Array, " batch"],
    sample_mask: Bool[Array, " batch"],
    mode: Aggregation = "sequence_mean",
) -> Float[Array, " batch"]:
    """The weight that `loss_weights` gives each token of a response of so many tokens."""
    if mode == "token_mean":
        return sample_mask / jnp.maximum(jnp.sum(sample_mask * lengths), 1)
    return sample_mask / (jnp.maximum(lengths, 1) * lengths.shape[0])


def aggregate(
    per_token: Float[Array, "batch time"],
    response_mask: Bool[Array, "batch time"],
    sample_mask: Bool[Array, " batch"],
    *,
    mode: Aggregation = "sequence_mean",
) -> Float[Array, ""]:
    """The scalar loss from per-token terms: their sum weighted by `loss_weights`.

    Args:
      per_token: Terms, `[batch, time]`; values outside the masks do not matter, NaN included.
      response_mask: True at the tokens of a response.
      sample_mask: True for the responses that have a teacher context, `[batch]`.
      mode: `sequence_mean` (SDPO's published code) or `token_mean`.
    """
    weights = loss_weights(response_mask, sample_mask, mode)
    return jnp.sum(jnp.where(weights > 0, per_token, 0) * weights)
