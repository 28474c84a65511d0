"""Multipliers beside the paper's: relative to their own mean, and a sequence that is given."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pgpo_jax.multiplier import (
    ScaleByInformationState,
    apply,
    check_settings,
    checked,
    initial,
    rho,
)


class ScaleByRelativeInformationState(NamedTuple):
    """State of `scale_by_relative_information`."""

    applied: ScaleByInformationState
    """Count of the updates and the multiplier that the last one was given."""
    mean: Float[Array, ""]
    """Running mean of rho; 1 before the first update."""


def scale_by_relative_information(
    alpha: optax.ScalarOrSchedule,
    rho_max: ArrayLike = 2.0,
    rho_min: ArrayLike = 0.0,
    decay: float = 0.9,
    *,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by the multiplier over its own running mean: modulation, no larger rate.

    `scale_by_information` is partly a larger learning rate, since its multiplier stays above 1
    for as long as the information is positive. Here update :math:`k` is scaled by
    :math:`\rho_k / \bar\rho_k`, where :math:`\rho_k` is the multiplier of `scale_by_information`
    and :math:`\bar\rho_k` the bias-corrected exponential moving average of
    :math:`\rho_1 \dots \rho_k`. The first update has a multiplier of exactly 1, a constant
    information gives exactly 1 throughout, and where the information drifts the multiplier's mean
    is off 1 by the drift over about 1 / (1 - decay) updates.

    It stands where `scale_by_information` does. The bounds are those of rho and of the multiplier:
    where rho leaps up from a mean near 0 the quotient alone could reach 1 / (1 - decay). A rho that
    is not finite is a multiplier of NaN (or `rho_max`, where that is infinite) for its own update
    and leaves the mean as it was.

    Args:
      alpha: Exponent, a float or an optax schedule of the update count; 0 gives exactly 1.
      rho_max: Upper bound of rho and of the multiplier.
      rho_min: Lower bound of rho and of the multiplier.
      decay: Of the running mean, in [0, 1): 0 turns the modulation off.
      axis_name: As in `scale_by_information`.

    Returns:
      A transformation with the arguments and errors of `scale_by_information`.

    Examples:
      >>> import optax, jax.numpy as jnp
      >>> from pgpo_jax.methods import scale_by_relative_information
      >>> transform = scale_by_relative_information(alpha=1.0, decay=0.5)
      >>> state = transform.init(None)
      >>> for rho in (1.5, 1.5, 1.0):
      ...     updates, state = transform.update(jnp.ones(1), state, information=jnp.log(rho))
      ...     print(f"{state.applied.multiplier:.4f} of a mean {state.mean:.4f}")
      1.0000 of a mean 1.5000
      1.0000 of a mean 1.5000
      0.8235 of a mean 1.2143
    """

    check_settings(alpha, rho_max, rho_min)

    def init_fn(params):
        return ScaleByRelativeInformationState(initial(params), jnp.ones([], jnp.float32))

    def update_fn(updates, state, params=None, *, information, **extra_args):
        del params, extra_args
        information = checked("information", information)
        if axis_name is not None:
            information = jax.lax.pmean(information, axis_name)
        now = rho(alpha, state.applied.count, information, rho_max, rho_min)
        # The bias-corrected average, written as a step towards rho: of equal numbers it is exact.
        weight = (1 - decay) / (1 - decay ** (state.applied.count + 1.0))
        before = jnp.where((state.applied.count == 0) | jnp.isnan(state.mean), now, state.mean)
        # Until a first finite rho the mean is NaN, which stands for none.
        none = jnp.where(state.applied.count == 0, jnp.nan, state.mean)
        mean = jnp.where(jnp.isfinite(now), before + weight * (now - before), none)
        relative = jnp.where(mean > 0, now / mean, 1.0)  # rho_min = 0 allows a mean of 0
        relative = jnp.clip(relative, rho_min, rho_max).astype(jnp.float32)
        relative = jnp.where(jnp.isfinite(now), relative, now)
        updates, applied = apply(updates, state.applied, relative)
        return updates, ScaleByRelativeInformationState(applied, mean)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


class ScaleBySequenceState(NamedTuple):
    """State of `scale_by_sequence`."""

    applied: ScaleByInformationState
    """Count of the updates and the multiplier that the last one was given."""
    sequence: Float[Array, " update"]
    """The multipliers. Here and not in the program, so that runs with others need not compile."""


def scale_by_sequence(multipliers: Sequence[float]) -> optax.GradientTransformationExtraArgs:
    """Scales update k (from 0) by the k-th multiplier, whatever the information.

    The control that a multiplier made from information must beat: the multipliers of another run,
    in their order or shuffled.

    Args:
      multipliers: At least one; after the last the sequence begins again.

    Returns:
      A transformation that ignores all extra arguments.

    Raises:
      ValueError: No multiplier, or one that is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from pgpo_jax.methods import scale_by_sequence
      >>> transform = scale_by_sequence([1.0, 1.5])
      >>> state = transform.init(None)
      >>> for _ in range(3):
      ...     updates, state = transform.update(jnp.ones(1), state)
      ...     print(updates)
      [1.]
      [1.5]
      [1.]
    """

    given = np.asarray(multipliers, np.float32)
    if given.ndim != 1 or not given.size or not (np.isfinite(given) & (given >= 0)).all():
        raise ValueError(
            f"multipliers: got {multipliers}; must be finite, at least one, none negative"
        )

    def init_fn(params):
        return ScaleBySequenceState(initial(params), jnp.asarray(given))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        place = state.applied.count % state.sequence.shape[0]
        updates, applied = apply(updates, state.applied, state.sequence[place])
        return updates, state._replace(applied=applied)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
