"""The multiplier of PGPO as an optax transformation: eq. 9 of the paper and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


class ScaleByInformationState(NamedTuple):
    """State of `scale_by_information`."""

    count: Int[Array, ""]
    """Number of updates so far."""
    multiplier: Float[Array, ""]
    """rho of the last update; 1 before the first."""


def scale_by_information(
    alpha: optax.ScalarOrSchedule,
    rho_max: ArrayLike = 2.0,
    rho_min: ArrayLike = 0.0,
    *,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by a bounded exponential of an information estimate.

    Multiplies the updates by :math:`\rho = \mathrm{clip}(\exp(\alpha I), \rho_{min}, \rho_{max})`,
    where :math:`I` is passed to `update` as the keyword argument `information`.

    It must stand **after the optimizer**: Adam and its relatives normalise the scale of what they
    are given, so before them the multiplier does nothing. Standing after `optax.adamw` it scales
    everything that adamw adds to the parameters, the decay included ("the final update" of the
    paper); to keep the decay out, chain `optax.scale_by_adam`, `scale_by_information`,
    `optax.add_decayed_weights` and `optax.scale_by_learning_rate`. Moments are not touched.

    In other hands:

    - Under `jax.pmap` and `jax.shard_map` an `information` of one device's data differs from device
      to device, and so do the multipliers: parameters that should be copies drift apart, in
      silence. Give `axis_name`, or pass in what `jax.lax.pmean` made one number. Under `jax.jit`
      alone arrays are global and nothing need be done.
    - `optax.MultiSteps` passes on the last micro-batch's information only: accumulate gradients and
      information together, and call the chain once.
    - `optax.lookahead` passes no extra argument on (a TypeError), and what it returns must not be
      scaled. Bind the information inside the step: `optax.lookahead(optax.GradientTransformation(
      chain.init, functools.partial(chain.update, information=information)), ...)`.
    - `optax.apply_if_finite` looks at the gradients that come in. A NaN `information` passes it and
      makes every update NaN.
    - `optax.contrib.schedule_free` must be given the chain with the multiplier in it: after it, the
      multiplier would scale a step between averages and leave their recursion behind.
    - Projections (`optax.keep_params_nonnegative`, `optax.projections`) come after it: a step
      that is scaled no longer ends where a projection put it.

    Args:
      alpha: Exponent, a scalar or an optax schedule of the update count. 0 gives a multiplier of
        exactly 1, and a negative value brakes where a positive one accelerates.
      rho_max: Upper bound of the multiplier; an infinite information gives it.
      rho_min: Lower bound; 0 is the paper's eq. 9, and 1 never lets the step shrink.
      axis_name: Mapped axis, or axes, over which to average `information`; None for none.

    Returns:
      A transformation whose `update` takes the required keyword argument `information`, a scalar in
      nats per response token. NaN in it propagates into the updates. Other extra arguments are
      ignored. Leaves may be what `optax.scale` takes: float arrays keep their type, and Python
      numbers and integers become float32.

    Raises:
      TypeError: `information` is left out, None or complex; or `alpha` or a bound is.
      ValueError: `information`, `alpha` or a bound is not a scalar, or the bounds are not in order.
        Values are compared where they are known; under a trace, as `optax.inject_hyperparams` makes
        one, of two bounds in the wrong order `rho_max` holds.

    Examples:
      >>> import optax, jax.numpy as jnp
      >>> from pgpo_jax import scale_by_information
      >>> optimizer = optax.chain(optax.sgd(0.1), scale_by_information(alpha=1.0, rho_max=2.0))
      >>> params = {"w": jnp.array([1.0, -1.0])}
      >>> state = optimizer.init(params)
      >>> grads = {"w": jnp.array([1.0, 2.0])}
      >>> updates, state = optimizer.update(grads, state, params, information=jnp.log(1.5))
      >>> print(updates["w"], state[-1].multiplier)
      [-0.15 -0.3 ] 1.5

    References:
      Wang et al., Physics-Guided Policy Optimization with self-distillation, 2026, eq. 9,
      https://arxiv.org/abs/2606.03620
    """
    check_settings(alpha, rho_max, rho_min)

    def update_fn(updates, state, params=None, *, information, **extra_args):
        del params, extra_args
        information = checked("information", information)
        if axis_name is not None:
            information = jax.lax.pmean(information, axis_name)
        return apply(updates, state, rho(alpha, state.count, information, rho_max, rho_min))

    # optax's type has no required extra argument; calling without it is the TypeError we want.
    return optax.GradientTransformationExtraArgs(initial, update_fn)  # pyright: ignore[reportArgumentType]


