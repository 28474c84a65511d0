"""Logs of runs, read back; runs that differ only in the seed are one experiment.

The files are those of `logs.Writer`. A run may be going on, or have been killed: the last line
of a file may be torn, which is left out and told. All else that does not fit is an `InputError`.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgpo_jax import fields
from pgpo_jax.errors import InputError, printable
from pgpo_jax.logs import jsonl

# What may differ between two runs of the same experiment: where and how it is computed and told.
ARRANGEMENT = ("seed", "output_dir", "mesh", "distributed", "metrics", "checkpoint")


class Series(NamedTuple):
    """A metric of one run, by step."""

    steps: np.ndarray
    values: np.ndarray
    """float64; NaN where the run has null."""


class Discovery(NamedTuple):
    """discovery@k of one method, by k."""

    attempts: np.ndarray
    share: np.ndarray
    """Of the questions that were solved within k attempts, 0 to 1."""
    low: np.ndarray
    """Of its interval."""
    high: np.ndarray


@dataclass
class RunLog:
    """One run's folder, read."""

    folder: Path
    name: str
    """The shortest end of the folder's path that tells it from the others."""
    config: dict[str, Any]
    """Dotted field -> value."""
    config_text: str
    """config.yaml as it stands."""
    metrics: dict[str, Series]
    notes: list[str] = field(default_factory=list)
    """What a reader of the results must know, in plain words."""

    @property
    def steps(self) -> int:
        """The last step that has a row."""
        return int(max(series.steps[-1] for series in self.metrics.values()))

    @property
    def updates_a_step(self) -> int:
        """Updates that a step asks for."""
        found = (self.config.get(f"data.{name}", 1) for name in ("updates_per_rollout", "passes"))
        return math.prod(each if isinstance(each, int) else 1 for each in found)

    @property
    def samples_path(self) -> Path:
        """Where its responses are; may not exist."""
        return self.folder / "samples.jsonl"


@dataclass
class Experiment:
    """Runs that differ only in the seed, or a single run."""

    label: str
    runs: list[RunLog]


def read_runs(folders: Sequence[str | Path]) -> list[RunLog]:
    """The runs in these folders.

    Raises:
      InputError: No folder, one that holds no run or no row yet, one named twice, a line that is no
        row.
    """
    if not folders:
        raise InputError("RUN: got none; give the folder of a run, such as runs/quickstart")
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise InputError(f"RUN: got {paths[index]} twice; give every run once")
    return [_read(*both) for both in zip(paths, _names(resolved), strict=True)]


def read_samples(run: RunLog, take: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """What `take` makes of every sample's record, in order; none without the file.

    Records may be large, so `take` says what is kept. A torn last line is noted in the run.

    Raises:
      InputError: A line that is no sample.
    """
    if not run.samples_path.exists():
        return []
    return [take(record) for record in _rows(run.samples_path, run.notes)]


def read_discovery(run: RunLog) -> dict[str, Discovery]:
    """discovery@k of every method that the command `discover` left in a run's folder.

    Raises:
      InputError: The file is there, and not what that writes.
    """
    path, columns = run.folder / "discovery.json", Discovery._fields
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["methods"]
        found = {
            str(method): Discovery(*(np.array(values[name], float) for name in columns))
            for method, values in told.items()
        }
        if not all(len({(len(x), x.ndim) for x in each}) == 1 for each in found.values()):
            raise ValueError("columns of different lengths")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"RUN: {path} cannot be read ({type(error).__name__}: {error}); must be as discover "
            "wrote it"
        ) from error
    return found


def read_multipliers(path: str | None) -> list[float]:
    """The multipliers of a run's updates: a `metrics.jsonl`, or a JSON list of numbers; none of
    None.

    Skipped updates of a run are left out: they changed nothing, and the optimizer did not count
    them. Of a step of several updates each has its own.

    Raises:
      InputError: The file cannot be read, or what it holds are no multipliers.
    """
    if path is None:
        return []
    try:
        if path.endswith(".jsonl"):
            found = []
            for line in jsonl.read(path):
                if line.problem:
                    raise ValueError(f"line {line.number}: {line.problem}")
                if line.row.get("skipped", 1) != 1:
                    found += line.row.get("multipliers", [line.row["multiplier"]])
        else:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
    except (OSError, ValueError, TypeError, RecursionError, KeyError) as error:
        raise InputError(
            f"optimizer.replay: {path} cannot be read ({type(error).__name__}: {error}); give the "
            "metrics.jsonl of a run, or a JSON list of numbers"
        ) from error
    good = isinstance(found, list) and all(
        type(value) in (int, float) and 0 <= value < math.inf for value in found
    )
    if not good or not found:
        raise InputError(
            f"optimizer.replay: {path} holds no multipliers; must be numbers, at least one, none "
            "of them negative"
        )
    return [float(value) for value in found]


