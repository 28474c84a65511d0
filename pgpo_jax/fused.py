"""The vocabulary pass: hidden states -> divergence, information and log-probs, never all logits.

The logits of one chunk of tokens exist at a time, the student's and the teacher's; all that is
wanted of them is taken while they are there. The maths is that of `losses` and `information`,
called on a chunk's logits.

Two designs were measured (`benchmarks/fused_pass.py` repeats it). The plain one computes the
logits of every chunk again in the backward pass: six products of `tokens x vocab x embed`. But
the loss is linear in the gradient that arrives from above, a scalar, so the gradients for hidden
states and head can be taken in the forward pass, while the logits are there, and only be scaled
later: four products, as many as the version that keeps all logits. The head's gradient then lives
from here to the optimizer, as it does in any backward pass, which begins with the head. Measured
on CPU at 152k rows: recomputing takes 1.8 times the CPU time, and no less memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pgpo_jax import distributions, information, losses
from pgpo_jax.errors import InputError
from pgpo_jax.sharding import BATCH_AXES


class Side(NamedTuple):
    """What a model says at every token, before the product with its output matrix."""

    hidden: Float[Array, "tokens embed"]
    """Final hidden states that predict the tokens, float32 or bfloat16."""
    head: Float[Array, "vocab embed"]
    """The output matrix, any float dtype."""


class Tokens(NamedTuple):
    """The response tokens, and what they weigh in the loss."""

    tokens: Int[Array, " tokens"]
    """The sampled tokens."""
    weights: Float[Array, " tokens"]
    """Weight of a token's divergence (`losses.loss_weights`). A token of weight 0 does not count,
    whatever it holds, but is measured like the others."""
    sampler_log_probs: Float[Array, " tokens"] | None = None
    """Log-probs under the policy that sampled, nats. None leaves the importance weights at 1, as
    `config.importance_cap = None` does."""
    policy: Any = None
    """What `Options.policy_terms` reads, a tree of `[tokens]` arrays; its field `weights` weighs
    the terms. None for no policy gradient."""
    old_log_probs: Float[Array, " tokens"] | None = None
    """Log-probs under the student before the step's first update, nats: importance weights and the
    policy gradient's ratio compare with them, and a weight of its own corrects for the sampler.
    None: they compare with the sampler's."""


class Terms(NamedTuple):
    """What is measured at every token, float32, in nats; without gradient."""

    divergence: Float[Array, "*tokens"]
    token_log_probs: Float[Array, "*tokens"]
    """The student's log-probability of the token, at the temperature of the loss."""
    teacher_token_log_probs: Float[Array, "*tokens"]
    student_entropy: Float[Array, "*tokens"]
    teacher_entropy: Float[Array, "*tokens"]
    information: dict[str, Float[Array, "*tokens"]]
    """Per estimator asked for: its terms, to be reduced by `information.reduce`."""
    weight: Float[Array, "*tokens"]
    """The importance weight in use, times the sampler correction where that is one of its own; 1
    without either."""
    policy: Float[Array, "*tokens"] | None
    """The policy gradient's loss; None where there is none."""
    clipped: Float[Array, "*tokens"] | None
    """1 where its ratio is clipped, so that no gradient flows, else 0; None where there is none."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the pass computes, and where."""

    config: losses.DistillationConfig
    """Divergence, top k, temperature, importance cap, and tokens per chunk."""
    estimators: tuple[information.Estimator, ...] = ()
    """Information estimates wanted beside `config.estimator`."""
    vocab_size: int | distributions.Vocabulary | None = None
    """Rows of the heads from this one on, or as it says, are no tokens: probability and gradient 0.
    """
    mesh: Mesh | None = None
    """Where the arrays live: tokens split over `data` and `fsdp`, the vocabulary over `tensor`.
    Every device then walks over its own tokens, and the head's gradient is summed over devices
    once, at the end. None for one device."""
    policy_terms: Callable[[Array, Array | None, Array, Any], tuple[Array, Array]] | None = None
    """A policy gradient: the student's log-prob of the token, the old one (or None), the student's
    log-prob of the teacher's likeliest token, and `Tokens.policy` -> its loss, and where it is
    clipped."""
    target: Callable[[Array, Array, Array | None], Array] | None = None
    """Another distribution than the teacher's to pull the student to: log-probs of the student, the
    teacher and the teacher without its context (None where `distill` got none), `[tokens, vocab]`,
    without gradient -> logits. None: the teacher's."""


