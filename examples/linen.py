"""PGPO's multiplier with Flax Linen: `TrainState.apply_gradients` takes no extra argument, so the
transformation is called by hand.

python examples/linen.py      # needs flax besides pgpo_jax
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen

from pgpo_jax import aggregate, divergence, information, scale_by_information

TOKENS, WIDTH, VOCAB = 6, 8, 16


def main(steps: int = 20) -> None:
    """Trains a dense head to follow a teacher's; prints the multiplier."""
    inputs = jax.random.normal(jax.random.key(0), (4, TOKENS, WIDTH))
    head = linen.Dense(VOCAB)
    teacher_logits = head.apply(head.init(jax.random.key(1), inputs), 4.0 * inputs)
    every = jnp.ones((4, TOKENS), bool), jnp.ones(4, bool)

    optimizer = optax.chain(optax.adamw(3e-2), scale_by_information(alpha=1.0, rho_max=2.0))
    params = head.init(jax.random.key(0), inputs)
    state = optimizer.init(params)

    def loss_fn(params):
        logits = head.apply(params, inputs)
        gap = information.reduce(information.entropy_gap(logits, teacher_logits), *every)
        return aggregate(divergence(logits, teacher_logits), *every), gap

    @jax.jit
    def step(params, state):
        (loss, gap), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params, information=gap)
        return optax.apply_updates(params, updates), state, loss

    for number in range(steps):
        params, state, loss = step(params, state)
        if number % 10 == 0 or number == steps - 1:
            print(f"step {number}: loss {loss:.4f} multiplier {state[-1].multiplier:.3f}")


if __name__ == "__main__":
    main()
