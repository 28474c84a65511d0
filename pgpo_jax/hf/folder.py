"""Hugging Face checkpoints in and out: one name table, applied in both directions.

Reading is by device shard: every shard takes just its part of just the tensors it needs from the
memory-mapped files, so no host holds the model twice. Only safetensors are read; torch is never
imported here.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Key

from pgpo_jax import sharding
from pgpo_jax.errors import InputError, require
from pgpo_jax.hf import files
from pgpo_jax.hf.files import Tensor, one_line, read_json, write_json
from pgpo_jax.models import Leaf, ModelConfig, Options, decoder

# Leaf of our tree -> tensor of the checkpoint. Layers' names are repeated for every layer.
NAMES = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
LAYER_NAMES = {
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    "input_layernorm": "input_layernorm.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "post_feedforward_layernorm": "post_feedforward_layernorm.weight",
}
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The student: a checkpoint (`path`), or a small model with random weights (`architecture`)."""

    path: str | None = None
    """Folder with config.json and safetensors, or the name of a model on the Hugging Face hub."""
    architecture: dict[str, Any] | None = None
    """Instead of `path`: a config.json written out here; the weights are random."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the computation; parameters are float32 in any case."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass computes again: nothing, everything, or all but matrix products."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel; auto takes cudnn on GPU, splash on TPU for long rows, else xla."""
    unroll: bool = False
    """Write the layers out instead of scanning: for small models on CPU."""

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
        dtype = jnp.dtype(self.dtype)
        return Options(dtype, remat=self.remat, attention=self.attention, unroll=self.unroll)


def from_section(
    section: ModelSection, mesh: Mesh | None, key: Key[Array, ""]
) -> tuple[nnx.GraphDef, dict[str, Any], Any]:
    """The model that a run states.

    Args:
      section: The config section `model`.
      mesh: Where the parameters live.
      key: For random weights.

    Returns:
      The graphdef, the float32 parameters and the tokenizer; None for a stated architecture, whose
      task brings its own.

    Raises:
      InputError: Neither `path` nor `architecture` is stated, or they cannot be used.
    """
    if section.architecture is not None:
        config = ModelConfig.from_hf(section.architecture, strict=True)
        return *decoder.init(config, section.options(), key, mesh), None
    if section.path is None:
        raise InputError("model.path: got null; state a checkpoint, or model.architecture")
    load_config(section.path)  # what may be wrong comes first, the weights take long
    tokenizer = load_tokenizer(section.path)
    return *load(section.path, mesh=mesh, options=section.options()), tokenizer


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.bfloat16,
    options: Options | None = None,
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Reads a checkpoint of any supported architecture.

    Args:
      path: A folder with config.json and safetensors (one file or several), or the name of a model
        on the Hugging Face hub, which is downloaded into its cache.
      mesh: The parameters are read straight into their shards on it; None: the default device.
      dtype: Type of the computation; parameters are float32.
      options: More about the computation; then `dtype` is not read.

    Returns:
      `graphdef` and `params`, for `nnx.merge(graphdef, params)(tokens)`.

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
    shapes = decoder.param_shapes(config)
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: device, shapes)
    else:
        where = sharding.shardings(decoder.param_axes(config), shapes, mesh)

    def stack(name: str, leaf: Leaf, place: Any, names: Callable[[int], str]) -> Array:
        return _stack(leaf, place, _groups(name, leaf), lambda layer: tensors[names(layer)])

    table = decoder.leaves(config)
    layers = {
        name: stack(name, leaf, where["layers"][name], functools.partial(_layer_name, name))
        for name, leaf in table.pop("layers").items()
    }
    params: dict[str, Any] = {
        name: stack(name, leaf, where[name], lambda _, name=name: NAMES[name])
        for name, leaf in table.items()
    }
    params["layers"] = layers
    return decoder.make_graphdef(config, options), params


