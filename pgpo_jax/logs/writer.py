"""What a run says: three files of JSON lines always, trackers if asked, and the console.

`metrics.jsonl` has the numbers of every step, `samples.jsonl` some of its responses, and
`evaluations.jsonl` the mean reward of every held-out question, for intervals that know that the
responses to one question belong together.

Files are the truth: one JSON object a line, flushed at once, so that a killed run loses nothing.
Every metrics row has `step`, the number of steps done. NaN and infinities, which JSON does not
have, become null. A resumed run cuts its files where they ended when its checkpoint was saved and
appends, so a file reads as if the run had never stopped. Rows that find no space stay in memory
until there is some; a file holds whole lines only.

The console shows progress, sample responses, and warnings (those of `alarms.py`).
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgpo_jax.errors import InputError
from pgpo_jax.logs.alarms import is_number
from pgpo_jax.logs.console import Console, Row, summary
from pgpo_jax.logs.identity import identify
from pgpo_jax.logs.jsonl import Lines
from pgpo_jax.logs.trackers import TRACKERS, MetricsConfig, TrackedRun, Tracker


class Writer:
    """Writes a run's files, feeds its trackers and talks to its user. A context manager."""

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        config: MetricsConfig | None = None,
        *,
        total_steps: int,
        resume_from: int | None = None,
        sizes: Mapping[str, int] | None = None,
        run_config: Mapping[str, Any] | None = None,
        active: bool = True,
    ) -> None:
        """Opens the files of a run.

        Args:
          output_dir: A local folder, made if need be.
          config: What to report besides the files.
          total_steps: Steps of the whole run, for the time left.
          resume_from: The step of the restored checkpoint: rows after it are dropped. None starts
            the files anew.
          sizes: What `sizes` returned when it was saved: files are cut there, not by their steps.
          run_config: The resolved configuration, for the trackers.
          active: False on all hosts but the first: nothing is written or said.

        Raises:
          InputError: If the folder cannot be written, or a tracker is not installed.
        """
        self._config = config or MetricsConfig()
        self._active = active
        self._total = total_steps
        self._console = Console(self._config.log_seconds, active)
        self._trackers: list[Tracker] = []
        self._closed = not active
        if not active:
            return
        if "://" in str(output_dir):
            raise InputError(
                f"output_dir: got {output_dir}; metrics are appended to, so give a local folder "
                "(checkpoint.path may be a bucket)"
            )
        folder = Path(output_dir)
        with _writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # Before the files are started anew: a tracker that is missing must not cost an old run.
        if self._config.trackers:
            place = folder.resolve()
            identity = identify(place, self._config.name, resume_from)
            run = TrackedRun(place, dict(run_config or {}), resume_from, identity)
            for name in dict.fromkeys(self._config.trackers):
                self._trackers.append(TRACKERS[name](self._config, run))
        with _writable(folder):
            self._files = {
                name: Lines(folder / name, resume_from, (sizes or {}).get(name))
                for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")
            }

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, row: Row, warnings: Iterable[str] = ()) -> None:
        """Adds a row of metrics to the file and the trackers, and tells how it goes.

        Args:
          step: Steps done.
          row: Names to numbers (of Python, numpy or jax; one element each), text or null.
          warnings: What it gave rise to, said after it.
        """
        if not self._active:
            return
        plain = {name: _plain(value) for name, value in row.items() if name != "step"}
        self._append("metrics.jsonl", {"step": int(step), **plain})
        finite = {name: v for name, v in plain.items() if is_number(v) and math.isfinite(v)}
        for tracker in self._trackers:
            tracker.log(int(step), finite)
        if "loss" in plain:
            self.progress("train", step, self._total, plain)
        elif text := summary(plain):
            self.say(f"step {step}: {text}")
        for warning in warnings:
            self.warn(f"step {step}: {warning}")

    def samples(
        self, step: int, records: Iterable[Row], more: Callable[[int], Row] | None = None
    ) -> None:
        """Writes some of a step's responses to samples.jsonl and, now and then, shows a few.

        Args:
          step: The one that they are of, from 1.
          records: One mapping a response, with at least `prompt`, `response` and `reward`.
          more: Further fields of the record of that number; asked for those that are written.
        """
        if not self._active:
            return
        records = list(records)
        places = _different_first(records, self._config.samples_per_step)
        chosen = [{**records[place], **(more(place) if more else {})} for place in places]
        for record in chosen:
            plain = {name: _plain(value) for name, value in record.items() if name != "step"}
            self._append("samples.jsonl", {"step": int(step), **plain})
        every = self._config.samples_shown_every
        if chosen and every and step % every == 0:
            columns = ("prompt", "response", "reward")
            rows = [{name: record[name] for name in columns} for record in chosen]
            self.table(f"samples of step {step}", rows[: self._config.samples_shown])

    def evaluation(
        self, step: int, rewards: Sequence[float], also: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Writes the mean reward of every held-out question, in order, to evaluations.jsonl.

        Args:
          step: Updates done.
          rewards: Of the questions of the first set.
          also: Of those of the other sets, by their labels.
        """
        if self._active:
            others = {label: list(found) for label, found in (also or {}).items()}
            row = {"step": int(step), "rewards": list(rewards)}
            self._append("evaluations.jsonl", row | ({"also": others} if others else {}))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, all of it on the disk: where a run that resumes here cuts them.

        Raises:
          OSError: Rows are still in memory, because there is no space for them.
        """
        if not self._active:
            return {}
        return {name: file.sync() for name, file in self._files.items()}

    def _append(self, name: str, row: Row) -> None:
        file = self._files[name]
        told = file.waits
        try:
            file.append(_line(row))
        except OSError as error:
            if not told:
                self.warn(
                    f"{name} cannot be written ({error.strerror}); its rows are kept in memory "
                    "until it can"
                )

    def begin(self, phase: str, done: int, total: int) -> None:
        """Tells that a phase goes on; see `Console.begin`."""
        self._console.begin(phase, done, total)

    def progress(self, phase: str, done: int, total: int, row: Row | None = None) -> None:
        """Tells how far a phase is; see `Console.progress`."""
        self._console.progress(phase, done, total, row)

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Shows rows with the same keys as a small table."""
        self._console.table(title, rows)

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.say(text)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self._console.warn(text)

    def close(self) -> None:
        """Ends the progress display, the files and the trackers."""
        if self._closed:
            return
        self._closed = True
        self._console.close()
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.close()


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output_dir: {folder} cannot be written ({error}); give a folder of your own"
        ) from error


def _line(row: Row) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """A scalar of numpy or jax as Python's; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _different_first(records: list[Row], count: int) -> list[int]:
    """Numbers of at most `count` records: the first of each prompt, then the others."""
    first: dict[str, int] = {}
    for index, record in enumerate(records):
        first.setdefault(record["prompt"], index)
    others = (index for index in range(len(records)) if index not in set(first.values()))
    return [*first.values(), *others][:count]
