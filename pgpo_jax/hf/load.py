"""Hugging Face checkpoints in: every device reads its part of every tensor.

Reading is by device shard: every shard takes just its part of just the tensors it needs from the
memory-mapped files, so no host holds the model twice. Only safetensors are read; torch is never
imported here.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Key

from pgpo_jax import keys, models, sharding
from pgpo_jax.errors import InputError, require
from pgpo_jax.hf import files
from pgpo_jax.hf.adapters import load_adapters
from pgpo_jax.hf.files import Tensor, read_json
from pgpo_jax.hf.names import DTYPES, NAMES, entries, groups, layer_name
from pgpo_jax.hf.tokenizer import load_tokenizer
from pgpo_jax.models import GraphDef, Leaf, LoraConfig, ModelConfig, Options, Params


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The student: a checkpoint (`path`), or a small model with random weights (`architecture`)."""

    path: str | None = None
    """Folder with config.json and safetensors, or the name of a model on the Hugging Face hub."""
    architecture: dict[str, Any] | None = None
    """Instead of `path`: a config.json written out here; the weights are random."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the computation; what is trained is float32 in any case."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass computes again: nothing, everything, or all but matrix products."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel; auto takes cudnn on GPU, splash on TPU for long rows, else xla."""
    unroll: bool = False
    """Write the layers out instead of scanning: for small models on CPU."""
    reduce_dtype: Literal["bfloat16", "float32"] | None = None
    """Type in which the gradients of a layer's matrices are summed over devices (FSDP's
    `reduce_dtype`); null: that of the computation. float32 doubles what they move."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Low-rank adapters that are trained in the model's place; off by default."""

    def __post_init__(self):
        require(
            "model",
            self,
            path=(self.path is None or self.architecture is None, "null where architecture is set"),
            dtype=(self.dtype in ("bfloat16", "float32"), "bfloat16 or float32"),
        )
        self.options()

    def options(self) -> Options:
        """How the model computes."""
        return Options(
            jnp.dtype(self.dtype),
            remat=self.remat,
            attention=self.attention,
            unroll=self.unroll,
            reduce_dtype=self.reduce_dtype,
            lora=self.lora,
        )


class Model(NamedTuple):
    """A model that a run states."""

    graphdef: GraphDef
    params: Params
    """What is trained, float32: all parameters, or the adapters."""
    config: ModelConfig
    tokenizer: Any
    """None for a stated architecture, whose task brings its own."""
    frozen: Params | None = None
    """The parameters beside adapters, of `lora.base_dtype`; None where all are trained."""


def from_section(section: ModelSection, mesh: Mesh | None, key: Key[Array, ""]) -> Model:
    """The model that a run states.

    Args:
      section: The config section `model`.
      mesh: Where the parameters live.
      key: For random weights and adapters.

    Raises:
      InputError: Neither `path` nor `architecture` is stated, or they cannot be used.
    """
    lora, options, tokenizer = section.lora, section.options(), None
    dtype = jnp.dtype(lora.base_dtype if lora.rank else "float32")
    if section.architecture is not None:
        config = ModelConfig.from_hf(section.architecture, strict=True)
        graphdef, params = models.init(config, options, key, mesh, dtype)
    elif section.path is not None:
        config = load_config(section.path)  # what may be wrong comes first, the weights take long
        if lora.rank:
            models.adapter_leaves(config, lora)
        tokenizer = load_tokenizer(section.path)
        graphdef, params = load(section.path, mesh=mesh, options=options, param_dtype=dtype)
    else:
        raise InputError("model.path: got null; state a checkpoint, or model.architecture")
    if not lora.rank:
        return Model(graphdef, params, config, tokenizer)
    if lora.path is not None:
        adapters = load_adapters(config, lora, mesh)
    else:
        own = jax.random.fold_in(key, keys.Stream.ADAPTERS)
        adapters = models.init_adapters(config, lora, own, mesh)
    return Model(graphdef, adapters, config, tokenizer, params)


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.bfloat16,
    options: Options | None = None,
    param_dtype: Any = jnp.float32,
) -> tuple[GraphDef, dict[str, Any]]:
    """Reads a checkpoint of any supported architecture.

    Args:
      path: A folder with config.json and safetensors (one file or several), or the name of a model
        on the Hugging Face hub, which is downloaded into its cache.
      mesh: The parameters are read straight into their shards on it; None: the default device.
      dtype: Type of the computation.
      options: More about the computation; then `dtype` is not read.
      param_dtype: Type of the parameters.

    Returns:
      `graphdef` and `params`, for `models.merge(graphdef, params)(tokens)`.

    Raises:
      InputError: The folder, configuration or tensors are not those of a supported model; all
        unmapped, missing and misshapen tensors are named together.
    """
    folder = files.folder(path, ["*.json", "*.safetensors"])
    config = load_config(folder)
    options = Options(dtype) if options is None else options
    options = options if mesh is None else dataclasses.replace(options, mesh=mesh)
    tensors = files.open_tensors(folder)
    _check(config, tensors, folder)
    shapes = models.param_shapes(config)
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: device, shapes)
    else:
        where = sharding.shardings(models.param_axes(config), shapes, mesh)

    def stack(name: str, leaf: Leaf, place: Any, names: Callable[[int], str]) -> Array:
        stored = leaf, groups(name, leaf), jnp.dtype(param_dtype)
        return _stack(stored, place, lambda layer: tensors[names(layer)])

    table = models.leaves(config)
    layers = {
        name: stack(name, leaf, where["layers"][name], functools.partial(layer_name, name))
        for name, leaf in table.pop("layers").items()
    }
    params: dict[str, Any] = {
        name: stack(name, leaf, where[name], lambda _, name=name: NAMES[name])
        for name, leaf in table.items()
    }
    params["layers"] = layers
    return models.make_graphdef(config, options), params


