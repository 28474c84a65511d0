"""The multiplier of PGPO as an optax transformation, and the optimizer chain around it."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pgpo_jax.errors import require


class ScaleByInformationState(NamedTuple):
    """State of `scale_by_information`."""

    count: Int[Array, ""]
    """Number of updates so far."""
    multiplier: Float[Array, ""]
    """rho of the last update; 1 before the first."""


def scale_by_information(
    alpha: optax.ScalarOrSchedule, rho_max: float = 2.0, rho_min: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by a bounded exponential of an information estimate.

    Multiplies the updates by :math:`\rho = \mathrm{clip}(\exp(\alpha I), \rho_{min}, \rho_{max})`,
    where :math:`I` is passed to `update` as the keyword argument `information`.

    It must stand **last in the chain, after the optimizer**: Adam and its relatives normalise the
    scale of what they are given, so before them the multiplier does nothing. Standing after
    `optax.adamw` it scales everything that adamw adds to the parameters, the decay included ("the
    final update" of the paper); to keep the decay out, chain `optax.scale_by_adam`,
    `scale_by_information`, `optax.add_decayed_weights` and `optax.scale_by_learning_rate`. Moments
    are not touched. With gradient accumulation, accumulate gradients and information together and
    call the chain once: `optax.MultiSteps` would pass on only the last micro-batch's information.

    Args:
      alpha: Exponent, a float or an optax schedule of the update count. 0 gives a multiplier of
        exactly 1, and a negative value brakes where a positive one accelerates.
      rho_max: Upper bound of the multiplier; an infinite information gives it.
      rho_min: Lower bound; 0 is the paper's eq. 9, and 1 never lets the step shrink.

    Returns:
      A transformation whose `update` takes the required keyword argument `information`, a scalar in
      nats per response token. NaN in it propagates into the updates. Other extra arguments are
      ignored.

    Raises:
      TypeError: `update` was called without `information`.
      ValueError: `information` is not a scalar.

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

    def init_fn(params):
        del params
        return ScaleByInformationState(jnp.zeros([], jnp.int32), jnp.ones([], jnp.float32))

    def update_fn(updates, state, params=None, *, information, **extra_args):
        del params, extra_args
        information = jnp.asarray(information, jnp.float32)
        if information.shape != ():
            raise ValueError(
                f"information: got shape {information.shape}; must be a scalar in nats per "
                "response token (pgpo_jax.information.reduce makes one)"
            )
        exponent = jnp.asarray(alpha(state.count) if callable(alpha) else alpha, jnp.float32)
        # 0 * inf is NaN: alpha = 0 must be the chain without the transformation, whatever the
        # information.
        scaled = jnp.where(exponent == 0, 0.0, exponent * information)
        multiplier = jnp.clip(jnp.exp(scaled), rho_min, rho_max).astype(jnp.float32)
        updates = jax.tree.map(lambda update: _scale(update, multiplier), updates)
        return updates, ScaleByInformationState(
            jnp.asarray(optax.safe_increment(state.count)), multiplier
        )

    # optax's type has no required extra argument; calling without it is the TypeError we want.
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def _scale(update, multiplier):
    """Multiplies in float32 or wider and keeps the dtype: a multiplier in bfloat16 would be off by
    0.4 %."""
    wide = jnp.promote_types(update.dtype, jnp.float32)
    return (update.astype(wide) * multiplier.astype(wide)).astype(update.dtype)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Clip by global norm, AdamW with a warm-up, then the multiplier."""

    alpha: float = 1.0
    """Exponent of the multiplier; 0 is SDPO."""
    rho_max: float = 2.0
    """Upper bound of the multiplier."""
    rho_min: float = 0.0
    """Lower bound of the multiplier; 0 is the paper's formula, 1 its prose (never slower than
    SDPO)."""
    learning_rate: float = 1e-5
    """Peak learning rate, constant after the warm-up."""
    warmup_steps: int = 10
    """The rate of update k (from 0) is learning_rate * min(k / warmup_steps, 1), so the first
    update is 0."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.01
    """Decoupled decay on every parameter; the multiplier scales it with the rest of the update."""
    max_grad_norm: float | None = 1.0
    """Clip gradients to this global norm; null does not clip."""

    def __post_init__(self):
        require(
            "optimizer",
            self,
            alpha=(math.isfinite(self.alpha), "finite"),
            rho_min=(self.rho_min >= 0, "at least 0"),
            rho_max=(
                self.rho_max > 0 and self.rho_max >= self.rho_min,
                "positive and at least rho_min",
            ),
            learning_rate=(self.learning_rate > 0, "positive"),
            warmup_steps=(self.warmup_steps >= 0, "at least 0"),
            b1=(0 <= self.b1 < 1, "in [0, 1)"),
            b2=(0 <= self.b2 < 1, "in [0, 1)"),
            eps=(self.eps > 0, "positive"),
            weight_decay=(self.weight_decay >= 0, "at least 0"),
            max_grad_norm=(
                self.max_grad_norm is None or self.max_grad_norm > 0,
                "positive, or null",
            ),
        )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up from 0, then constant."""
    if config.warmup_steps == 0:
        return optax.constant_schedule(config.learning_rate)
    return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """clip by global norm -> AdamW with warm-up -> scale_by_information; `update` takes
    `information`."""
    adamw = optax.adamw(
        learning_rate(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    )
    clip = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    multiplier = scale_by_information(config.alpha, config.rho_max, config.rho_min)
    return optax.chain(*clip, adamw, multiplier)


def state_shardings(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Where the optimizer's state lives: moments with their parameters, counters everywhere.

    Args:
      optimizer: Any optax transformation.
      params: Sharded arrays, or `jax.ShapeDtypeStruct` with shardings, on one mesh.
    """
    where = jax.tree.map(lambda p: p.sharding, params)
    everywhere = NamedSharding(jax.tree.leaves(where)[0].mesh, PartitionSpec())
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        where,
        transform_non_params=lambda _: everywhere,
    )


def init_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The optimizer's first state, made where it will live (zeros do not inherit a sharding)."""
    return jax.jit(optimizer.init, out_shardings=state_shardings(optimizer, params))(params)


def information_state(opt_state: Any) -> ScaleByInformationState:
    """The `ScaleByInformationState` inside the state of an optimizer that holds one."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ScaleByInformationState))
    return next(leaf for leaf in leaves if isinstance(leaf, ScaleByInformationState))
