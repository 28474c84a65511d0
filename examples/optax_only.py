"""PGPO's multiplier in plain JAX: a student is pulled to a teacher that knows more.

python examples/optax_only.py      # needs jax, optax and pgpo_jax, nothing else
"""

import jax
import jax.numpy as jnp
import optax

from pgpo_jax import aggregate, divergence, information, scale_by_information

BATCH, TIME, VOCAB = 8, 12, 32


def main(steps: int = 30) -> None:
    """Distils a table of logits; prints what the multiplier does on the way."""
    teacher_logits = 3.0 * jax.random.normal(jax.random.key(0), (BATCH, TIME, VOCAB))
    lengths = jnp.arange(BATCH) + 5
    response_mask = jnp.arange(TIME)[None] < lengths[:, None]  # True at a response's tokens
    sample_mask = jnp.arange(BATCH) > 1  # two responses have no teacher context

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(0.1),
        scale_by_information(alpha=0.5, rho_max=2.0),  # behind the optimizer
    )

    def loss_fn(student_logits):
        per_token = divergence(student_logits, teacher_logits, kind="jsd")
        terms = information.entropy_gap(student_logits, teacher_logits)
        loss = aggregate(per_token, response_mask, sample_mask)
        return loss, information.reduce(terms, response_mask, sample_mask)

    @jax.jit
    def step(params, state):
        (loss, gap), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params, information=gap)
        return optax.apply_updates(params, updates), state, loss, gap

    params = jnp.zeros((BATCH, TIME, VOCAB))
    state = optimizer.init(params)
    for number in range(steps):
        params, state, loss, gap = step(params, state)
        if number % 10 == 0 or number == steps - 1:
            rho = state[-1].multiplier
            print(f"step {number}: loss {loss:.4f} information {gap:.3f} multiplier {rho:.3f}")


if __name__ == "__main__":
    main()
