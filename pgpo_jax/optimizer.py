"""The optimizer of an update: clipping, AdamW or another of optax, then the multiplier."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from pgpo_jax.errors import require
from pgpo_jax.methods import scale_by_relative_information, scale_by_sequence
from pgpo_jax.multiplier import ScaleByInformationState, scale_by_information


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Clip by global norm, AdamW with a warm-up (or another), then the multiplier."""

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
    name: Literal["adamw", "lion", "muon", "sgd"] = "adamw"
    """optax's of that name, each with decoupled decay; `sgd` and `muon` have b1 as their momentum.
    `muon` orthogonalizes the projections of the layers, each layer's matrix by itself, and leaves
    embeddings, norms, biases and head to `adamw`; its updates are scaled to AdamW's usual size (a
    root mean square of 0.2), so that one learning rate and decay suit both (arXiv 2502.16982)."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the first moment (optax's `mu_dtype`), 2 bytes a parameter less in bfloat16; Adam's
    second moment stays float32, where a decay of 0.999 would round away. `lion`, `sgd` and the
    matrices of `muon` have no second moment."""
    learning_rate: float = 1e-5
    """Peak learning rate, after the warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: the peak, or down to `learning_rate_end` in `decay_steps`, then that."""
    learning_rate_end: float = 0.0
    """Where `cosine` and `linear` end."""
    decay_steps: int | None = None
    """Updates that `cosine` and `linear` take from the end of the warm-up; null with `constant`."""
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
            learning_rate_end=(
                0 <= self.learning_rate_end <= self.learning_rate,
                "at least 0 and at most learning_rate",
            ),
            decay_steps=(
                (self.decay_steps is None) == (self.schedule == "constant")
                and (self.decay_steps is None or self.decay_steps >= 1),
                "at least 1 with optimizer.schedule cosine or linear, and null with constant",
            ),
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
    """Linear warm-up from 0, then constant or down to the end."""
    peak, end = config.learning_rate, config.learning_rate_end
    if config.schedule == "linear":
        after = optax.linear_schedule(peak, end, config.decay_steps or 1)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, config.decay_steps or 1, end / peak)
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    warm_up = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warm_up, after], [config.warmup_steps])


def alpha(config: OptimizerConfig) -> optax.ScalarOrSchedule:
    """The exponent: a number, or a schedule of the update count."""
    if config.alpha_schedule == "constant":
        return config.alpha
    return optax.linear_schedule(config.alpha, config.alpha_end, config.alpha_steps)


def matrix_axes(params: Any) -> Any:
    """Which axes of every parameter are the inputs and the outputs of a matrix, for `muon`.

    Projections are stacked, `[layer, in, out]`, and what is in or out may be heads x width: the
    matrix is that of all heads together. The axis of the layers is in neither, so each layer's is
    orthogonalized by itself. None for all that is no projection.
    """

    def axes(path: Any, parameter: Any) -> contrib.MuonDimensionNumbers | None:
        if not _is_projection(path):
            return None
        inputs = 2 if path[-1].key == "o_proj" else 1  # heads x width go into it
        every = range(1, parameter.ndim)
        return contrib.MuonDimensionNumbers(tuple(every[:inputs]), tuple(every[inputs:]))

    return jax.tree.map_with_path(axes, params)


def _is_projection(path: Any) -> bool:
    return bool(path) and str(getattr(path[-1], "key", "")).endswith("_proj")


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """optax's for the projections, plain AdamW for the rest: that part of optax's own would have
    Nesterov's momentum too."""
    matrices = contrib.muon(
        learning_rate(config),
        beta=config.b1,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.moments_dtype,
        muon_weight_dimension_numbers=matrix_axes,
        consistent_rms=0.2,
    )

    def kinds(params: Any) -> Any:
        found = jax.tree.map_with_path(lambda path, _: _is_projection(path), params)
        if (leaves := jax.tree.leaves(found)) and not any(leaves):
            raise ValueError("optimizer.name: got muon; no parameter is a projection (`*_proj`)")
        return jax.tree.map(lambda matrix: "muon" if matrix else "adamw", found)

    return optax.partition({"muon": matrices, "adamw": OPTIMIZERS["adamw"](config)}, kinds)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda c: optax.adamw(
        learning_rate(c),
        c.b1,
        c.b2,
        c.eps,
        mu_dtype=c.moments_dtype,
        weight_decay=c.weight_decay,
    ),
    "lion": lambda c: optax.lion(
        learning_rate(c), c.b1, c.b2, mu_dtype=c.moments_dtype, weight_decay=c.weight_decay
    ),
    "muon": _muon,
    "sgd": lambda c: optax.chain(
        optax.trace(c.b1, accumulator_dtype=c.moments_dtype),
        optax.add_decayed_weights(c.weight_decay),
        optax.scale_by_learning_rate(learning_rate(c)),
    ),
}

MULTIPLIERS = {
    "information": lambda config, replay: scale_by_information(
        alpha(config), config.rho_max, config.rho_min
    ),
    "relative": lambda config, replay: scale_by_relative_information(
        alpha(config), config.rho_max, config.rho_min, config.mean_decay
    ),
    "replayed": lambda config, replay: scale_by_sequence(replay),
}


def make_optimizer(
    config: OptimizerConfig, replay: Sequence[float] = ()
) -> optax.GradientTransformationExtraArgs:
    """clip by global norm -> AdamW or another -> the multiplier; `update` takes `information`.

    Args:
      config: The settings.
      replay: The multipliers of `replayed` (`logs.read_multipliers` of `config.replay`).

    Raises:
      ValueError: `replayed`, and no multipliers, or some that are none.
    """
    if config.replay_seed is not None:
        replay = np.random.default_rng(config.replay_seed).permutation(replay).tolist()
    clip = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    chosen = OPTIMIZERS[config.name](config)
    return optax.chain(*clip, chosen, MULTIPLIERS[config.multiplier](config, replay))


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
        lambda moment, sharding: moment if isinstance(moment, optax.MaskedNode) else sharding,
        jax.eval_shape(optimizer.init, params),
        where,
        transform_non_params=lambda _: everywhere,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # a part of the optimizer has no such
    )


def init_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The optimizer's first state, made where it will live (zeros do not inherit a sharding)."""
    return jax.jit(optimizer.init, out_shardings=state_shardings(optimizer, params))(params)


def information_state(opt_state: Any) -> ScaleByInformationState:
    """The `ScaleByInformationState` inside the state of an optimizer that holds one."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ScaleByInformationState))
    return next(leaf for leaf in leaves if isinstance(leaf, ScaleByInformationState))
