"""PGPO's multiplier with Flax NNX: `nnx.Optimizer` passes the information on by itself.

python examples/flax_nnx.py      # needs flax besides pgpo_jax
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pgpo_jax import aggregate, divergence, information, scale_by_information

TOKENS, WIDTH, VOCAB = 6, 8, 16


def main(steps: int = 20) -> None:
    """Trains a linear head to follow a teacher's; prints the multiplier."""
    inputs = jax.random.normal(jax.random.key(0), (4, TOKENS, WIDTH))
    teacher_logits = nnx.Linear(WIDTH, VOCAB, rngs=nnx.Rngs(1))(4.0 * inputs)
    every = jnp.ones((4, TOKENS), bool), jnp.ones(4, bool)

    student = nnx.Linear(WIDTH, VOCAB, rngs=nnx.Rngs(0))
    chain = optax.chain(optax.adamw(3e-2), scale_by_information(alpha=1.0, rho_max=2.0))
    optimizer = nnx.Optimizer(student, chain, wrt=nnx.Param)

    def loss_fn(student):
        logits = student(inputs)
        gap = information.reduce(information.entropy_gap(logits, teacher_logits), *every)
        return aggregate(divergence(logits, teacher_logits), *every), gap

    @nnx.jit
    def step(student, optimizer):
        (loss, gap), grads = nnx.value_and_grad(loss_fn, has_aux=True)(student)
        optimizer.update(student, grads, information=gap)
        return loss, gap

    for number in range(steps):
        loss, gap = step(student, optimizer)
        if number % 10 == 0 or number == steps - 1:
            print(f"step {number}: loss {loss:.4f} information {gap:.3f}")


if __name__ == "__main__":
    main()
