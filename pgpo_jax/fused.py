"""The vocabulary pass: hidden states -> divergence, information and log-probs, without logits `[tokens, vocab]`.

The logits of one chunk of tokens exist at a time, the student's and the teacher's; everything that is wanted of them is
taken while they are there. The maths is that of `losses` and `information`, called on a chunk's logits.

Two designs were measured (`benchmarks/fused_pass.py` repeats it). The plain one recomputes the logits of every chunk in
the backward pass: six products of the size `tokens x vocab x embed`. But the loss is linear in the gradient that
arrives from above, a scalar, so the gradients for hidden states and head can be taken in the forward pass, while the
logits are there, and only be scaled later: four products, as many as the version that keeps all logits.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pgpo_jax import distributions, information, losses
from pgpo_jax.errors import InputError
from pgpo_jax.sharding import BATCH_AXES

_BLOCK_ROWS = 10240  # of the head's gradient, updated at a time: a product that stays near the caches


class Terms(NamedTuple):
    """What the pass measures at every token, `[tokens]` float32 each, in nats; nothing here carries a gradient."""

    divergence: Float[Array, " tokens"]
    token_log_probs: Float[Array, " tokens"]
    """The student's log-probability of the token, at the temperature of the loss."""
    teacher_token_log_probs: Float[Array, " tokens"]
    student_entropy: Float[Array, " tokens"]
    teacher_entropy: Float[Array, " tokens"]
    information: dict[str, Float[Array, " tokens"]]
    """Per estimator asked for: its terms, to be reduced by `information.reduce`."""
    weight: Float[Array, " tokens"]
    """The importance weight in use; 1 without a correction for the sampler."""


class _Rows(NamedTuple):
    """The inputs that have one row per token and no gradient."""

    teacher_hidden: Array
    tokens: Array
    weights: Array
    sampler_log_probs: Array | None


def distill(
    student_hidden: Float[Array, "tokens embed"],
    student_head: Float[Array, "vocab embed"],
    teacher_hidden: Float[Array, "tokens teacher_embed"],
    teacher_head: Float[Array, "vocab teacher_embed"],
    tokens: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    sampler_log_probs: Float[Array, " tokens"] | None = None,
    *,
    config: losses.DistillationConfig,
    vocab_size: int | None = None,
    estimators: Sequence[information.Estimator] = ("entropy_gap",),
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """The distillation loss of a batch of tokens, and everything that is measured at them, in one pass.

    The loss is sum over tokens of weight * importance weight * divergence. Its gradient goes to `student_hidden` and
    `student_head` (a tied head gets the embedding's share from elsewhere). Products take the hidden states' dtype and
    sum in float32; logits and everything after them are float32. Asked for the value alone, no gradient is computed.

    Args:
      student_hidden: Final hidden states at the response positions that predict `tokens`; float32 or bfloat16.
      student_head: The student's output matrix, any float dtype; its gradient sums in float32.
      teacher_hidden: The teacher's hidden states for the same tokens.
      teacher_head: The teacher's output matrix.
      tokens: The sampled response tokens.
      weights: Weight of every token in the loss (`losses.token_weights`); where it is 0 the token counts nothing, but
        is still measured.
      sampler_log_probs: Log-probs under the policy that sampled; None leaves the importance weights at 1, as does
        `config.importance_cap = None`.
      config: Kind of divergence, top-k, temperature, importance cap and chunk size.
      vocab_size: Rows of the heads at and beyond it are padding: probability 0, gradient 0.
      estimators: Names of the information estimates wanted.
      mesh: Where the arrays live, if anywhere: tokens split over `data` and `fsdp`, the vocabulary over `tensor`. Every
        device then walks over its own tokens, and the head's gradient is summed over devices once, at the end.

    Returns:
      The loss, a float32 scalar, and the `Terms`.

    Raises:
      InputError: The shapes do not fit together.

    References:
      METHOD: Hübotter et al., SDPO, https://arxiv.org/abs/2601.20802; Wang et al., PGPO, https://arxiv.org/abs/2606.03620.
      Gradients in the forward pass: Hsu et al., Liger Kernel, https://arxiv.org/abs/2410.10989.
    """
    _check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, tokens)
    if config.importance_cap is None:
        sampler_log_probs = None
    layout = _Layout(tokens.shape[0], config.chunk_size, mesh)
    measure = functools.partial(
        token_terms, config=config, vocab_size=vocab_size, estimators=tuple(estimators)
    )

    def run(hidden, head, teacher_head, rows, with_gradient: bool):
        chunked = jax.tree.map(layout.split, (hidden, rows))
        heads = [layout.head(matrix.astype(hidden.dtype)) for matrix in (head, teacher_head)]
        over_chunks = functools.partial(
            _over_chunks, measure=measure, layout=layout, with_gradient=with_gradient
        )
        # One walk per device of the batch axes; the constraints inside get these axes in front.
        terms, gradients = jax.vmap(
            over_chunks, in_axes=(0, 0, None, None), spmd_axis_name=BATCH_AXES if mesh else None
        )(*chunked, *heads)
        terms = jax.tree.map(layout.join, terms)
        weight = rows.weights * terms.weight
        loss = jnp.sum(jnp.where(weight != 0, terms.divergence, 0) * weight)
        if with_gradient:
            d_hidden, d_head = gradients
            gradients = layout.join(d_hidden), layout.sum_head(d_head).astype(head.dtype)
        return (loss, terms), gradients

    @jax.custom_vjp
    def vocabulary_pass(hidden, head, teacher_head, rows):
        return run(hidden, head, teacher_head, rows, with_gradient=False)[0]

    def forward(hidden, head, teacher_head, rows):
        return run(hidden, head, teacher_head, rows, with_gradient=True)

    def backward(gradients, cotangents):
        scale = cotangents[0]
        d_hidden, d_head = (scale.astype(g.dtype) * g for g in gradients)
        return d_hidden, d_head, None, None

    vocabulary_pass.defvjp(forward, backward)
    rows = _Rows(teacher_hidden, tokens, weights.astype(jnp.float32), sampler_log_probs)
    fixed = jax.lax.stop_gradient((teacher_head, rows))
    loss, terms = vocabulary_pass(student_hidden, student_head, *fixed)
    return loss, jax.lax.stop_gradient(terms)


