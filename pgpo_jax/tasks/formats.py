"""Files of rows: JSON lines, JSON lists, CSV, Parquet, each also compressed by gzip.

Read here and not by the `datasets` library, which guesses types: it makes 7 of the CSV text `007`,
null of `NA` and a timestamp of a date in JSON.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgpo_jax.errors import InputError
from pgpo_jax.tasks.rows import RowError, Rows, read_each

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MAGIC = {
    b"\x1f\x8b": "gzip data: its name must end in .gz",
    b"PAR1": "Parquet data: its name must end in .parquet",
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack it, or save it as .csv",
    b"\x28\xb5\x2f\xfd": "zstd data: unpack it",
    b"BZh": "bzip2 data: unpack it",
    b"\xfd7zXZ": "xz data: unpack it",
    b"ARROW1": "an Arrow file: save it as .parquet, or give the folder of save_to_disk",
    b"\xff\xff\xff\xff": "an Arrow stream: save it as .parquet, or give the folder of save_to_disk",
    b"SQLite": "an SQLite data base: save it as .csv",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
"""How other files begin, and what to do about them."""


def suffix(path: Path) -> str:
    """The format that a file's name states, without `.gz`; empty if it is none of `SUFFIXES`."""
    name = path.name.removesuffix(".gz")
    return next((end for end in SUFFIXES if name.endswith(end)), "")


def stem(path: Path) -> str:
    """A file's name without format and compression: the name of its split."""
    return path.name.removesuffix(".gz").removesuffix(suffix(path))


def read_file(path: Path, field: str = "task.path", text: Collection[str] = ()) -> Rows:
    """The rows of a file, whose format is what its name says (JSON lines where it says nothing).

    Args:
      path: the file.
      field: where the config names it.
      text: columns of CSV that stay text, whatever they look like.

    Raises:
      InputError: a missing or empty file, a format that is not read, content of another format
        than the name states, or rows that cannot be read, with their number.
    """
    if not path.is_file():
        raise InputError(
            f"{field}: got {str(path)!r}, which does not exist; must be a file of rows ("
            f"{', '.join(SUFFIXES)}, also .gz)"
        )
    kind = suffix(path)
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{field}: got {str(path)!r}, which cannot be read ({error})") from error
    for magic, meaning in MAGIC.items():
        if content.startswith(magic) and not (kind == ".parquet" and magic == b"PAR1"):
            raise InputError(f"{field}: got {str(path)!r}, which holds {meaning}")
    if not kind and content.strip() and not content.removeprefix(b"\xef\xbb\xbf").startswith(b"{"):
        raise InputError(
            f"{field}: got {str(path)!r}, a format that is not read; must be one of "
            f"{', '.join(SUFFIXES)} (also .gz)"
        )
    readers: dict[str, Callable[[], Rows]] = {
        ".json": lambda: _json(content, path, field),
        ".csv": lambda: _csv(content, path, field, ",", text),
        ".tsv": lambda: _csv(content, path, field, "\t", text),
        ".parquet": lambda: _parquet(content, path, field),
    }
    found = readers.get(kind, lambda: _json_lines(content, path, field))()
    if not found:
        raise InputError(f"{field}: got {str(path)!r}, which has no rows; must have at least one")
    return found


# --- JSON -----------------------------------------------------------------------------------------


def _json_lines(content: bytes, path: Path, field: str) -> Rows:
    """One object a line; blank lines are skipped."""
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        whole = _parsed_or_none(content)
        if isinstance(whole, list) and all(isinstance(row, dict) for row in whole):
            raise InputError(
                f"{field}: got {str(path)!r}, which holds one JSON list; must be one object a "
                "line, or be named .json"
            )
    lines = [
        (f"{path.name}:{number}", line)
        for number, line in enumerate(content.splitlines(), start=1)
        if line.strip()
    ]

    def read(where: str, line: bytes) -> tuple[str, dict[str, Any]]:
        try:
            row = _parse(line)
        except ValueError as error:
            raise RowError(f"got {error}; must be one JSON object") from error
        return where, _object(row, "must be one JSON object")

    return read_each(field, lines, read)


def _json(content: bytes, path: Path, field: str) -> Rows:
    """One list of objects, or one object a line."""
    start = content.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start.startswith(b"["):
        whole = _parsed_or_none(content)
        if isinstance(whole, dict) and b"\n" in content.strip():
            raise InputError(
                f"{field}: got {str(path)!r}, which holds one object over several lines (with "
                f"{', '.join(map(repr, [*whole][:5]))}); must be a list of objects, or one object "
                "a line"
            )
        return _json_lines(content, path, field)
    try:
        whole = _parse(content)
    except ValueError as error:
        raise InputError(f"{field}: {path.name}: got {error}; must be a list of objects") from error

    def read(where: str, row: Any) -> tuple[str, dict[str, Any]]:
        return where, _object(row, "must be a list of objects")

    return read_each(field, [(f"{path.name}[{i}]", row) for i, row in enumerate(whole)], read)


