"""Adapters in PEFT's format, out and in: adapter_config.json and adapter_model.safetensors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pgpo_jax import models, sharding
from pgpo_jax.errors import InputError
from pgpo_jax.hf.files import ADAPTER, one_line, read_json, write_json
from pgpo_jax.hf.names import layer_name
from pgpo_jax.models import LoraConfig, ModelConfig, Params

TENSORS = "adapter_model.safetensors"
READ = {"peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path"}
"""Entries of adapter_config.json that say what the adapters are."""
ALLOWED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian"),  # others change the model itself
    "task_type": ("CAUSAL_LM", None),
}
"""Entries with values other than null or off that are no matter."""
UNREAD = {
    *("auto_mapping", "inference_mode", "lora_dropout", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision"),
}
"""Entries that do not change what the adapters compute. Any other must be null or off."""


def save_adapters(
    path: str | Path, config: ModelConfig, lora: LoraConfig, adapters: Params, base: str | None
) -> None:
    """Writes a folder that `peft` and `load_adapters` read.

    Args:
      path: The folder; made if need be.
      config: The architecture of the model.
      lora: Rank, alpha and targets.
      adapters: The trained parameters, on any mesh; a collective if they are spread over hosts.
      base: The model that they belong to: a folder, or its name on the hub.
    """
    from safetensors.numpy import save_file

    values = sharding.fetch(adapters["layers"])
    tensors = {
        name: np.ascontiguousarray(_matrix(leaf, values[leaf][layer]))
        for name, (leaf, layer) in _tensors(config, lora).items()
    }
    if not sharding.is_main():
        return
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    write_json(folder / ADAPTER, settings)


def load_adapters(config: ModelConfig, lora: LoraConfig, mesh: Mesh | None = None) -> Params:
    """The adapters in the folder `lora.path`, float32, where they will live.

    Raises:
      InputError: The folder is none of PEFT's, or its adapters are not those of `lora` for a model
        of this architecture.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    table = models.adapter_leaves(config, lora)["layers"]
    folder = _check_settings(lora)
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"model.lora.path: got {folder}, whose {TENSORS} cannot be read ({one_line(error)})"
        ) from error
    wanted = _tensors(config, lora)
    shapes = {
        name: _matrix(leaf, np.empty(table[leaf].shape[1:], bool)).shape
        for name, (leaf, _) in wanted.items()
    }
    wrong = [name for name in wanted if name in tensors and tensors[name].shape != shapes[name]]
    if wrong := [*sorted(tensors.keys() ^ wanted.keys()), *wrong]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"model.lora.path: got {folder}, whose tensors are not those of such adapters for this "
            f"model: {', '.join(wrong[:3])}{more}"
        )
    found = {name: np.empty(leaf.shape, np.float32) for name, leaf in table.items()}
    for name, (leaf, layer) in wanted.items():
        found[leaf][layer] = tensors[name].T.reshape(table[leaf].shape[1:])
    if mesh is None:
        return {"layers": jax.tree.map(jax.numpy.asarray, found)}
    where = sharding.shardings({n: leaf.axes for n, leaf in table.items()}, found, mesh)
    place = jax.make_array_from_callback
    return {
        "layers": {
            name: place(array.shape, where[name], lambda index, array=array: array[index])
            for name, array in found.items()
        }
    }


def adapter_notes(lora: LoraConfig, base: str | None) -> tuple[str, ...]:
    """What should be known where adapters say that they belong to a model of another name."""
    if lora.path is None:
        return ()
    stated = read_json(Path(lora.path) / ADAPTER, "model.lora.path").get("base_model_name_or_path")
    if stated is None or (base and Path(str(stated)).name == Path(base).name):
        return ()
    return (
        f"the adapters in {lora.path} were made for {stated}; model.path is {base}, so make sure "
        "that it is the same model",
    )


def _tensors(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[str, int]]:
    """PEFT's name of every tensor -> our leaf, and the layer."""
    found = {}
    for layer in range(config.num_hidden_layers):
        for target in lora.targets:
            module = layer_name(target, layer).removesuffix(".weight")
            for leaf, part in zip(models.adapter_names(target), "AB", strict=True):
                found[f"base_model.model.{module}.lora_{part}.weight"] = leaf, layer
    return found


def _matrix(leaf: str, array: np.ndarray) -> np.ndarray:
    """A layer's A `[in, rank]` or B `[rank, out]` as PEFT has it: `[rank, in]`, `[out, rank]`."""
    rank_last = leaf.endswith("_a")
    rows = math.prod(array.shape[:-1]) if rank_last else array.shape[0]
    return array.reshape(rows, -1).T


def _check_settings(lora: LoraConfig) -> Path:
    """The folder, whose adapter_config.json must say what `lora` does, and nothing besides."""
    folder = Path(str(lora.path))
    if not (folder / ADAPTER).is_file():
        raise InputError(f"model.lora.path: got {folder}; must be a folder with {ADAPTER}")
    stated = read_json(folder / ADAPTER, "model.lora.path")
    unsupported = {name: value for name, value in stated.items() if not _supported(name, value)}
    if stated.get("peft_type") != "LORA":
        unsupported["peft_type"] = stated.get("peft_type")
    if unsupported:
        name, value = next(iter(sorted(unsupported.items())))
        raise InputError(
            f"model.lora.path: got {folder} with {name} {value!r} in {ADAPTER}, which is not "
            "supported; must be plain LoRA"
        )
    _check_same(stated, lora, folder)
    return folder


def _supported(name: str, value: Any) -> bool:
    if name in ALLOWED:
        return any(value is allowed or value == allowed for allowed in ALLOWED[name])
    return name in READ | UNREAD or not value


def _check_same(stated: Mapping[str, Any], lora: LoraConfig, folder: Path) -> None:
    targets = stated.get("target_modules")
    listed = sorted(map(str, targets)) if isinstance(targets, list) else targets
    for field, got, there in (
        ("rank", lora.rank, stated.get("r")),
        ("alpha", lora.alpha, stated.get("lora_alpha")),
        ("targets", sorted(lora.targets), listed),
    ):
        if got != there:
            raise InputError(
                f"model.lora.{field}: got {got}; the adapters in {folder} have {there}"
            )