def load_config(path: str | Path) -> ModelConfig:
    """The architecture, with the end tokens of generation_config.json where that states any."""
    folder = files.folder(path, ["*.json"])
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file() and (ends := read_json(generation).get("eos_token_id")) is not None:
        config["eos_token_id"] = ends
    return ModelConfig.from_hf(config)


def _stack(
    stored: tuple[Leaf, tuple[tuple[int, ...], ...], np.dtype],
    where: jax.sharding.Sharding,
    tensor: Callable[[int], Tensor],
) -> jax.Array:
    """One parameter, by its leaf, groups of axes and type, every shard read by itself."""
    leaf, groups, dtype = stored
    stacked = leaf.axes[0] == "layer"
    order = tuple(itertools.chain(*groups))
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    shards: dict[Any, np.ndarray] = {}

    def one(layer: int, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        own = leaf.shape[1:] if stacked else leaf.shape
        index = []
        for group in groups:
            # Only the first axis of a group is ever split, so a part of it is one contiguous span.
            inner = math.prod(own[axis] for axis in group[1:])
            start, stop = spans[group[0]]
            index.append(slice(start * inner, stop * inner))
        part = tensor(layer).read(tuple(index))
        return part.reshape([spans[axis][1] - spans[axis][0] for axis in order]).transpose(inverse)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        full = index or (slice(None),) * len(leaf.shape)
        spans = tuple(part.indices(size)[:2] for part, size in zip(full, leaf.shape, strict=True))
        if spans not in shards:  # copies on other devices are read once
            out = np.empty([stop - start for start, stop in spans], dtype)
            if stacked:
                for layer in range(*spans[0]):
                    out[layer - spans[0][0]] = one(layer, spans[1:])
            else:
                out[...] = one(0, spans)
            shards[spans] = out
        return shards[spans]

    return jax.make_array_from_callback(leaf.shape, where, shard)


def _check(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Every tensor must have its place, and every place its tensor: all that fail, at once."""
    expected = {entry.name: entry.shape for entry in entries(config)}
    # Some tools write what follows from other tensors as well.
    implied = {name for name in tensors if name.endswith(".rotary_emb.inv_freq")}
    head, embedding = tensors.get("lm_head.weight"), tensors.get(NAMES["embed_tokens"])
    if config.tie_word_embeddings and head is not None and embedding is not None:
        if head.shape != embedding.shape or not _equal(head, embedding):
            raise InputError(
                f"tie_word_embeddings: got true, but in {folder} lm_head.weight differs from the "
                "embedding; set it to false in config.json"
            )
        implied.add("lm_head.weight")
    unmapped = sorted(tensors.keys() - expected.keys() - implied)
    missing = sorted(expected.keys() - tensors.keys())
    wrong = [
        f"{name} {list(tensors[name].shape)} for {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    types = sorted(
        f"{name} {tensors[name].dtype}"
        for name in expected.keys() & tensors.keys()
        if tensors[name].dtype not in DTYPES.values()
    )
    parts = [
        f"{len(names)} {what} ({', '.join(names)})"
        for what, names in (
            ("unmapped", unmapped),
            ("missing", missing),
            ("of the wrong shape", wrong),
            ("of an unsupported type", types),
        )
        if names
    ]
    if parts:
        raise InputError(
            f"model.path: got {folder} with tensors {'; '.join(parts)}; they must be those of "
            f"{config.model_type} as config.json states it, in {', '.join(DTYPES)}"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    rows = [slice(i, min(i + 4096, a.shape[0])) for i in range(0, a.shape[0], 4096)]
    return all(np.array_equal(a.read((part,)), b.read((part,))) for part in rows)
