"""The files of a Hugging Face checkpoint: its folder, JSON, and tensors that are not yet read.

Only safetensors are opened: a header with names, types, shapes and offsets, checked against the
file's size when it is opened, and bytes. Nothing in a checkpoint is run, and no name in it leads
out of its folder (but a link that is there already is followed: the hub's cache consists of them).
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pgpo_jax.errors import InputError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str
    """In the words of the format: F32, BF16, ..."""

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of it; nothing else is read from the file."""
        return self.file.get_slice(self.name)[index]


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, not yet read.

    Raises:
      InputError: A file that is missing, damaged or cut short, or a tensor in two of them.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for path in weight_files(folder):
        try:
            file: Any = safe_open(path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"model.path: got {path}, which cannot be read ({one_line(error)}); fetch it again"
            ) from error
        for name in file.keys():  # noqa: SIM118
            if name in tensors:
                raise InputError(
                    f"model.path: got {folder} with {name} in both {where[name]} and {path.name}; "
                    "remove the file that is not the model's"
                )
            part = file.get_slice(name)
            tensors[name] = Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
            where[name] = path.name
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, as `transformers` chooses them.

    A whole file comes before an index and its shards, which an earlier save may have left there.
    Where there is neither, all of the folder's files are taken.

    Raises:
      InputError: There are none, some are missing, or the folder is one of an adapter.
    """
    if (folder / ADAPTER).is_file():  # transformers would load another model, and this on top of it
        raise InputError(
            f"model.path: got {folder}, which has an {ADAPTER}; give the model that it adapts, and "
            "the folder as model.lora.path, or remove the file if it is merged already"
        )
    config = folder / "config.json"
    stated = read_json(config).get("transformers_weights") if config.is_file() else None
    if stated is not None:
        if str(stated).endswith(".safetensors.index.json"):
            return _shards(folder, _inside(folder, "config.json", stated))
        return [_inside(folder, "config.json", stated)]
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        return _shards(folder, folder / INDEX)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        but = f" but with {pickles} (pickle, which is never read)" if pickles else ""
        raise InputError(
            f"model.path: got {folder} without *.safetensors{but}; convert it to these"
        )
    return files


def describe_files(path: str | Path) -> str:
    """Which files of a checkpoint are taken, and which that lie beside them are not."""
    where = folder(path, ["*.json", "*.safetensors"])
    taken = [path.name for path in weight_files(where)]
    kinds = ("*.safetensors", *((INDEX,) if taken == [WHOLE] else ()), "*.bin")
    there = {path.name for kind in kinds for path in where.glob(kind)} - {*taken}
    text = taken[0] if len(taken) == 1 else f"{len(taken)} files, {taken[0]} to {taken[-1]}"
    text = f"weights from {text} in {where}"
    if not there:
        return text
    names = sorted(there)
    return f"{text}; beside them, not read: {', '.join(names[:4])}{' ...' if names[4:] else ''}"


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that an index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"model.path: got {index} without a weight_map of file names")
    files = [_inside(folder, index.name, name) for name in {*map(str, places.values())}]
    if missing := sorted(path.name for path in files if not path.is_file()):
        raise InputError(
            f"model.path: got {folder} without {', '.join(missing)}, which {index.name} names; "
            "fetch what is missing"
        )
    return sorted(files)


def _inside(folder: Path, where: str, name: Any) -> Path:
    """A file of the folder that one of its files names."""
    if not re.fullmatch(r"[\w.-]+\.safetensors(\.index\.json)?", str(name), re.ASCII):
        raise InputError(
            f"model.path: got the shard {name!r} in {folder / where}; must be the name of "
            "a .safetensors file in that folder"
        )
    return folder / str(name)


def folder(path: str | Path, patterns: list[str]) -> Path:
    """A local folder as it is; else the hub's model of that name, from the hub's cache.

    Args:
      path: The folder or the name.
      patterns: The files that are needed, if they must be fetched.

    Raises:
      InputError: Neither.
    """
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise InputError(f"model.path: got {path}; must be a folder or the name of a hub model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # no network, no such model, no permission: many types
        raise InputError(
            f"model.path: got {path}, which is no folder and does not come from the Hugging Face "
            f"hub ({one_line(error)}); check the name, the network and the permissions"
        ) from error


def read_json(path: Path, field: str = "model.path") -> dict[str, Any]:
    """A JSON object.

    Raises:
      InputError: Not there, or something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{field}: got {path}, which cannot be read ({one_line(error)}); must be JSON"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{field}: got {path} with a {type(value).__name__}; must be an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object, for people too."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def one_line(error: Exception) -> str:
    """The first line of an error's text."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
