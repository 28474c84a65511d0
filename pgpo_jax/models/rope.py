"""Rotary position embeddings: the settings of a checkpoint, their three layouts, and the rotation.

Su et al., "RoFormer" (arXiv 2104.09864); YaRN: Peng et al. (arXiv 2309.00071); `llama3` scaling as
in Meta's Llama 3.1 release. Frequencies equal those of Hugging Face `transformers`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgpo_jax.errors import InputError

_ANY = {"rope_theta"}
_YARN = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
_LLAMA3 = {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
# What each type reads; a setting that its type does not read is an error, not silence.
SETTINGS: dict[str, set[str]] = {
    "default": _ANY,
    "linear": _ANY | {"factor"},
    "llama3": _ANY | _LLAMA3,
    "yarn": _ANY | _YARN | {"mscale", "mscale_all_dim", "truncate"},
}
REQUIRED: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": _LLAMA3 - {"original_max_position_embeddings"},
    "yarn": {"factor"},
}
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class Rope:
    """RoPE settings of one kind of layer, under Hugging Face's names; None = not set."""

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def to_hf(self) -> dict[str, Any]:
        """The settings that are set, as a flat `rope_parameters` dictionary."""
        return {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }


def read(
    config: Mapping[str, Any],
    default_theta: float,
    scale_sliding: bool,
    default_local: float | None = None,
) -> dict[str, Rope]:
    """Reads a Hugging Face configuration in any of its layouts.

    The layouts are `rope_theta` with `rope_scaling`; a flat `rope_parameters`; and
    `rope_parameters` nested by layer type. The type is called `rope_type` or `type`.

    Args:
      config: The parsed `config.json`.
      default_theta: The base where the configuration states none.
      scale_sliding: Whether a scaling that is not nested also holds for sliding layers (it does
        not in OLMo 3).
      default_local: Where sliding layers have a base of their own, `rope_local_base_freq`, and none
        of the settings that are not nested: that base if the configuration states none.

    Returns:
      The settings for `full_attention` and for `sliding_attention` layers.

    Raises:
      InputError: An unknown type, a setting that its type does not read, a missing or
        contradictory one.
    """
    theta = local = config.get("rope_theta")
    default_of = {"full_attention": default_theta, "sliding_attention": default_theta}
    if default_local is not None:
        local, default_of["sliding_attention"] = config.get("rope_local_base_freq"), default_local
    nested: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise InputError(f"{name}: got {value!r}; must be a dictionary or null")
        found = {key: dict(value[key] or {}) for key in LAYER_TYPES if key in value}
        rest = {key: item for key, item in value.items() if key not in LAYER_TYPES}
        if found and rest:
            raise InputError(
                f"{name}: got {sorted(rest)} beside {sorted(found)}; nest all of it by layer type"
            )
        if default_local is not None and name == "rope_parameters" and rest:
            raise InputError(
                f"rope_parameters: got {sorted(rest)}; here they are nested by {LAYER_TYPES}"
            )
        if not found:
            sliding = rest if scale_sliding else {"rope_theta": rest.get("rope_theta")}
            sliding = sliding if default_local is None else {}
            found = {"full_attention": rest, "sliding_attention": sliding}
        for key, item in found.items():
            if nested.get(key, item) != item:
                raise InputError(
                    f"{name}: got {item} beside rope_parameters {nested[key]}; remove one of them"
                )
            nested[key] = item
    ropes = {}
    for layer_type in LAYER_TYPES:
        settings = nested.get(layer_type, {})
        base = theta if layer_type == "full_attention" else local
        ropes[layer_type] = _parse(
            layer_type,
            settings,
            base,
            default_of[layer_type],
            config.get("max_position_embeddings"),
        )
    return ropes


