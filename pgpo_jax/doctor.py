"""Whether this machine, and what a configuration names, is ready for a run.

One screen: versions, devices and their memory, disk, caches, open files, and the extras that are
not installed. With CONFIG, which may be left out, also what that names: the mesh and its rows, the
model, the folders. Nothing is downloaded, loaded or trained. The exit code is 0, or 2 where
something would end a run.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from pgpo_jax import config as config_module
from pgpo_jax import extras, hf, sharding
from pgpo_jax.command import parse
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError, command, printable
from pgpo_jax.run import check_rows, checkpoint_folder

COMMAND = config_module.command("doctor", __doc__)
PACKAGES = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "transformers", "datasets")
EXTRAS = {
    "gguf": "gguf",
    "math": "math_verify",
    "reasoning-gym": "reasoning_gym",
    "report": "matplotlib",
    "trackers": "wandb",
}
"""Extra -> a module that it brings."""
LEAST_DISK = 2**30
LEAST_FILES = 1024
GIB = 2**30


class Finding(NamedTuple):
    """A line of the screen."""

    name: str
    text: str
    bad: bool = False
    """Whether it would end a run."""


def examine(config: Config | None = None) -> Iterator[Finding]:
    """What is there, and whether it will do; the cheapest first."""
    yield Finding("python", f"{platform.python_version()}, {platform.platform()}")
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    yield Finding("packages", ", ".join(found))
    absent = [extra for extra, module in EXTRAS.items() if extras.missing([module])]
    yield Finding("extras", f"not installed: {', '.join(absent)}" if absent else "all there")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files < LEAST_FILES
    yield Finding("open files", f"{files:,}" + "; ulimit -n 4096 gives more" * few, few)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("memory", f"{memory / GIB:.0f} GiB on {os.cpu_count()} cores")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    yield Finding(
        "compile cache", cache or "none; JAX_COMPILATION_CACHE_DIR names a folder for one"
    )
    yield _devices()
    folder = config.output_dir if config else "."
    yield _disk("disk", folder)
    if config is not None:
        yield from _run(config)


def _devices() -> Finding:
    devices = jax.local_devices()
    text = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return Finding("devices", text + (f", {limit / GIB:.0f} GiB each" if limit else ""))


def _disk(name: str, folder: str) -> Finding:
    """Room and permission where a folder is or will be."""
    if "://" in folder:
        return Finding(name, f"{folder} is a bucket; not asked")
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Finding(name, f"{place} cannot be written", bad=True)
    free = shutil.disk_usage(place).free
    return Finding(name, f"{free / GIB:.0f} GiB free in {place}", free < LEAST_DISK)


def _run(config: Config) -> Iterator[Finding]:
    """What a configuration names."""
    try:
        mesh = sharding.make_mesh(config.mesh)
        check_rows(config, mesh)
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        yield Finding("mesh", sizes)
    except InputError as error:
        yield Finding("mesh", str(error), bad=True)
    yield _disk("checkpoints", checkpoint_folder(config))
    path = config.model.path
    if path is None:
        yield Finding("model", "written out in the configuration")
    elif os.path.isdir(path):
        try:
            yield Finding("model", f"{hf.load_config(path).num_hidden_layers} layers in {path}")
        except InputError as error:
            yield Finding("model", str(error), bad=True)
    else:
        yield Finding("model", f"{path} is no folder here; it would come from the hub")


def main(argv: Sequence[str]) -> int:
    """The command line; see `--help`."""
    config = config_module.from_arguments(parse(COMMAND, argv)) if argv else None
    findings = list(examine(config))
    for finding in findings:
        mark = "BAD" if finding.bad else "ok"
        print(f"{mark:4}{finding.name:15}{printable(finding.text)}")
    return 2 if any(finding.bad for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(command(main))
