"""The multiplier of PGPO as an optax transformation, and the optimizer chain around it."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pgpo_jax.errors import InputError, require


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

    def update_fn(updates, state, params=None, *, information, **extra_args):
        del params, extra_args
        return _apply(updates, state, _rho(alpha, state, information, rho_max, rho_min))

    # optax's type has no required extra argument; calling without it is the TypeError we want.
    return optax.GradientTransformationExtraArgs(_initial, update_fn)  # pyright: ignore[reportArgumentType]


class ScaleByRelativeInformationState(NamedTuple):
    """State of `scale_by_relative_information`."""

    applied: ScaleByInformationState
    """Count of the updates and the multiplier that the last one was given."""
    mean: Float[Array, ""]
    """Running mean of rho; 1 before the first update."""


def scale_by_relative_information(
    alpha: optax.ScalarOrSchedule, rho_max: float = 2.0, rho_min: float = 0.0, decay: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by the multiplier over its own running mean: modulation, no larger rate.

    `scale_by_information` is partly a larger learning rate, since its multiplier stays above 1
    for as long as the information is positive. Here update :math:`k` is scaled by
    :math:`\rho_k / \bar\rho_k`, where :math:`\rho_k` is the multiplier of `scale_by_information`
    and :math:`\bar\rho_k` the bias-corrected exponential moving average of
    :math:`\rho_1 \dots \rho_k`. The first update has a multiplier of exactly 1, a constant
    information gives exactly 1 throughout, and where the information drifts the multiplier's mean
    is off 1 by the drift over about 1 / (1 - decay) updates.

    It stands where `scale_by_information` does, last in the chain. The bounds are those of rho
    before the division.

    Args:
      alpha: Exponent, a float or an optax schedule of the update count; 0 gives exactly 1.
      rho_max: Upper bound of rho.
      rho_min: Lower bound of rho.
      decay: Of the running mean, in [0, 1): 0 turns the modulation off.

    Returns:
      A transformation with the arguments and errors of `scale_by_information`.

    Examples:
      >>> import optax, jax.numpy as jnp
      >>> from pgpo_jax.optimizer import scale_by_relative_information
      >>> transform = scale_by_relative_information(alpha=1.0, decay=0.5)
      >>> state = transform.init(None)
      >>> for rho in (1.5, 1.5, 1.0):
      ...     updates, state = transform.update(jnp.ones(1), state, information=jnp.log(rho))
      ...     print(f"{state.applied.multiplier:.4f} of a mean {state.mean:.4f}")
      1.0000 of a mean 1.5000
      1.0000 of a mean 1.5000
      0.8235 of a mean 1.2143
    """

    def init_fn(params):
        return ScaleByRelativeInformationState(_initial(params), jnp.ones([], jnp.float32))

    def update_fn(updates, state, params=None, *, information, **extra_args):
        del params, extra_args
        rho = _rho(alpha, state.applied, information, rho_max, rho_min)
        # The bias-corrected average, written as a step towards rho: of equal numbers it is exact.
        weight = (1 - decay) / (1 - decay ** (state.applied.count + 1.0))
        before = jnp.where(state.applied.count == 0, rho, state.mean)
        mean = before + weight * (rho - before)
        relative = jnp.where(mean > 0, rho / mean, 1.0)  # rho_min = 0 allows a mean of 0
        relative = jnp.where(jnp.isnan(rho), rho, relative)
        updates, applied = _apply(updates, state.applied, relative)
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

    The control that a multiplier made from information must beat: the multipliers of another run
    (`read_multipliers`), in their order or shuffled.

    Args:
      multipliers: At least one; after the last the sequence begins again.

    Returns:
      A transformation that ignores all extra arguments.

    Examples:
      >>> import jax.numpy as jnp
      >>> from pgpo_jax.optimizer import scale_by_sequence
      >>> transform = scale_by_sequence([1.0, 1.5])
      >>> state = transform.init(None)
      >>> for _ in range(3):
      ...     updates, state = transform.update(jnp.ones(1), state)
      ...     print(updates)
      [1.]
      [1.5]
      [1.]
    """

    def init_fn(params):
        return ScaleBySequenceState(_initial(params), jnp.asarray(multipliers, jnp.float32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        place = state.applied.count % state.sequence.shape[0]
        updates, applied = _apply(updates, state.applied, state.sequence[place])
        return updates, state._replace(applied=applied)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _initial(params) -> ScaleByInformationState:
    del params
    return ScaleByInformationState(jnp.zeros([], jnp.int32), jnp.ones([], jnp.float32))


def _rho(alpha, state: ScaleByInformationState, information, rho_max: float, rho_min: float):
    """clip(exp(alpha * I), rho_min, rho_max)."""
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
    return jnp.clip(jnp.exp(scaled), rho_min, rho_max).astype(jnp.float32)


def _apply(updates, state: ScaleByInformationState, multiplier):
    updates = jax.tree.map(lambda update: _scale(update, multiplier), updates)
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, ScaleByInformationState(count, multiplier)


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
    alpha_schedule: Literal["constant", "linear"] = "constant"
    """`linear`: from alpha to alpha_end over the first alpha_steps updates, then constant."""
    alpha_end: float = 0.0
    """Where a linear schedule ends."""
    alpha_steps: int = 100
    """Updates that a linear schedule takes."""
    rho_max: float = 2.0
    """Upper bound of the multiplier."""
    rho_min: float = 0.0
    """Lower bound of the multiplier; 0 is the paper's formula, 1 its prose (never slower than
    SDPO)."""
    multiplier: Literal["information", "relative", "replayed"] = "information"
    """`information`: rho = clip(exp(alpha * I), rho_min, rho_max), the paper's. `relative`: rho
    over its running mean, so that the rate is modulated and not raised. `replayed`: the multipliers
    of another run (a control), whatever I."""
    mean_decay: float = 0.9
    """Decay of the running mean of `relative`."""
    replay: str | None = None
    """For `replayed`: the metrics.jsonl of a run, or a JSON list of numbers; after the last it
    begins again."""
    replay_seed: int | None = None
    """Shuffles what is replayed; null keeps the order."""
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
            alpha_schedule=(self.alpha_schedule in ("constant", "linear"), "constant or linear"),
            alpha_end=(math.isfinite(self.alpha_end), "finite"),
            alpha_steps=(self.alpha_steps >= 1, "at least 1"),
            multiplier=(self.multiplier in MULTIPLIERS, f"one of {', '.join(MULTIPLIERS)}"),
            mean_decay=(0 <= self.mean_decay < 1, "in [0, 1)"),
            replay=(
                (self.replay is not None) == (self.multiplier == "replayed"),
                "a file with optimizer.multiplier replayed, and null with any other",
            ),
            replay_seed=(self.replay_seed is None or self.replay_seed >= 0, "at least 0, or null"),
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


def alpha(config: OptimizerConfig) -> optax.ScalarOrSchedule:
    """The exponent: a number, or a schedule of the update count."""
    if config.alpha_schedule == "constant":
        return config.alpha
    return optax.linear_schedule(config.alpha, config.alpha_end, config.alpha_steps)


def read_multipliers(path: str) -> list[float]:
    """The multipliers of a run's updates: a `metrics.jsonl`, or a JSON list of numbers.

    Skipped updates of a run are left out: they changed nothing, and the optimizer did not count
    them.

    Raises:
      InputError: The file cannot be read, or what it holds are no multipliers.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if path.endswith(".jsonl"):
            rows = [json.loads(line) for line in text.splitlines()]
            found = [row["multiplier"] for row in rows if row.get("skipped") == 0]
        else:
            found = json.loads(text)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"optimizer.replay: {path} cannot be read ({type(error).__name__}: {error}); give the "
            "metrics.jsonl of a run, or a JSON list of numbers"
        ) from error
    good = isinstance(found, list) and all(
        type(value) in (int, float) and 0 <= value < math.inf for value in found
    )
    if not good or not found:
        raise InputError(
            f"optimizer.replay: {path} holds no multipliers; must be numbers, at least one, none "
            "of them negative"
        )
    return [float(value) for value in found]


def _replayed(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    assert config.replay is not None
    multipliers = read_multipliers(config.replay)
    if config.replay_seed is not None:
        multipliers = np.random.default_rng(config.replay_seed).permutation(multipliers).tolist()
    return scale_by_sequence(multipliers)


MULTIPLIERS = {
    "information": lambda config: scale_by_information(
        alpha(config), config.rho_max, config.rho_min
    ),
    "relative": lambda config: scale_by_relative_information(
        alpha(config), config.rho_max, config.rho_min, config.mean_decay
    ),
    "replayed": _replayed,
}


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """clip by global norm -> AdamW with warm-up -> the multiplier; `update` takes `information`.

    Raises:
      InputError: The multipliers to replay cannot be read.
    """
    adamw = optax.adamw(
        learning_rate(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    )
    clip = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    return optax.chain(*clip, adamw, MULTIPLIERS[config.multiplier](config))


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