def _object(row: Any, rule: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RowError(f"got a {type(row).__name__}; {rule}")
    return row


def _parsed_or_none(content: bytes) -> Any:
    try:
        return _parse(content)
    except ValueError:
        return None


def _parse(content: bytes) -> Any:
    """JSON as the standard has it: no name twice, no NaN, no number that becomes infinite.

    Raises:
      ValueError: with what is there.
    """
    try:
        return json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        problem: object = error
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            problem = f"{error.msg} ({line}column {error.colno})"
        raise ValueError(problem) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text}, which is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text}, which is too large for a number")
    return value


# --- CSV ------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_MISSING = frozenset({"NA", "N/A", "NaN", "nan", "null", "NULL", "None"})


def _csv(content: bytes, path: Path, field: str, delimiter: str, text: Collection[str]) -> Rows:
    """Rows under a line of names. An empty cell is null.

    A column that holds nothing but numbers, or nothing but True and False, becomes these, unless it
    is one of `text`; numbers with leading zeros are codes and stay text.
    """
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{field}: {path.name}: got {error}; must be UTF-8") from error
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(decoded, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(f"{path.name}:{reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        raise InputError(
            f"{field}: {path.name}:{reader.line_num}: got {error}; must be CSV with {delimiter!r} "
            'between the columns and " around text that holds it'
        ) from error
    if not lines:
        return []
    (_, names), *lines = lines
    if len({*names, ""}) <= len(names):
        raise InputError(
            f"{field}: {path.name}:1: got the names {', '.join(map(repr, names))}; must be "
            "different, and none empty"
        )

    def read(where: str, cells: Sequence[str]) -> tuple[str, list[str | None]]:
        if len(cells) != len(names):
            raise RowError(f"got {len(cells)} columns; must be {len(names)}, as in the first line")
        return where, [cell or None for cell in cells]

    found = read_each(field, lines, read)
    transposed = zip(*(cells for _, cells in found), strict=True)
    columns = [
        cells if name in text else _typed(cells)
        for name, cells in zip(names, transposed, strict=bool(found))
    ]
    rows = zip(*columns, strict=True)
    return [
        (where, dict(zip(names, row, strict=True)))
        for (where, _), row in zip(found, rows, strict=True)
    ]


def _typed(cells: Sequence[str | None]) -> Sequence[Any]:
    """A column's cells as numbers or truth values where all of them are."""
    given = {cell for cell in cells if cell is not None and cell not in _MISSING}
    if given and given <= {"True", "False", "true", "false", "TRUE", "FALSE"}:
        kind: Callable[[str], Any] = _is_true
    elif given and all(_NUMBER.fullmatch(cell) for cell in given):
        whole = all(re.fullmatch("-?[0-9]+", cell) for cell in given)
        kind = int if whole else float
    else:
        return cells
    return [kind(cell) if cell is not None and cell in given else None for cell in cells]


def _is_true(cell: str) -> bool:
    return cell.lower() == "true"


# --- Arrow ----------------------------------------------------------------------------------------


def _parquet(content: bytes, path: Path, field: str) -> Rows:
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        features = Features.from_arrow_schema(table.schema)
    except Exception as error:  # whatever the libraries raise for a damaged file
        problem = " ".join(str(error).split())[:200]
        raise InputError(f"{field}: got {str(path)!r}, which is no Parquet ({problem})") from error
    return table_rows(table, features, path.name, field)


def table_rows(table: Any, features: Mapping[str, Any], name: str, field: str) -> Rows:
    """The rows of an Arrow table as they are stored, but for labels, which become their names.

    Not decoded: a column of images or sounds may hold any path, which decoding would open.

    Raises:
      InputError: two columns of one name, or labels that have no name.
    """
    names = table.column_names
    if len(set(names)) < len(names):
        raise InputError(f"{field}: {name}: got the columns {', '.join(names)}; must be different")
    labelled = {key: feature for key, feature in features.items() if _has_labels(feature)}

    def read(where: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return where, row | {key: _named(row[key], labelled[key], key) for key in labelled}

    return read_each(field, [(f"{name}:{i}", row) for i, row in enumerate(table.to_pylist())], read)


def _has_labels(feature: Any) -> bool:
    from datasets import ClassLabel

    if isinstance(feature, Mapping):
        return any(map(_has_labels, feature.values()))
    if isinstance(feature, list):
        return any(map(_has_labels, feature))
    return isinstance(feature, ClassLabel) or _has_labels(getattr(feature, "feature", []))


def _named(value: Any, feature: Any, column: str) -> Any:
    """A stored value with every label replaced by its name; -1 stands for none."""
    from datasets import ClassLabel

    if value is None or not _has_labels(feature):
        return value
    if isinstance(feature, ClassLabel):
        if value == -1:
            return None
        names = feature.names or []
        if not 0 <= value < len(names):
            raise RowError(f"got the label {value} in the column {column!r}; it has {len(names)}")
        return names[value]
    if isinstance(feature, Mapping):
        return {key: _named(value[key], feature[key], column) for key in value}
    inner = feature[0] if isinstance(feature, list) else feature.feature
    if isinstance(value, Mapping):  # older versions write a list of structures as one of lists
        return {key: [_named(v, inner[key], column) for v in value[key]] for key in value}
    return [_named(item, inner, column) for item in value]
