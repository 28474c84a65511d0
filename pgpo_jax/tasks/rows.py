"""Reads the rows of data sets: JSON lines, what the `datasets` library loads, SciKnowEval."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pgpo_jax.errors import InputError

Rows = list[tuple[str, dict[str, Any]]]  # (where it stands, for errors and keys; the row)


def read_jsonl(path: Path, field: str = "task.path") -> Rows:
    """The objects of a JSON-lines file; blank lines are skipped.

    Raises:
        InputError: a missing or empty file, or ``file:line`` of a line that is no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{field}: got {str(path)!r}, which does not exist; must be a .jsonl file")
    found: Rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(
                line.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant
            )
        except (ValueError, RecursionError) as error:
            problem = (
                f"{error.msg} (column {error.colno})"
                if isinstance(error, json.JSONDecodeError)
                else error
            )
            raise InputError(f"{field}: {where}: got {problem}; must be one JSON object") from error
        if not isinstance(row, dict):
            raise InputError(
                f"{field}: {where}: got a {type(row).__name__}; must be one JSON object"
            )
        found.append((f"{path.name}:{number}", row))
    if not found:
        raise InputError(f"{field}: got {str(path)!r}, which has no rows; must have at least one")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} twice")
    return found


def _constant(text: str) -> float:
    raise ValueError(f"{text}, which is no JSON")


def read_datasets(path: str, subset: str | None = None) -> dict[str, Any]:
    """A folder of other files (parquet, csv, ...) or a hub data set: its splits by name.

    Raises:
        InputError: if it cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"task.path: got {path!r}, which needs the package `datasets`: pip install datasets"
        ) from error
    try:
        loaded = datasets.load_dataset(path, subset)
    except Exception as error:  # whatever the library, the network or the parser raise
        raise InputError(
            f"task.path: got {path!r}, which is no local file and does not load as a data set "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); must be a .jsonl "
            "file, a folder or a hub id"
        ) from error
    return {str(name): split for name, split in dict(loaded).items()}


def split_rows(splits: Mapping[str, Any], split: str, path: str, field: str) -> Rows:
    """All rows of one split, as they are stored.

    Not decoded: a column of images or sounds may hold any path, which decoding would open.

    Raises:
        InputError: an unknown or empty split.
    """
    if split not in splits:
        raise InputError(f"{field}: got {split!r}; {path} has {', '.join(map(str, splits))}")
    stored = splits[split].with_format("arrow")[:].to_pylist()
    found = [(f"{split}:{index}", row) for index, row in enumerate(stored)]
    if not found:
        raise InputError(f"{field}: got {split!r}, which is empty in {path}")
    return found


def column(row: Mapping[str, Any], name: str, where: str) -> Any:
    """One required column of a row.

    Raises:
        InputError: naming the row and the columns it has.
    """
    if name not in row:
        raise InputError(
            f"task.path: {where}: got the columns {', '.join(row) or 'none'}; must have {name!r}"
        )
    if row[name] is None:
        raise InputError(f"task.path: {where}: got null; must have {name!r} in every row")
    return row[name]


def conversation(row: Mapping[str, Any], where: str) -> tuple[dict[str, str], ...]:
    """The messages of a row: `prompt`, a string or a conversation, after `system` if there is one.

    Raises:
        InputError: for anything else, or a conversation that does not end with a question.
    """
    prompt, system = column(row, "prompt", where), row.get("system")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    valid = isinstance(messages, list) and messages
    if not valid or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise InputError(
            f"task.path: {where}: got the prompt {str(prompt)[:80]!r}; must be a string or a list "
            "of messages with the strings `role` and `content`"
        )
    if messages[-1]["role"] != "user":
        raise InputError(
            f"task.path: {where}: got a prompt whose last message is the "
            f"{messages[-1]['role']}'s; must be the user's"
        )
    if not messages[-1]["content"].strip():
        raise InputError(f"task.path: {where}: got an empty prompt; must ask something")
    if system is not None and messages[0]["role"] != "system":
        check_text("system", system, where)
        messages = [{"role": "system", "content": system}, *messages]
    for message in messages:
        check_text("prompt", message["content"], where)
    return tuple(dict(message) for message in messages)


_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


def check_text(name: str, value: Any, where: str) -> None:
    """Text that a tokenizer takes as it is.

    Raises:
        InputError: for another type, a NUL (which stands in no text, but in files that are none) or
            half of a surrogate pair (which is no character).
    """
    if not isinstance(value, str):
        raise InputError(
            f"task.path: {where}: got {str(value)[:80]} in the column {name!r}; must be a string"
        )
    if found := _NO_TEXT.search(value):
        raise InputError(
            f"task.path: {where}: got {found[0]!a} in the column {name!r} (character "
            f"{found.start() + 1}); must be text without NUL and without half surrogate pairs"
        )


SCIKNOWEVAL = "hicai-zju/SciKnowEval"
SCIKNOWEVAL_SIZES = {"biology": 500, "chemistry": 2100, "materials": 935, "physics": 800}
"""Level-3 multiple-choice questions a domain had when the split was published."""
SCIKNOWEVAL_SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and \
nothing else. Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""


def published_split(count: int) -> tuple[list[int], list[int]]:
    """Positions of the training and held-out questions in a domain's list of `count`.

    The published files are a permutation by numpy's default generator with seed 42: its first
    tenth, rounded up, is held out and the rest is for training, in this order.
    """
    order = np.random.default_rng(42).permutation(count).tolist()
    held_out = -(-count // 10)
    return order[held_out:], order[:held_out]


def sciknoweval_rows(hub_rows: Rows, domain: str) -> Rows:
    """The level-3 multiple-choice questions of a domain, in the columns of the published files.

    Args:
        hub_rows: all rows of the hub data set, in its order.
        domain: as in the config (the hub writes "Material").

    Returns:
        Rows with `idx` (the position in the domain's list), `system`, `prompt`, `answer`.
    """
    kept: Rows = []
    for where, row in hub_rows:
        level = (row.get("details") or row).get("level")
        name = str(column(row, "domain", where)).lower().rstrip("s")
        if (
            name != domain.rstrip("s")
            or level != "L3"
            or not str(row.get("type")).startswith("mcq")
        ):
            continue
        choices = column(row, "choices", where)
        options = [f"{a}: {b}" for a, b in zip(choices["label"], choices["text"], strict=True)]
        text = "\n".join([f"{column(row, 'question', where)}\n", *options])
        record = {
            "idx": len(kept),
            "system": SCIKNOWEVAL_SYSTEM,
            "prompt": text + "\nPlease reason step by step.",
            "answer": column(row, "answerKey", where),
        }
        kept.append((where, record))
    return kept