def token_terms(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    tokens: Int[Array, "*tokens"],
    sampler_log_probs: Float[Array, "*tokens"] | None,
    *,
    config: losses.DistillationConfig,
    vocab_size: int | None,
    estimators: Sequence[information.Estimator],
) -> Terms:
    """All `Terms` from logits that are there. In here, `divergence` carries the gradient to `student_logits`."""
    student, teacher = (
        distributions.mask_padding(logits / config.temperature, vocab_size)
        for logits in (student_logits, teacher_logits)
    )
    # The compiler finds that the functions below normalise the same logits and does it once.
    log_s, log_q = distributions.log_probs(student), distributions.log_probs(teacher)
    token_log_probs = information.at_tokens(log_s, tokens)
    teacher_token_log_probs = information.at_tokens(log_q, tokens)
    if config.kind == "sampled":
        divergence = losses.sampled_divergence(token_log_probs, teacher_token_log_probs)
    else:
        divergence = losses.divergence(
            student,
            teacher,
            kind=config.kind,
            jsd_weight=config.jsd_weight,
            top_k=config.top_k,
            tail=config.tail,
        )
    weight = jnp.ones_like(token_log_probs)
    if sampler_log_probs is not None and config.importance_cap is not None:
        weight = losses.importance_weight(token_log_probs, sampler_log_probs, config.importance_cap)
    measured = {
        "token_log_probs": token_log_probs,
        "teacher_token_log_probs": teacher_token_log_probs,
        "student_entropy": distributions.entropy(log_s),
        "teacher_entropy": distributions.entropy(log_q),
        "information": {
            name: information.terms(name, student, teacher, tokens) for name in estimators
        },
        "weight": weight,
    }
    return Terms(divergence=divergence, **jax.lax.stop_gradient(measured))


def logits(hidden: Float[Array, "tokens embed"], head: Float[Array, "vocab embed"]) -> Array:
    """Float32 logits of a head in the hidden states' dtype."""
    return jnp.einsum("cd,vd->cv", hidden, head, preferred_element_type=jnp.float32)


def _over_chunks(hidden, rows, student_head, teacher_head, *, measure, layout, with_gradient):
    """Walks over the chunks `[chunk count, chunk, ...]` of one device's tokens.

    Returns:
      The terms, and None or the gradients for the hidden states (per chunk) and for the head.
    """

    def step(d_head, chunk):
        hidden, rows = chunk
        student = layout.over_vocab(logits(hidden, student_head))
        teacher = layout.over_vocab(logits(rows.teacher_hidden, teacher_head))
        from_student = functools.partial(
            measure,
            teacher_logits=teacher,
            tokens=rows.tokens,
            sampler_log_probs=rows.sampler_log_probs,
        )
        if not with_gradient:
            return None, (from_student(student), None)
        divergence, gradient_of, terms = jax.vjp(lambda x: _first(from_student(x)), student, has_aux=True)
        weight = rows.weights * terms.weight
        (d_logits,) = gradient_of(weight)
        # A token that does not count may hold anything, NaN included.
        d_logits = jnp.where(weight[:, None] != 0, d_logits, 0)
        d_logits = layout.over_vocab(d_logits.astype(hidden.dtype))
        d_hidden = jnp.einsum(
            "cv,vd->cd", d_logits, student_head, preferred_element_type=jnp.float32
        ).astype(hidden.dtype)
        d_head = _add_product(d_head, d_logits, hidden)
        terms = terms._replace(divergence=divergence)
        return layout.over_head(d_head), (terms, d_hidden)

    blocks = layout.head_blocks(student_head.shape[0])
    d_head = jnp.zeros((*blocks, student_head.shape[1]), jnp.float32) if with_gradient else None
    d_head, (terms, d_hidden) = jax.lax.scan(step, d_head, (hidden, rows))
    return terms, (d_hidden, d_head) if with_gradient else None


