"""Hugging Face checkpoints out: safetensors, config.json, tokenizer."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from pgpo_jax import models, sharding
from pgpo_jax.errors import InputError
from pgpo_jax.hf.files import write_json
from pgpo_jax.hf.names import DTYPES, Entry, entries
from pgpo_jax.models import GraphDef, ModelConfig

SHARD_BYTES = 5_000_000_000


def save(
    path: str | Path,
    graphdef: GraphDef,
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
    config: ModelConfig = models.merge(graphdef, params).config
    width = jnp.dtype(dtype).itemsize
    shards: list[list[Entry]] = [[]]
    size = total = 0
    for entry in entries(config):
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
    for number, part in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        # One file at a time is held on the host.
        tensors = {entry.name: entry.export(params, jnp.dtype(dtype)) for entry in part}
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
