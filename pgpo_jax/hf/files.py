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

INDEX = "model.safetensors.index.json"


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
    for path in _files(folder):
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


def _files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, as `transformers` chooses them.

    A whole file comes before an index and its shards, which an earlier save may have left there.
    """
    single = folder / "model.safetensors"  # some repositories hold other forms beside it
    if single.is_file():
        return [single]
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise InputError(f"model.path: got {folder / INDEX} without a weight_map of file names")
        names = sorted({str(name) for name in places.values()})
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII):
                raise InputError(
                    f"model.path: got the shard {name!r} in {folder / INDEX}; must be the name of "
                    "a .safetensors file in that folder"
                )
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise InputError(
                f"model.path: got {folder} without {', '.join(missing)}, which {INDEX} names; "
                "fetch what is missing"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"model.path: got {folder} without *.safetensors; convert it to these")
    return files


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      InputError: Not there, or something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"model.path: got {path}, which cannot be read ({one_line(error)}); must be JSON"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"model.path: got {path} with a {type(value).__name__}; must be an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object, for people too."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def one_line(error: Exception) -> str:
    """The first line of an error's text."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