def _add_product(d_head, d_logits, hidden):
    """Adds d_logits^T hidden to `d_head`, block by block of the vocabulary.

    In one piece the product would be a second array of the head's size, written and read once more.
    """
    d_logits = d_logits.reshape(-1, *d_head.shape[:3])

    def add(block, d_head):
        rows = jax.lax.dynamic_index_in_dim(d_logits, block, 2, keepdims=False)
        product = jnp.einsum("ctv,cd->tvd", rows, hidden, preferred_element_type=jnp.float32)
        total = product + jax.lax.dynamic_index_in_dim(d_head, block, 1, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(d_head, total, block, 1)

    return jax.lax.fori_loop(0, d_head.shape[1], add, d_head)


def _first(terms: Terms):
    return terms.divergence, terms


def _check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, tokens):
    count, vocab = tokens.shape[0], student_head.shape[0]
    wanted = {
        "student_hidden": (student_hidden, (count, student_head.shape[1])),
        "teacher_hidden": (teacher_hidden, (count, teacher_head.shape[1])),
        "teacher_head": (teacher_head, (vocab, teacher_hidden.shape[1])),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise InputError(
                f"distill.{name}: got shape {array.shape}; {shape} fits the tokens and heads given"
            )


class _Layout:
    """How tokens are cut into chunks per device, and where the arrays of the pass live on the mesh."""

    def __init__(self, tokens: int, chunk_size: int, mesh: Mesh | None):
        self.mesh, self.tokens = mesh, tokens
        self.shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
        self.per_shard = -(-tokens // self.shards)
        self.chunks = max(1, -(-self.per_shard // chunk_size))
        self.chunk = -(-self.per_shard // self.chunks)  # even chunks: the least padding

    def split(self, rows):
        """`[tokens, ...]` -> `[shard, chunk count, chunk, ...]`, filled up with rows of zeros (weight 0)."""
        rest = rows.shape[1:]
        rows = _fill(rows, 0, self.shards * self.per_shard)
        rows = _fill(rows.reshape(self.shards, self.per_shard, *rest), 1, self.chunks * self.chunk)
        return self._place(rows.reshape(self.shards, self.chunks, self.chunk, *rest), BATCH_AXES)

    def join(self, rows):
        """The inverse of `split`."""
        rest = rows.shape[3:]
        rows = rows.reshape(self.shards, self.chunks * self.chunk, *rest)[:, : self.per_shard]
        return self._place(rows, BATCH_AXES).reshape(-1, *rest)[: self.tokens]

    def head(self, matrix):
        """The head whole in `embed`: gathered once in the compute dtype, not in every chunk."""
        return self._place(matrix, self._axis("tensor", matrix.shape[0]))

    def over_vocab(self, chunk):
        return self._place(chunk, None, self._axis("tensor", chunk.shape[1]))

    def head_blocks(self, vocab: int) -> tuple[int, int, int]:
        """How the head's gradient is kept: `[tensor shard, block, row of the block]`."""
        split = self._axis("tensor", vocab) is not None and self.mesh is not None
        shards = self.mesh.shape["tensor"] if split else 1
        local = vocab // shards
        sizes = [size for size in range(_BLOCK_ROWS // 8, _BLOCK_ROWS + 1) if local % size == 0]
        rows = max(sizes, default=local)
        return shards, local // rows, rows

    def over_head(self, d_head):
        return self._place(d_head, self._axis("tensor", d_head.shape[0]))

    def sum_head(self, d_head):
        """`[shard, *head_blocks, embed]` -> `[vocab, embed]`, the sum over the shards' tokens."""
        vocab, embed = math.prod(d_head.shape[1:4]), d_head.shape[4]
        total = jnp.sum(d_head, axis=0).reshape(vocab, embed)
        return self._place(total, self._axis("tensor", vocab), self._axis("fsdp", embed))

    def _axis(self, name: str, size: int) -> str | None:
        return name if self.mesh is None or size % self.mesh.shape[name] == 0 else None

    def _place(self, array, *axes):
        if self.mesh is None:
            return array
        return jax.lax.with_sharding_constraint(
            array, NamedSharding(self.mesh, PartitionSpec(*axes))
        )


def _fill(rows, axis: int, size: int):
    widths = [(0, 0)] * rows.ndim
    widths[axis] = (0, size - rows.shape[axis])
    return jnp.pad(rows, widths)