def save(
    path: str | Path,
    graphdef: nnx.GraphDef,
    params: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` and `load` read: safetensors, config.json, tokenizer.

    With several processes all must call it; the first one writes.

    Args:
      path: The folder; made if need be. Model files of an earlier save in it are replaced.
      graphdef: The model.
      params: Its parameters, on any mesh.
      tokenizer: A `transformers` tokenizer, saved beside the model.
      dtype: Of the saved tensors; float32 keeps every bit of the parameters.
      shard_bytes: Most bytes in one file, but for a tensor that is larger by itself.
    """
    from safetensors.numpy import save_file

    if dtype not in DTYPES:
        raise InputError(f"dtype: got {dtype!r}; must be one of {', '.join(DTYPES)}")
    folder, main = Path(path), sharding.is_main()
    config: ModelConfig = nnx.merge(graphdef, params).config
    width = jnp.dtype(dtype).itemsize
    shards: list[list[_Entry]] = [[]]
    size = total = 0
    for entry in _entries(config):
        count = width * math.prod(entry.shape)
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size, total = size + count, total + count
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (
            *folder.glob("model*.safetensors"),
            *folder.glob("model.safetensors.index.json"),
        ):
            old.unlink()
    index = {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        # One file at a time is held on the host.
        tensors = {entry.name: entry.export(params, jnp.dtype(dtype)) for entry in entries}
        if main:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
    if not main:
        return
    if len(shards) > 1:
        listing = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(folder / "model.safetensors.index.json", listing)
    write_json(folder / "config.json", {**config.to_hf(), "dtype": dtype})
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: value for name in ids if (value := config.to_hf()[name]) is not None}
    write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_config(path: str | Path) -> ModelConfig:
    """The architecture, with the end tokens of generation_config.json where that states any."""
    folder = files.folder(path, ["*.json"])
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file() and (ends := read_json(generation).get("eos_token_id")) is not None:
        config["eos_token_id"] = ends
    return ModelConfig.from_hf(config)


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's `transformers` tokenizer."""
    from transformers import AutoTokenizer

    folder = files.folder(path, ["*.json", "*.txt", "*.model", "*.jinja"])
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_json(settings):  # transformers would ask to run it
        raise InputError(
            f"model.path: got {path}, whose tokenizer needs code of its own (auto_map), which is "
            "never run; give a model with a tokenizer.json alone"
        )
    # From a folder without a vocabulary, transformers would make an empty tokenizer.
    cause = f"there is none of {', '.join(VOCABULARIES)}"
    if any((folder / name).is_file() for name in VOCABULARIES):
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers raises many types for one cause
            cause = one_line(error)
    raise InputError(f"model.path: got {path}, whose tokenizer does not load: {cause}")


def end_tokens(*sources: Any) -> tuple[int, ...]:
    """The tokens that end a response, sorted.

    Args:
      *sources: Checkpoints (config.json and generation_config.json are read), `ModelConfig`s and
        tokenizers; None is skipped.
    """
    ends: set[int] = set()
    for source in sources:
        if isinstance(source, str | Path):
            folder = files.folder(source, ["*.json"])
            paths = [folder / "config.json", folder / "generation_config.json"]
            stated = [read_json(path).get("eos_token_id") for path in paths if path.is_file()]
        else:
            stated = [getattr(source, "eos_token_id", None)]
        for value in stated:
            ends.update((value,) if isinstance(value, int) else value or ())
    return tuple(sorted(ends))


# ---- the table ----


def _layer_name(leaf: str, layer: int) -> str:
    return f"model.layers.{layer}.{LAYER_NAMES[leaf]}"


def _groups(name: str, leaf: Leaf) -> tuple[tuple[int, ...], ...]:
    """Which of our axes (without `layer`) make up each axis of the checkpoint's tensor, in order.

    A linear layer is stored [out, in] there and [in, out] here, its heads as one axis.
    """
    axes = tuple(range(len(leaf.shape) - (leaf.axes[0] == "layer")))
    if name.endswith("_proj"):
        inputs = 2 if name == "o_proj" else 1
        return axes[inputs:], axes[:inputs]
    if name in ("embed_tokens", "lm_head"):
        return (0,), (1,)
    return (axes,)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of the checkpoint, and where it comes from."""

    name: str
    leaf: str
    layer: int | None
    groups: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]

    def export(self, params: Mapping[str, Any], dtype: Any) -> np.ndarray:
        array = params[self.leaf] if self.layer is None else params["layers"][self.leaf][self.layer]
        array = np.asarray(sharding.fetch(array)).astype(dtype)
        return np.ascontiguousarray(
            array.transpose(*itertools.chain(*self.groups)).reshape(self.shape)
        )


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    """Every tensor of a checkpoint of this architecture, in the order of the forward pass."""
    table = decoder.leaves(config)

    def entry(name: str, leaf: str, layer: int | None, of: Leaf) -> _Entry:
        own = of.shape if layer is None else of.shape[1:]
        groups = _groups(leaf, of)
        shape = tuple(math.prod(own[axis] for axis in group) for group in groups)
        return _Entry(name, leaf, layer, groups, shape)

    yield entry(NAMES["embed_tokens"], "embed_tokens", None, table["embed_tokens"])
    for layer in range(config.num_hidden_layers):
        for leaf, of in table["layers"].items():
            yield entry(_layer_name(leaf, layer), leaf, layer, of)
    for leaf in ("norm", "lm_head"):
        if leaf in table:
            yield entry(NAMES[leaf], leaf, None, table[leaf])


def _stack(
    leaf: Leaf,
    where: jax.sharding.Sharding,
    groups: tuple[tuple[int, ...], ...],
    tensor: Callable[[int], Tensor],
) -> jax.Array:
    """One parameter, float32, every shard read by itself."""
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
            out = np.empty([stop - start for start, stop in spans], np.float32)
            if stacked:
                for layer in range(*spans[0]):
                    out[layer - spans[0][0]] = one(layer, spans[1:])
            else:
                out[...] = one(0, spans)
            shards[spans] = out
        return shards[spans]

    return jax.make_array_from_callback(leaf.shape, where, shard)


# ---- checks ----


def _check(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Every tensor must have its place, and every place its tensor: all that fail, at once."""
    expected = {entry.name: entry.shape for entry in _entries(config)}
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