class _Wanted(NamedTuple):
    """Which gradients a pass takes."""

    hidden: bool = False
    head: bool = False


class _Rows(NamedTuple):
    """The inputs that have one row per token and get no gradient."""

    teacher_hidden: Array
    tokens: Tokens
    plain_hidden: Array | None = None


def distill(
    student: Side,
    teacher: Side,
    tokens: Tokens,
    options: Options,
    plain: Float[Array, "tokens embed"] | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """The distillation loss of a batch of tokens, and all that is measured at them, in one pass.

    The loss is the sum over tokens of weight * importance weight * divergence, plus that of the
    policy gradient's terms by their own weights, where there is one. Its gradient goes to the
    student's two arrays. Products take the hidden states' dtype and sum in float32; logits and
    everything after them are float32. Where only the value is wanted, no gradient is computed, nor
    that of a head which nobody differentiates, such as one that is frozen beside adapters.

    Args:
      student: Its head's gradient sums in float32.
      teacher: For the same tokens; its hidden states may have another width.
      tokens: Tokens and weights.
      options: What to compute.
      plain: The teacher's hidden states without its context, for an `options.target` that reads
        them: one more product with the teacher's head.

    Returns:
      The loss, a float32 scalar, and the `Terms`, `[tokens]` each.

    Raises:
      InputError: The shapes do not fit together.

    References:
      Hübotter et al., SDPO, https://arxiv.org/abs/2601.20802 (the loss)
      Wang et al., PGPO, https://arxiv.org/abs/2606.03620 (the information)
      Hsu et al., Liger Kernel, https://arxiv.org/abs/2410.10989 (gradients in the forward pass)
    """
    _check_shapes(student, teacher, tokens.tokens, plain)
    measure = functools.partial(token_terms, options=options)
    walk = functools.partial(_walk, measure=measure, options=options)

    def run(hidden, head, teacher_head, rows, wanted: _Wanted):
        heads = head.astype(hidden.dtype), teacher_head.astype(rows.teacher_hidden.dtype)
        terms, d_hidden, d_head = walk(hidden, rows, heads, wanted=wanted)
        loss = jnp.sum(_token_loss(terms, rows.tokens))
        return (loss, terms), (d_hidden, jax.tree.map(lambda x: x.astype(head.dtype), d_head))

    @jax.custom_vjp
    def vocabulary_pass(*inputs):
        return run(*inputs, wanted=_Wanted())[0]

    def forward(*inputs):
        wanted = _Wanted(hidden=True, head=inputs[1].perturbed)
        return run(*jax.tree.map(lambda primal: primal.value, inputs), wanted=wanted)

    def backward(gradients, cotangents):
        scale, _ = cotangents
        d_hidden, d_head = jax.tree.map(lambda d: scale.astype(d.dtype) * d, gradients)
        return d_hidden, d_head, None, None

    # With `symbolic_zeros` an input says whether anything is differentiated with respect to it.
    vocabulary_pass.defvjp(forward, backward, symbolic_zeros=True)
    tokens = tokens._replace(weights=tokens.weights.astype(jnp.float32))
    rows = _Rows(teacher.hidden, tokens, plain)
    loss, terms = vocabulary_pass(*student, *jax.lax.stop_gradient((teacher.head, rows)))
    return loss, jax.lax.stop_gradient(terms)


def score(side: Side, tokens: Int[Array, " tokens"], options: Options) -> Float[Array, " tokens"]:
    """Log-probs of tokens at the loss's temperature, nats, without gradient."""

    def token_log_probs(logits, teacher_logits, rows, plain_logits):
        del teacher_logits, plain_logits
        masked = distributions.mask_padding(logits / options.config.temperature, options.vocab_size)
        return information.at_tokens(distributions.log_probs(masked), rows.tokens)

    hidden, head = jax.lax.stop_gradient((side.hidden, side.head.astype(side.hidden.dtype)))
    rows = _Rows(hidden, Tokens(tokens, jnp.zeros(tokens.shape)))
    # Nothing reads the second side's logits, so the compiler leaves them out.
    return _walk(
        hidden, rows, (head, head), measure=token_log_probs, options=options, wanted=_Wanted()
    )[0]


class _Weighted(NamedTuple):
    weights: Array


def cross_entropy(
    side: Side, tokens: Int[Array, " tokens"], weights: Float[Array, " tokens"], options: Options
) -> Float[Array, ""]:
    """Sum over tokens of weight * -log-prob at the loss's temperature, nats; the gradient goes to
    both arrays of `side`."""
    # The divergence that is free, and nothing done to it: its weight is 0.
    free = dataclasses.replace(options.config, kind="sampled", token_clip=None)
    options = dataclasses.replace(
        options,
        config=free,
        policy_terms=lambda token_log_probs, *_: (-token_log_probs, token_log_probs > 0),
        target=None,
    )
    rows = Tokens(tokens, jnp.zeros_like(weights), policy=_Weighted(weights))
    return distill(side, side, rows, options)[0]


def token_terms(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    rows: Tokens,
    options: Options,
    plain_logits: Float[Array, "*tokens vocab"] | None = None,
) -> Terms:
    """All `Terms` of tokens whose logits are at hand; `plain_logits` as `plain` of `distill`.

    In here, `divergence` and `policy` do carry a gradient, to `student_logits`.
    """
    config, tokens = options.config, rows.tokens

    def masked(logits):
        return distributions.mask_padding(logits / config.temperature, options.vocab_size)

    student, teacher = masked(student_logits), masked(teacher_logits)
    # The functions below normalise the same logits again; the compiler does it once.
    log_s, log_q = distributions.log_probs(student), distributions.log_probs(teacher)
    token_log_probs = information.at_tokens(log_s, tokens)
    at_argmax = information.at_tokens(log_s, jnp.argmax(log_q, axis=-1))
    target = teacher
    if options.target is not None:
        plain = None if plain_logits is None else distributions.log_probs(masked(plain_logits))
        target = options.target(*jax.lax.stop_gradient((log_s, log_q, plain)))
    divergence = _divergence(student, target, tokens, config)
    cap, sampler = config.importance_cap, rows.sampler_log_probs
    old = sampler if rows.old_log_probs is None else rows.old_log_probs
    correction = weight = jnp.ones_like(token_log_probs)
    if cap is not None and rows.old_log_probs is not None and sampler is not None:
        correction = losses.importance_weight(rows.old_log_probs, sampler, cap)
    if cap is not None and old is not None:
        weight = correction * losses.importance_weight(token_log_probs, old, cap)
    measured = {
        "token_log_probs": token_log_probs,
        "teacher_token_log_probs": information.at_tokens(log_q, tokens),
        "student_entropy": distributions.entropy(log_s),
        "teacher_entropy": distributions.entropy(log_q),
        "information": {
            name: information.terms(name, student, teacher, tokens)
            for name in dict.fromkeys((config.estimator, *options.estimators))
        },
        "weight": weight,
    }
    policy = clipped = None
    if rows.policy is not None and options.policy_terms is not None:
        policy, clipped = options.policy_terms(token_log_probs, old, at_argmax, rows.policy)
        policy, clipped = correction * policy, clipped.astype(jnp.float32)
    measured = jax.lax.stop_gradient({**measured, "clipped": clipped})
    return Terms(divergence=divergence, policy=policy, **measured)


def _divergence(student, target, tokens, config: losses.DistillationConfig):
    """The divergence of the student from the target, both given as logits."""
    log_s, log_q = distributions.log_probs(student), distributions.log_probs(target)
    if config.kind == "sampled":
        return losses.sampled_divergence(
            information.at_tokens(log_s, tokens), information.at_tokens(log_q, tokens)
        )
    if config.kind == "teacher_argmax":
        found = -information.at_tokens(log_s, jnp.argmax(log_q, axis=-1))
    else:
        found = losses.divergence(
            student,
            target,
            kind=config.kind,
            jsd_weight=config.jsd_weight,
            top_k=config.top_k,
            tail=config.tail,
        )
    return losses.clip_divergence(found, config.token_clip)


def _token_loss(terms: Terms, rows: Tokens) -> Array:
    """What every token adds to the loss. A token that does not count may hold anything."""
    weight = rows.weights * terms.weight
    loss = jnp.where(rows.weights != 0, weight * terms.divergence, 0)
    if terms.policy is not None:
        weight = rows.policy.weights
        loss += jnp.where(weight != 0, weight * terms.policy, 0)
    return loss


def logits(
    hidden: Float[Array, "tokens embed"], head: Float[Array, "vocab embed"]
) -> Float[Array, "tokens vocab"]:
    """The float32 logits of a head that has the hidden states' dtype."""
    return jnp.einsum("cd,vd->cv", hidden, head, preferred_element_type=jnp.float32)


def _walk(hidden, rows: _Rows, heads, *, measure, options: Options, wanted: _Wanted):
    """Every device walks over its own tokens, with its part of the vocabulary in sight.

    Returns:
      The terms, and the gradients for `hidden` and the student's head (None if not wanted).
    """
    mesh = options.mesh
    over_chunks = functools.partial(
        _over_chunks,
        measure=measure,
        chunk_size=options.config.chunk_size,
        wanted=wanted,
    )
    count, (vocab, embed) = hidden.shape[0], heads[0].shape
    if mesh is None or mesh.size == 1:
        *per_token, d_head = over_chunks(hidden, rows, heads, vocab_shards=1)
        return *per_token, jax.tree.map(lambda x: x.reshape(vocab, embed), d_head)

    def place(array, *axes):
        """Puts an array on the mesh; an axis that does not divide stays whole."""
        sizes = zip(axes, array.shape, strict=True)
        fitting = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in sizes]
        where = NamedSharding(mesh, PartitionSpec(*fitting))
        return jax.lax.with_sharding_constraint(array, where)

    # `data` and `fsdp` are handled by hand: left to the partitioner, every device would gather
    # the logits of all for the top k. `tensor` is the partitioner's.
    by_token, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    vocab_shards = 1 if vocab % mesh.shape["tensor"] else mesh.shape["tensor"]

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        axis_names=set(BATCH_AXES),
        in_specs=(by_token, by_token, whole),
        out_specs=by_token,
        check_vma=False,
    )
    def on_each(hidden, rows, heads):
        *per_token, d_head = over_chunks(hidden, rows, heads, vocab_shards=vocab_shards)
        return *per_token, jax.tree.map(lambda x: x[None], d_head)

    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    hidden, rows = jax.tree.map(lambda x: _fill(x, -(-count // shards) * shards), (hidden, rows))
    # Whole in `embed`: gathered once and in the compute dtype, not in every chunk.
    heads = tuple(place(head, "tensor", None) for head in heads)
    *per_token, d_head = on_each(hidden, rows, heads)
    # The head's gradient is summed over shards once, straight into the parameter's layout.
    d_head = jax.tree.map(
        lambda x: place(jnp.sum(x, axis=0).reshape(vocab, embed), "tensor", "fsdp"), d_head
    )
    return *jax.tree.map(lambda x: x[:count], per_token), d_head


def _over_chunks(hidden, rows: _Rows, heads, *, measure, chunk_size, wanted, vocab_shards):
    """Returns as `_walk`; the head's gradient is `[vocab_shards, vocab / vocab_shards, embed]`."""
    student_head, teacher_head = heads
    count, (vocab, embed) = hidden.shape[0], student_head.shape
    chunks = max(1, -(-count // chunk_size))
    chunk = -(-count // chunks)  # even chunks need the least filling up
    block = _block(vocab // vocab_shards)
    tensor = "tensor" if vocab_shards > 1 else None

    def split(rows):
        return _fill(rows, chunks * chunk).reshape(chunks, chunk, *rows.shape[1:])

    def step(d_head, rows_of_chunk):
        hidden, (teacher_hidden, tokens, plain_hidden) = rows_of_chunk
        student = _keep(logits(hidden, student_head), None, tensor)
        teacher, plain = (
            None if rows is None else _keep(logits(rows, teacher_head), None, tensor)
            for rows in (teacher_hidden, plain_hidden)
        )

        def token_loss(student):
            terms = measure(student, teacher, tokens, plain_logits=plain)
            return _token_loss(terms, tokens), terms

        if not wanted.hidden:
            return None, (measure(student, teacher, tokens, plain_logits=plain), None)
        loss, gradient_of, terms = jax.vjp(token_loss, student, has_aux=True)
        (d_logits,) = gradient_of(jnp.ones_like(loss))
        # A token that does not count may hold anything, NaN included.
        counts = tokens.weights[:, None] != 0
        if tokens.policy is not None:
            counts |= tokens.policy.weights[:, None] != 0
        d_logits = _keep(jnp.where(counts, d_logits, 0), None, tensor)
        hidden = jnp.where(counts, hidden, 0)
        d_hidden = jnp.einsum(
            "cv,vd->cd",
            d_logits.astype(hidden.dtype),
            student_head,
            preferred_element_type=jnp.float32,
        )
        if wanted.head:
            d_head = _keep(_add_product(d_head, d_logits, hidden, block), tensor)
        return d_head, (terms, d_hidden.astype(hidden.dtype))

    d_head = None
    if wanted.head:
        d_head = _keep(jnp.zeros((vocab_shards, vocab // vocab_shards, embed)), tensor)
    d_head, per_chunk = jax.lax.scan(step, d_head, jax.tree.map(split, (hidden, rows)))
    per_token = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], per_chunk)
    return *per_token, d_head


def _add_product(d_head, d_logits, hidden, block: int):
    """Adds d_logits^T hidden to `d_head`, `block` rows of every vocabulary shard at a time.

    In one piece the product would be a second array of the head's size, written and read again.
    """
    shards, rows, _ = d_head.shape
    d_logits = d_logits.reshape(-1, shards, rows)

    def add(index, d_head):
        start = index * block
        columns = jax.lax.dynamic_slice_in_dim(d_logits, start, block, 2).astype(hidden.dtype)
        total = jax.lax.dynamic_slice_in_dim(d_head, start, block, 1)
        total += jnp.einsum("ctv,cd->tvd", columns, hidden, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(d_head, total, start, 1)

    return jax.lax.fori_loop(0, rows // block, add, d_head)


def _block(rows: int) -> int:
    """Rows of the head's gradient to update at a time: their product should fit the caches."""
    return max((size for size in range(1024, 10241) if rows % size == 0), default=rows)


def _keep(array, *axes):
    """Says where an array lives on the mesh axes that are the partitioner's here."""
    if all(axis is None for axis in axes):
        return array
    axes += (None,) * (array.ndim - len(axes))
    where = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(*axes))
    return jax.lax.with_sharding_constraint(array, where)


def _fill(rows, size: int):
    """Rows of zeros at the end, tokens of weight 0, up to `size` rows."""
    return jnp.pad(rows, [(0, size - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))


def _check_shapes(student: Side, teacher: Side, tokens: Array, plain: Array | None) -> None:
    count, vocab = tokens.shape[0], student.head.shape[0]
    theirs = (count, teacher.head.shape[1])
    wanted = {
        "student.hidden": (student.hidden, (count, student.head.shape[1])),
        "teacher.hidden": (teacher.hidden, theirs),
        "teacher.head": (teacher.head, (vocab, teacher.head.shape[1])),
        "plain": (teacher.hidden if plain is None else plain, theirs),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise InputError(
                f"distill.{name}: got shape {array.shape}; {shape} fits the tokens and heads"
            )
