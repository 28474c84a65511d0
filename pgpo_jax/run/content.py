"""Content of a run: what decides it but stands in no field, as digests that a checkpoint keeps."""

import hashlib
import zlib
from collections.abc import Mapping
from importlib import metadata

from pgpo_jax import hf, sharding, tasks
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError
from pgpo_jax.run.setup import Run

NAMES = {
    "train": "task: got other training questions",
    "test": "task: got other held-out questions",
    "reward": "task.reward: got a file with another text",
    "task": "task.name: got a file with another text",
    "replay": "optimizer.replay: got a file with another text",
    "model/weights": "model.path: got other weights",
    "model/tokenizer": "model.path: got another tokenizer",
    "adapters/weights": "model.lora.path: got other adapters",
    "teacher/weights": "teacher.path: got other weights",
    "teacher/tokenizer": "teacher.path: got another tokenizer",
}
"""Part of the content -> what is said where it has changed."""
PACKAGES = ("pgpo_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def _said(part: str) -> str:
    """What is said where a part of the content has changed."""
    also, label, what = [*part.split("/"), "", ""][:3]
    if also != "also":
        return NAMES[part]
    said = {"reward": "another reward function", "task": "another file"}
    what = said.get(what, "other questions")
    return f"evaluation.also: got {what} of {label}"


def content(run: Run) -> dict[str, str]:
    """Digests of the questions and of the files that the configuration names.

    Raises:
      InputError: A file cannot be read, or hosts do not have the same content.
    """
    config = run.config
    found = dict(tasks.digest(run.task))
    for each in run.held_out[1:]:
        digests = tasks.digest(each.task)
        del digests["train"]  # which nothing asks
        found |= {f"also/{each.label}/{part}": value for part, value in digests.items()}
    if config.optimizer.replay is not None:
        found["replay"] = _file(config.optimizer.replay, "optimizer.replay")
    for section, path in (("model", config.model.path), ("teacher", config.teacher.path)):
        if path is not None:
            found |= {f"{section}/{part}": value for part, value in hf.content(path).items()}
    if config.model.lora.path is not None:
        found["adapters/weights"] = hf.content(config.model.lora.path)["weights"]
    for part, value in found.items():
        number = zlib.crc32(value.encode()) >> 1
        largest, smallest = sharding.agree_max([number, -number])
        if largest != -smallest:
            raise InputError(
                f"{_said(part)} on some hosts than on others; give all of them the same files"
            )
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that numbers may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from its sources
            found[name] = "unknown"
    return found


def check_content(before: Mapping[str, str], now: Mapping[str, str], config: Config) -> list[str]:
    """What changed since the checkpoint was saved, where that is accepted.

    Args:
      before: The content that the checkpoint keeps; one of an earlier version keeps none.
      now: The content of today.
      config: Says whether changes are accepted.

    Raises:
      InputError: Something changed, and `checkpoint.accept_changes` is off.
    """
    changed = [part for part in now if before.get(part) and now[part] != before[part]]
    told = [f"{_said(part).replace(': got', ' has')}" for part in changed]
    if changed and not config.checkpoint.accept_changes:
        first = changed[0]
        more = f"; so has {', '.join(changed[1:])}" if len(changed) > 1 else ""
        raise InputError(
            f"{_said(first)} (digest {now[first]}) than the run in {config.output_dir} was started "
            f"with ({before[first]}){more}: bring that back, choose another output_dir, or delete "
            "this one to start anew (--checkpoint.accept_changes true goes on all the same)"
        )
    return told


def _file(path: str, field: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{field}: {path} cannot be read ({error.strerror})") from error