def _parse(
    layer_type: str,
    settings: Mapping[str, Any],
    theta: float | None,
    default_theta: float,
    max_positions: int | None,
) -> Rope:
    settings = {key: value for key, value in settings.items() if value is not None}
    types = {settings.pop(key) for key in ("rope_type", "type") if key in settings} or {"default"}
    rope_type = types.pop()
    if types or rope_type not in SETTINGS:
        raise InputError(
            f"rope_type: got {sorted({rope_type, *types})}; must be one of {', '.join(SETTINGS)}"
        )
    if settings.get("partial_rotary_factor") == 1:
        settings.pop("partial_rotary_factor")
    if theta is not None and settings.setdefault("rope_theta", theta) != theta:
        raise InputError(
            f"rope_theta: got {theta} and {settings['rope_theta']} ({layer_type}); remove one"
        )
    settings.setdefault("rope_theta", default_theta)
    if unused := settings.keys() - SETTINGS[rope_type]:
        raise InputError(
            f"rope_parameters: got {sorted(unused)}; rope_type {rope_type!r} reads only "
            f"{sorted(SETTINGS[rope_type])}"
        )
    if missing := REQUIRED[rope_type] - settings.keys():
        raise InputError(
            f"rope_parameters: got no {sorted(missing)}; rope_type {rope_type!r} needs them"
        )
    for name, value in settings.items():
        if name != "truncate" and (type(value) not in (int, float) or not 0 <= value < math.inf):
            raise InputError(f"rope_parameters.{name}: got {value!r}; must be a positive number")
    for name in ("rope_theta", "factor"):  # divisors
        if settings.get(name) == 0:
            raise InputError(f"rope_parameters.{name}: got 0; must be a positive number")
    if rope_type in ("yarn", "llama3") and "original_max_position_embeddings" not in settings:
        if max_positions is None:
            raise InputError("rope_parameters: got no 'original_max_position_embeddings'; state it")
        settings["original_max_position_embeddings"] = max_positions
    return Rope(rope_type, **settings)


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position, float32 `[head_dim / 2]`, and the factor on cosine and sine."""
    inverse = rope.rope_theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    settings, scale = dataclasses.asdict(rope), 1.0
    if rope.rope_type == "linear":
        inverse = inverse / settings["factor"]
    elif rope.rope_type == "llama3":
        inverse = _llama3(settings, inverse)
    elif rope.rope_type == "yarn":
        inverse, scale = _yarn(settings, inverse, head_dim)
    return inverse.astype(np.float32), scale


def _llama3(settings: Mapping[str, Any], inverse: np.ndarray) -> np.ndarray:
    """Slow rotations are slowed by `factor`, fast ones kept, those between interpolated."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * inverse / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * inverse / settings["factor"] + smooth * inverse


def _yarn(
    settings: Mapping[str, Any], inverse: np.ndarray, head_dim: int
) -> tuple[np.ndarray, float]:
    """As `_llama3`, but interpolated over the dimension, and with a temperature."""
    factor, attention_factor = settings["factor"], settings["attention_factor"]

    def dimension(turns: float) -> float:
        ratio = settings["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(settings["rope_theta"]))

    low, high = dimension(settings["beta_fast"] or 32), dimension(settings["beta_slow"] or 1)
    if settings["truncate"] is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    inverse = inverse / factor * ramp + inverse * (1 - ramp)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if attention_factor is not None:
        return inverse, attention_factor
    if settings["mscale"] and settings["mscale_all_dim"]:
        return inverse, temperature(settings["mscale"]) / temperature(settings["mscale_all_dim"])
    return inverse, temperature(1.0)


def table(
    rope: Rope, head_dim: int, positions: Int[Array, "row time"]
) -> tuple[Float[Array, "row time half"], Float[Array, "row time half"]]:
    """Cosine and sine, float32 `[row, time, head_dim / 2]`, of positions `[row, time]`."""
    inverse, scale = frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[..., None] * inverse[None, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "row time heads head_dim"],
    cos: Float[Array, "#row time half"],
    sin: Float[Array, "#row time half"],
) -> Float[Array, "row time heads head_dim"]:
    """Turns the pairs (i, i + head_dim / 2) of every head in float32; the type of `x` stays."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