def initial(params: Any) -> ScaleByInformationState:
    """The state before the first update."""
    del params
    return ScaleByInformationState(jnp.zeros([], jnp.int32), jnp.ones([], jnp.float32))


def rho(
    alpha: optax.ScalarOrSchedule,
    count: Int[Array, ""],
    information: Float[Array, ""],
    rho_max: ArrayLike,
    rho_min: ArrayLike,
) -> Float[Array, ""]:
    """clip(exp(alpha * I), rho_min, rho_max), eq. 9; alpha may be a schedule of the count."""
    exponent = checked("alpha", alpha(count) if callable(alpha) else alpha)
    # 0 * inf is NaN: alpha = 0 must be the chain without the transformation, whatever the
    # information.
    scaled = jnp.where(exponent == 0, 0.0, exponent * information)
    return jnp.clip(jnp.exp(scaled), rho_min, rho_max).astype(jnp.float32)


def apply(
    updates: Any, state: ScaleByInformationState, multiplier: Float[Array, ""]
) -> tuple[Any, ScaleByInformationState]:
    """The updates times the multiplier, and the state that counts and holds it."""
    updates = jax.tree.map(lambda update: _scale(update, multiplier), updates)
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, ScaleByInformationState(count, multiplier)


def _scale(update: Any, multiplier: Array) -> Array:
    """Multiplies in float32 or wider, as a multiplier in bfloat16 would be off by 0.4 %; floats
    keep their type, and integers become float32: theirs would cut the product."""
    dtype = jnp.result_type(update)
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    wide = dtype if inexact and dtype.itemsize >= 4 else jnp.float32
    product = jnp.asarray(update, wide) * multiplier.astype(wide)
    return product.astype(dtype) if inexact else product


def checked(name: str, value: Any) -> Float[Array, ""]:
    """A scalar as float32; errors as in `_require_scalar`."""
    _require_scalar(name, value)
    return jnp.asarray(value, jnp.float32)


def check_settings(alpha: Any, rho_max: Any, rho_min: Any) -> None:
    """Refuses settings that have no meaning, as far as they are known where this is called.

    Raises:
      TypeError: None or a complex number.
      ValueError: Not a scalar, or bounds that are not in order.
    """
    for name, value in (("alpha", alpha), ("rho_max", rho_max), ("rho_min", rho_min)):
        if not (name == "alpha" and callable(value)):
            _require_scalar(name, value)
    if any(isinstance(bound, jax.core.Tracer) for bound in (rho_max, rho_min)):
        return
    if not (rho_max >= rho_min and rho_max >= 0):
        raise ValueError(
            f"rho_max: got {rho_max}; must be at least rho_min = {rho_min} and not negative"
        )


def _require_scalar(name: str, value: Any) -> None:
    """Puts nothing on a device: a transformation may be made before the devices are known."""
    if value is None or isinstance(value, str) or jnp.iscomplexobj(value):
        raise TypeError(f"{name}: got {value!r}; must be a real scalar")
    if (shape := np.shape(value)) != ():
        hint = " in nats per response token (pgpo_jax.information.reduce makes one)"
        raise ValueError(
            f"{name}: got shape {shape}; must be a scalar" + hint * (name == "information")
        )