def experiments(runs: Sequence[RunLog]) -> list[Experiment]:
    """Puts runs together whose configurations are equal but for seed, folder and machine."""
    found: list[list[RunLog]] = []
    for run in runs:
        alike = (
            members for members in found if not config_differences([members[0], run], ARRANGEMENT)
        )
        if members := next(alike, None):
            members.append(run)
        else:
            found.append([run])
    distinct = config_differences([members[0] for members in found], ignore=ARRANGEMENT)
    result = []
    for index, members in enumerate(found):
        values = [
            f"{_short(name, distinct)} {fields.one_line(row[index])}"
            for name, row in distinct.items()
        ]
        seeds = f" ({len(members)} runs)" if len(members) > 1 else ""
        # Many differences make no label: the name of the folder then says more.
        few = 0 < len(values) <= 3
        result.append(Experiment((", ".join(values) if few else members[0].name) + seeds, members))
    return result


def config_differences(runs: Sequence[RunLog], ignore: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Dotted field -> its value in every run, for the fields in which they differ.

    Sections and fields in `ignore` are left out. A field that a run does not have, as one of an
    older version does not, is `ABSENT`.
    """
    names = dict.fromkeys(name for run in runs for name in run.config)
    found = {
        name: [run.config.get(name, ABSENT) for run in runs]
        for name in names
        if name.split(".")[0] not in ignore
    }
    return {name: row for name, row in found.items() if any(value != row[0] for value in row)}


ABSENT = "(absent)"


def _short(name: str, names: dict[str, Any]) -> str:
    """`optimizer.alpha` -> `alpha`, where that is no other field's last part."""
    last = name.split(".")[-1]
    return last if sum(other.split(".")[-1] == last for other in names) == 1 else name


def _read(folder: Path, name: str) -> RunLog:
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"RUN: got {folder}, which has no config.yaml; must be the folder of a run "
            "(its output_dir)"
        )
    try:
        text = path.read_text(encoding="utf-8")
        tree = fields.load_yaml(text)
    except OSError as error:
        raise InputError(f"RUN: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # UnicodeDecodeError too
        raise InputError(f"RUN: {path} is not valid YAML ({error})") from error
    if not isinstance(tree, dict):
        raise InputError(f"RUN: {path} holds {fields.show(tree)}; must be fields and values")
    run = RunLog(folder, name, dict(_dotted(tree)), text, {})
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"RUN: got {folder}, which has no metrics.jsonl; it has not begun")
    columns: dict[str, dict[int, float]] = {}
    for row in _rows(path, run.notes):
        for metric, value in row.items():
            if metric != "step" and (number := _number(value)) is not None:
                columns.setdefault(metric, {})[row["step"]] = number
    if not columns:
        raise InputError(f"RUN: {path} has no rows yet; must have at least one")
    for metric, column in columns.items():
        steps = sorted(column)
        run.metrics[metric] = Series(np.array(steps), np.array([column[step] for step in steps]))
    planned, what = run.config.get("steps"), "updates" if run.updates_a_step == 1 else "steps"
    discovers = (folder / "screening.json").exists()  # it makes no updates of its own
    if isinstance(planned, int) and run.steps < planned and not discovers:
        run.notes.insert(0, f"has {run.steps} of {planned} {what}: interrupted, or still going on")
    return run


def _number(value: Any) -> float | None:
    """A metric's value; NaN for null and for what cannot be drawn; None for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -1e100 < value < 1e100 else math.nan


def _rows(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file with their steps; a torn last line becomes a note."""
    torn = ""
    try:
        for line in jsonl.read(path):
            if torn:  # and not at the end
                raise InputError(torn)
            where = f"RUN: {path}:{line.number}: got"
            if line.torn:
                torn = f"{where} {line.problem}; must be one JSON object"
                continue
            if line.problem:
                raise InputError(f"{where} {line.problem}; must be one JSON object")
            step = line.row.get("step")
            if type(step) is not int or not 0 <= step < 2**53:
                raise InputError(
                    f"{where} the step {fields.show(step)}; must be a whole number, at least 0"
                )
            yield line.row
    except OSError as error:
        raise InputError(f"RUN: {path} cannot be read ({error.strerror})") from error
    if torn:
        notes.append(f"the last line of {path.name} is torn and was left out")


def _dotted(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of every path, as many as it takes to tell all apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [printable(name) for name in names]
