"""Low-rank adapters of a decoder's projections, trained while the model itself stays (LoRA).

The product of a projection x W becomes x W + alpha / rank * (x A) B, with A `[layer, in, rank]` and
B `[layer, rank, out]` in float32. B begins at zero, so that the model is at first what it was.

Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; first values as in PEFT.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key

from pgpo_jax import sharding
from pgpo_jax.errors import InputError, require
from pgpo_jax.models.architecture import ModelConfig
from pgpo_jax.models.parameters import Leaf, Params, axes_of, inputs, leaves, shapes_of

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that are trained in the model's place (config section `model.lora`)."""

    rank: int = 0
    """Columns of A and rows of B; 0 trains the whole model, without adapters."""
    alpha: float = 32.0
    """An adapter's product is multiplied by alpha / rank."""
    targets: tuple[Target, ...] = TARGETS
    """The projections that get an adapter, in every layer."""
    base_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the frozen parameters, which student and teacher share; a checkpoint in float32 is
    rounded to it."""
    path: str | None = None
    """A PEFT folder whose adapters are the first ones, of this rank, alpha and targets; null: A
    random, B zero."""

    def __post_init__(self):
        require(
            "model.lora",
            self,
            rank=(self.rank >= 0, "at least 0"),
            alpha=(self.alpha > 0, "positive"),
            targets=(
                0 < len(self.targets) == len({*self.targets} & {*TARGETS}),
                f"some of {', '.join(TARGETS)}, each once",
            ),
            base_dtype=(self.base_dtype in ("bfloat16", "float32"), "bfloat16 or float32"),
            path=(self.path is None or self.rank > 0, "null where model.lora.rank is 0"),
        )

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank


OFF = LoraConfig()
"""No adapters: every parameter is trained."""


def adapter_names(target: str) -> tuple[str, str]:
    """The parameters A and B of a projection's adapter."""
    return f"{target}_lora_a", f"{target}_lora_b"


def adapter_leaves(config: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """The parameters of the adapters, as `parameters.leaves` has those of the model.

    Raises:
      InputError: The rank is more than a matrix of this model can have.
    """
    table, found = leaves(config)["layers"], {}
    for target in TARGETS:
        if target not in lora.targets:
            continue
        (depth, *sizes), (layer, *axes) = table[target]
        count = inputs(target)
        smaller = min(math.prod(sizes[:count]), math.prod(sizes[count:]))
        if lora.rank > smaller:
            raise InputError(
                f"model.lora.rank: got {lora.rank}; must be at most {smaller}, the smaller side of "
                f"{target}"
            )
        name_a, name_b = adapter_names(target)
        found[name_a] = Leaf((depth, *sizes[:count], lora.rank), (layer, *axes[:count], None))
        found[name_b] = Leaf((depth, lora.rank, *sizes[count:]), (layer, None, *axes[count:]))
    return {"layers": found}


def init_adapters(
    config: ModelConfig, lora: LoraConfig, key: Key[Array, ""], mesh: Mesh | None = None
) -> Params:
    """The adapters before training: A uniform within 1 / sqrt(in), B zero; made where they live.

    The values do not depend on the mesh, nor those of a projection on the other targets.
    """
    table = adapter_leaves(config, lora)

    def make(key: Array) -> Params:
        found = {}
        for target in lora.targets:
            name_a, name_b = adapter_names(target)
            a, b = (table["layers"][name].shape for name in (name_a, name_b))
            bound = math.prod(a[1:-1]) ** -0.5
            own = jax.random.fold_in(key, TARGETS.index(target))
            found[name_a] = jax.random.uniform(own, a, jnp.float32, -bound, bound)
            found[name_b] = jnp.zeros(b)
        return {"layers": found}

    where = None
    if mesh is not None:
        where = sharding.shardings(axes_of(table), shapes_of(table), mesh)
    return jax.jit(make, out_shardings=where)(key)


def abstract_params(
    config: ModelConfig, lora: LoraConfig, mesh: Mesh
) -> tuple[Params, Params | None]:
    """Shapes, types and shardings of the parameters: the trained ones, and those that are frozen
    beside them (None without adapters)."""

    def abstract(table: dict[str, Any], dtype: Any) -> Params:
        shapes = shapes_of(table, dtype)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            sharding.shardings(axes_of(table), shapes, mesh),
        )

    if not lora.rank:
        return abstract(leaves(config), jnp.float32), None
    base = abstract(leaves(config), jnp.dtype(lora.base_dtype))
    return abstract(adapter_leaves(config, lora), jnp.float32), base


def merged(params: Params, adapters: Params, lora: LoraConfig) -> Params:
    """The parameters of the model without adapters that computes the same, float32.

    Args:
      params: Those that are frozen.
      adapters: Those that were trained beside them.
      lora: Their settings.
    """
    layers = {name: x.astype(jnp.float32) for name, x in params["layers"].items()}
    for target in lora.targets:
        a, b = (adapters["layers"][name] for name in adapter_names(target))
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision="highest"))(a, b)
        layers[target] = layers[target] + lora.scale * product
    return {name: x.astype(jnp.float32) for name, x in params.items() if name != "layers"} | {
        "layers": layers
    }
