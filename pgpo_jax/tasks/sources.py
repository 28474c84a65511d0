"""Where the rows of a data set are: a file, a folder, a hub data set, and their splits."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import formats
from pgpo_jax.tasks.rows import Rows, listed

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of the same split, as the `datasets` library has them."""


class Source(NamedTuple):
    """What a path was taken for, and the rows that it leads to."""

    taken_for: str
    """In words, such as `the folder x (train.jsonl, test.jsonl)`."""
    splits: Mapping[str, Callable[[], Rows]]
    """Name -> its rows; of a single file the one name is empty."""

    def find(self, name: str) -> str | None:
        """The split of that name, or the one that has another name for the same; None if none."""
        names = next((names for names in SPLITS.values() if name in names), (name,))
        return next((found for found in (name, *names) if found in self.splits), None)

    def read(self, name: str, field: str) -> Rows:
        """The rows of a split.

        Raises:
          InputError: no such split, with those that there are, or an empty one.
        """
        found = self.find(name)
        if found is None:
            there = (
                "which has no splits"
                if "" in self.splits
                else f"which has the splits {', '.join(self.splits)}"
            )
            raise InputError(f"{field}: got {name!r}; task.path is {self.taken_for}, {there}")
        rows = self.splits[found]()
        if not rows:
            raise InputError(f"{field}: got {name!r}, which is empty in {self.taken_for}")
        return rows


def open_source(
    path: str, subset: str | None, train_split: str = "train", text: Collection[str] = ()
) -> Source:
    """What `path` names: what is local comes first, then the hub.

    Args:
      path: a file, a folder or a hub id.
      subset: the configuration name of a data set.
      train_split: a folder whose own files are its splits has one of this name.
      text: columns of CSV that stay text.

    Raises:
      InputError: nothing there, or nothing that can be read.
    """
    local = Path(path)
    if local.is_dir():
        return _folder(local, subset, train_split, text)
    if local.is_file() or not _is_hub_id(path):
        if subset is not None and local.is_file():
            raise InputError(f"task.subset: got {subset!r}; {path} is one file without subsets")
        read = partial(formats.read_file, local, "task.path", text)
        if not local.is_file():
            read()  # says so
        return Source(f"the file {path}", {"": read})
    if path in _builders():
        raise InputError(
            f"task.path: got {path!r}, the name of a format and of no folder here; must be a file, "
            "a folder or a hub id"
        )
    return Source(f"the hub data set {path}", _library(path, subset, path))


def _is_hub_id(path: str) -> bool:
    """`name` or `owner/name`, and not the name of a file."""
    form = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path, re.ASCII)
    return form is not None and not formats.suffix(Path(path))


def _builders() -> Collection[str]:
    from datasets import packaged_modules

    return getattr(packaged_modules, "_PACKAGED_DATASETS_MODULES", ())


def _folder(folder: Path, subset: str | None, train_split: str, text: Collection[str]) -> Source:
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()]
    if saved:
        return _saved(folder, subset)
    files = sorted(path for path in folder.iterdir() if path.is_file() and formats.suffix(path))
    source = Source(
        f"the folder {folder} ({', '.join(path.name for path in files)})",
        {formats.stem(path): partial(formats.read_file, path, text=text) for path in files},
    )
    if subset is None and source.find(train_split) is not None:
        stems = [formats.stem(path) for path in files]
        twice = [path.name for path in files if stems.count(formats.stem(path)) > 1]
        if twice:
            raise InputError(
                f"task.path: got the folder {folder} with {', '.join(twice)}; must have one file a "
                "split, so name the file (task.path, task.test_path) or remove one"
            )
        return source
    return _shards(folder, subset, text)


def _saved(folder: Path, subset: str | None) -> Source:
    """What `save_to_disk` of the `datasets` library wrote."""
    import datasets

    if subset is not None:
        raise InputError(f"task.subset: got {subset!r}; {folder} is a save_to_disk folder of one")
    try:
        found = datasets.load_from_disk(str(folder.resolve()))
    except Exception as error:  # whatever the library raises for a damaged folder
        raise InputError(
            f"task.path: got {str(folder)!r}, a save_to_disk folder that does not load "
            f"({_problem(error)})"
        ) from error
    parts = {"": found} if isinstance(found, datasets.Dataset) else found
    return Source(f"the save_to_disk folder {folder}", _splits(parts, str(folder)))


def _shards(folder: Path, subset: str | None, text: Collection[str]) -> Source:
    """Files by the conventions of the `datasets` library: shards, `data/`, a README with configs.

    Their rows are read by `formats` where it knows the format, else by the library.
    """
    import datasets

    path = str(folder.resolve())  # a bare name may be that of a format
    try:
        builder = datasets.load_dataset_builder(path, subset)
    except Exception as error:  # whatever the library or a parser raise
        raise _refusal(str(folder), "a folder", subset, error) from error
    config: Any = builder.config
    names = {
        str(split): [Path(str(file)) for file in files]
        for split, files in (config.data_files or {}).items()
    }
    plain = getattr(config, "field", None) is None and getattr(config, "sep", ",") in (",", "\t")
    files = [file for found in names.values() for file in found]
    taken_for = f"the folder {folder} ({', '.join(names)})"
    resolved = {file.resolve() for file in files}  # the library takes one format, the commonest
    others = [file for file in sorted(folder.rglob("*")) if formats.suffix(file)]
    if files and (left := [file for file in others if file.resolve() not in resolved]):
        taken_for += f" without {listed(str(file.relative_to(folder)) for file in left)}"
    if not plain or not files or not all(file.is_file() and formats.suffix(file) for file in files):
        return Source(taken_for, _library(path, subset, str(folder)))

    def read(files: list[Path]) -> Rows:
        return [row for file in files for row in formats.read_file(file, text=text)]

    return Source(taken_for, {name: partial(read, found) for name, found in names.items()})


def _library(path: str, subset: str | None, shown: str) -> dict[str, Callable[[], Rows]]:
    import datasets

    try:
        found = datasets.load_dataset(path, subset)
    except Exception as error:  # whatever the library, the network or the parser raise
        what = "a folder" if Path(path).is_dir() else "no local file and no folder"
        raise _refusal(shown, what, subset, error) from error
    return _splits(dict(found), shown)


def _splits(parts: Mapping[Any, Any], shown: str) -> dict[str, Callable[[], Rows]]:
    def read(name: str, part: Any) -> Rows:
        table = part.with_format("arrow")[:]
        return formats.table_rows(table, part.features, name or Path(shown).name, "task.path")

    return {str(name): partial(read, str(name), part) for name, part in parts.items()}


def _refusal(shown: str, what: str, subset: str | None, error: Exception) -> InputError:
    if subset is not None and "BuilderConfig" in str(error):
        return InputError(f"task.subset: got {subset!r}; {shown} has no such ({_problem(error)})")
    if subset is None and "Config name is missing" in str(error):
        return InputError(f"task.subset: got nothing; {shown} has several ({_problem(error)})")
    return InputError(
        f"task.path: got {shown!r}, which is {what} and does not load as a data set "
        f"({_problem(error)}); must be a file (one of {', '.join(formats.SUFFIXES)}), a folder of "
        "them or a hub id"
    )


def _problem(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
