"""Digests of the files of a Hugging Face checkpoint, cheap enough for every start of a run."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pgpo_jax.hf import files

TEXTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer and its chat template are read from."""
WINDOWS = 16
WINDOW = 1 << 16


def content(path: str) -> dict[str, str]:
    """What the checkpoint at `path` is, as 16 hexadecimal digits each.

    Args:
      path: A folder, or the name of a hub model.

    Returns:
      `weights` (config.json, and of every safetensors file its name, its size, its header and 16
      windows of 64 KiB spread over it: a change between the windows alone is not seen, one of all
      tensors is) and `tokenizer` (whole files).
    """
    folder = files.folder(path, ["*.json", "*.safetensors"])
    weights = hashlib.sha256(_text(folder / "config.json"))
    for file in sorted(folder.glob("*.safetensors")):
        for part in _parts(file):
            weights.update(part)
    tokenizer = hashlib.sha256()
    for name in TEXTS:
        tokenizer.update(name.encode() + hashlib.sha256(_text(folder / name)).digest())
    return {"weights": weights.hexdigest()[:16], "tokenizer": tokenizer.hexdigest()[:16]}


def _text(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _parts(path: Path) -> Iterable[bytes]:
    size = path.stat().st_size
    yield f"{path.name} {size}".encode()
    with open(path, "rb") as file:
        header = file.read(8)
        yield header + file.read(min(int.from_bytes(header, "little"), size))
        for window in range(WINDOWS):
            file.seek(max(size - WINDOW, 0) * window // (WINDOWS - 1))
            yield file.read(WINDOW)
