"""The vocabulary pass: hidden states -> divergence, information and log-probs, without logits `[N, vocab]`.

One pass over chunks of tokens. The maths is that of `losses` and `information`, called on one chunk's logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgpo_jax import distributions, information, losses


class Terms(NamedTuple):
    """What the pass measures at every token, `[N]` float32 each, in nats; nothing here carries a gradient."""

    divergence: Array
    token_log_probs: Array
    teacher_token_log_probs: Array
    student_entropy: Array
    teacher_entropy: Array
    information: dict[str, Array]
    weight: Array


def distill(
    student_hidden: Float[Array, "tokens embed"],
    student_head: Float[Array, "vocab embed"],
    teacher_hidden: Float[Array, "tokens embed"],
    teacher_head: Float[Array, "vocab embed"],
    tokens: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    sampler_log_probs: Float[Array, " tokens"] | None = None,
    *,
    config: losses.DistillationConfig,
    vocab_size: int | None = None,
    estimators: Sequence[information.Estimator] = ("entropy_gap",),
) -> tuple[Float[Array, ""], Terms]:
    """Distillation loss of N tokens and everything that is measured at them."""
    count = tokens.shape[0]
    chunk = min(config.chunk_size, count)
    if sampler_log_probs is None or config.importance_cap is None:
        sampler_log_probs = None
    rows = (student_hidden, teacher_hidden, tokens, weights, sampler_log_probs)
    padding = -count % chunk

    def split(row):
        row = jnp.pad(row, [(0, padding)] + [(0, 0)] * (row.ndim - 1))
        return row.reshape(-1, chunk, *row.shape[1:])

    teacher_head = jax.lax.stop_gradient(teacher_head).astype(student_hidden.dtype)
    student_head = student_head.astype(student_hidden.dtype)

    @jax.checkpoint
    def step(loss, rows):
        hidden, teacher_rows, tokens, weights, sampled_under = rows
        weights = jax.lax.stop_gradient(weights)
        student = _logits(hidden, student_head, vocab_size, config.temperature)
        teacher = _logits(jax.lax.stop_gradient(teacher_rows), teacher_head, vocab_size, config.temperature)
        terms = token_terms(student, teacher, tokens, sampled_under, config, estimators)
        weights = weights * terms.weight
        loss += jnp.sum(jnp.where(weights > 0, terms.divergence, 0) * weights)
        return loss, jax.lax.stop_gradient(terms)

    loss, terms = jax.lax.scan(step, jnp.zeros(()), jax.tree.map(split, rows))
    return loss, jax.tree.map(lambda x: x.reshape(-1)[:count], terms)


def token_terms(student, teacher, tokens, sampler_log_probs, config, estimators) -> Terms:
    """Everything at the tokens whose logits are given; only `divergence` carries a gradient."""
    log_s, log_q = distributions.log_probs(student), distributions.log_probs(teacher)
    token_log_probs = information.at_tokens(log_s, tokens)
    teacher_token_log_probs = information.at_tokens(log_q, tokens)
    if config.kind == "sampled":
        divergence = losses.sampled_divergence(token_log_probs, teacher_token_log_probs)
    else:
        divergence = losses.divergence(
            student, teacher, kind=config.kind, jsd_weight=config.jsd_weight, top_k=config.top_k, tail=config.tail
        )
    weight = jnp.ones_like(token_log_probs)
    if sampler_log_probs is not None:
        weight = losses.importance_weight(token_log_probs, sampler_log_probs, config.importance_cap)
    measured = dict(
        token_log_probs=token_log_probs,
        teacher_token_log_probs=teacher_token_log_probs,
        student_entropy=distributions.entropy(log_s),
        teacher_entropy=distributions.entropy(log_q),
        information={name: information.terms(name, student, teacher, tokens) for name in estimators},
        weight=weight,
    )
    return Terms(divergence=divergence, **jax.lax.stop_gradient(measured))


def _logits(hidden, head, vocab_size, temperature):
    logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return distributions.mask_padding(logits / temperature, vocab_size)
