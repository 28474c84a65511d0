"""Target distributions between teacher and student that a student is pulled to: DemoPSD and Veto.

Each is a normalised product of powers. No gradient flows through a target: it is a constant of the
divergence, whichever `distillation.kind` says; both sources take KL(student || target).

Sources: DemoPSD (Li et al., arXiv 2607.02502), Veto (Jang et al., arXiv 2601.07155).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgpo_jax import distributions


def demopsd(
    teacher: Float[Array, "*tokens vocab"],
    plain: Float[Array, "*tokens vocab"],
    most: float = 0.15,
    slope: float = 50.0,
) -> Float[Array, "*tokens vocab"]:
    """Logits of DemoPSD's target, proportional to T^(1 - a) S^a: the less agreed, the less taught.

    a = 2 most (sigmoid(slope d) - 1/2) at every token, with d the Jensen-Shannon divergence of T
    and S on the whole vocabulary. So a is 0 where they agree and at most `most`.

    Args:
      teacher: log T, the teacher with its context.
      plain: log S, the same teacher without it.
      most: The largest weight of S.
      slope: How fast the weight rises with d, per nat.
    """
    apart = jnp.maximum(distributions.jensen_shannon(plain, teacher), 0)  # rounding may go below
    weight = (most * jnp.tanh(slope * apart / 2))[..., None]  # 2 (sigmoid(x) - 1/2), without loss
    return (1 - weight) * teacher + weight * plain


def veto(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    power: float = 0.3,
) -> Float[Array, "*tokens vocab"]:
    """Logits of Veto's target, proportional to T S^power: what the student finds unlikely, the
    teacher teaches less.

    Args:
      student: log S, the student of now, by our reading.
      teacher: log T.
      power: beta. The gradient of KL(student || target) comes to rest where the student is
        T^(1 / (1 - power)), normalised: sharper than the teacher, and at 1 without an end.
    """
    return teacher + power * student
