"""What a run says: three files of JSON lines always, trackers if asked, and the console.

`metrics.jsonl` has the numbers of every step, `samples.jsonl` some of its responses, and
`evaluations.jsonl` the mean reward of every held-out question, for intervals that know that the
responses to one question belong together.

Files are the truth: one JSON object a line, flushed at once, so that a killed run loses nothing.
Every metrics row has `step`, the number of updates done. NaN and infinities, which JSON does not
have, become null. A resumed run cuts its files where they ended when its checkpoint was saved and
appends, so a file reads as if the run had never stopped. Rows that find no space stay in memory
until there is some; a file holds whole lines only.

The console shows progress with the time left (a bar on a terminal, otherwise a line every so
often), sample responses, and warnings in plain words (those of `watch.py`).
"""

import contextlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from pgpo_jax.errors import InputError, printable, require
from pgpo_jax.logs.alarms import is_number
from pgpo_jax.logs.identity import Identity, identify
from pgpo_jax.logs.jsonl import Lines

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MetricsConfig:
    """What a run reports besides its two files (config section `metrics`)."""

    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl; `pip install 'pgpo_jax[trackers]'` brings them."""
    project: str = "pgpo_jax"
    """The project's name in a tracker."""
    name: str | None = None
    """The run's name in a tracker; null is the name of the output folder. trackio
    adds the run's id, by which a resumed run is the same one."""
    estimators: tuple[
        Literal["entropy_gap", "conditional_kl", "jensen_shannon", "pointwise"], ...
    ] = ()
    """Further estimates of the information to log, besides the one that the multiplier reads."""
    log_seconds: float = 10.0
    """Seconds between progress lines where stdout is not a terminal; 0 prints every step."""
    samples_per_step: int = 8
    """Responses written to samples.jsonl at each step, of different questions first."""
    samples_shown: int = 3
    """How many of them the console shows."""
    samples_shown_every: int = 20
    """Steps between two such tables; 0 = never."""

    def __post_init__(self) -> None:
        amounts = ("log_seconds", "samples_per_step", "samples_shown", "samples_shown_every")
        rules = {name: (getattr(self, name) >= 0, "at least 0") for name in amounts}
        require("metrics", self, **rules)


# What a progress line shows, where a row has it, and how.
SHOWN = {
    "loss": "loss {:.4f}",
    "information": "information {:.3f}",
    "multiplier": "multiplier {:.2f}",
    "reward/mean": "reward {:.3f}",
    "context_fraction": "context {:.0%}",
    "response_length/mean": "length {:.0f}",
    "accuracy": "accuracy {:.1%}",
    "eval/avg@16": "avg@16 {:.1%}",
    "eval/pass@16": "pass@16 {:.1%}",
    "eval/format": "well-formed {:.0%}",
}


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
          total_steps: Updates of the whole run, for the time left.
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
        self._bars: dict[str, TaskID] = {}
        self._phases: dict[str, _Phase] = {}
        self._console = Console(highlight=False)
        self._progress: Progress | None = None
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
        for name in dict.fromkeys(self._config.trackers):
            settings = dict(run_config or {})
            place = folder.resolve()
            identity = identify(place, self._config.name, resume_from)
            tracker = TRACKERS[name](self._config, place, settings, resume_from, identity)
            self._trackers.append(tracker)
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
          step: Updates done.
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
        else:
            self.say(f"step {step}: {_summary(plain)}")
        for warning in warnings:
            self.warn(f"step {step}: {warning}")

    def samples(
        self, step: int, records: Iterable[Row], more: Callable[[int], Row] | None = None
    ) -> None:
        """Writes some of a step's responses to samples.jsonl and, now and then, shows a few.

        Args:
          step: Updates done when they were sampled.
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

    def evaluation(self, step: int, rewards: Sequence[float]) -> None:
        """Writes the mean reward of every held-out question, in order, to evaluations.jsonl."""
        if self._active:
            self._append("evaluations.jsonl", {"step": int(step), "rewards": list(rewards)})

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

    def progress(self, phase: str, done: int, total: int, row: Row | None = None) -> None:
        """Tells how far a phase ("warm start", "train") is; writes no file.

        Args:
          phase: Its name.
          done: Steps done, of `total`.
          row: Its latest metrics, of which `SHOWN` names the ones to show.
        """
        if not self._active:
            return
        text = _summary(row or {})
        if self._console.is_terminal:
            if self._progress is None:
                self._progress = _make_progress(self._console)
                self._progress.start()
            if phase not in self._bars:
                self._bars[phase] = self._progress.add_task(phase, total=total, text="")
                # The steps that an earlier run did must not count into the speed of this one.
                self._progress.reset(self._bars[phase], completed=max(done - 1, 0))
            self._progress.update(self._bars[phase], completed=done, text=text)
            return
        state = self._phases.setdefault(phase, _Phase(time.monotonic(), done))
        now = time.monotonic()
        if state.said is not None and done < total and now - state.said < self._config.log_seconds:
            return
        state.said = now
        left = ""
        if state.first < done < total:
            seconds = (now - state.started) / (done - state.first)
            left = f", {seconds:.2g} s a step, {_duration(seconds * (total - done))} left"
        self.say(f"{phase} {done}/{total}: {text}{left}")

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Shows rows with the same keys as a small table (as lines where there is no terminal)."""
        if not self._active or not rows:
            return
        cells = [[_short(value) for value in row.values()] for row in rows]
        if not self._console.is_terminal:
            self.say(f"{title} ({' | '.join(rows[0])})")
            for row in cells:
                self.say("  " + " | ".join(row))
            return
        table = Table(title=title, title_justify="left", show_lines=True)
        for name in rows[0]:
            table.add_column(name, overflow="fold")
        for row in cells:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._console.print(table)

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if not self._active:
            return
        text = printable(text)
        # On a terminal rich wraps and moves the bar; a log gets the line as it is, at once.
        # A log that is full, or a reader that went away, must not end the run.
        with contextlib.suppress(OSError):
            if self._console.is_terminal:
                self._console.print(Text(text))
            else:
                print(text, file=sys.stdout, flush=True)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self.say(f"warning: {text}")

    def close(self) -> None:
        """Ends the progress display, the files and the trackers."""
        if self._closed:
            return
        self._closed = True
        if self._progress is not None:
            self._progress.stop()
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.close()


class Tracker(NamedTuple):
    """Somewhere else that metrics go."""

    log: Callable[[int, dict[str, float]], Any]
    close: Callable[[], Any]


def _wandb(
    config: MetricsConfig,
    folder: Path,
    run: dict[str, Any],
    start: int | None,
    identity: Identity,
) -> Tracker:
    wandb = _import("wandb")
    session = wandb.init(
        project=config.project,
        id=identity.id,
        name=identity.name,
        dir=str(folder),
        config=run,
        resume="never" if start is None else "allow",
    )
    return Tracker(_after(identity.sent, session.log), session.finish)


def _after(sent: int, log: Callable[..., Any]) -> Callable[[int, dict[str, float]], Any]:
    """Sends the rows of steps that were not sent before."""
    return lambda step, row: log(row, step=step) if step > sent else None


def _tensorboard(
    config: MetricsConfig,
    folder: Path,
    run: dict[str, Any],
    start: int | None,
    identity: Identity,
) -> Tracker:
    del run, identity  # TensorBoard has no place for them
    purge = None if start is None else start + 1
    writer = _import("tensorboardX").SummaryWriter(
        str(folder / "tensorboard" / (config.name or "")), purge_step=purge
    )

    def log(step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _trackio(
    config: MetricsConfig,
    folder: Path,
    run: dict[str, Any],
    start: int | None,
    identity: Identity,
) -> Tracker:
    del folder
    trackio = _import("trackio")
    trackio.init(
        project=config.project,
        name=f"{identity.name}-{identity.id}",  # it goes on with a run by its name
        config=run,
        resume="never" if start is None else "allow",
    )
    return Tracker(_after(identity.sent, trackio.log), trackio.finish)


TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio}


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"metrics.trackers: got {name}, which is not installed; "
            "pip install 'pgpo_jax[trackers]', or drop it"
        ) from error


@dataclass
class _Phase:
    """Of a phase that is told in lines: when and where it began, and when it was last told."""

    started: float
    first: int
    said: float | None = None


def _make_progress(console: Console) -> Progress:
    # A long text is cut, not the times before it.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[text]}"),
        console=console,
        refresh_per_second=2,
        speed_estimate_period=3600,  # a step may take minutes
    )


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


def _summary(row: Row) -> str:
    shown = [form.format(row[name]) for name, form in SHOWN.items() if is_number(row.get(name))]
    return " ".join(shown)


def _short(value: Any, limit: int = 300) -> str:
    """One line of at most `limit` characters, the middle of a longer text left out."""
    text = f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _different_first(records: list[Row], count: int) -> list[int]:
    """Numbers of at most `count` records: the first of each prompt, then the others."""
    first: dict[str, int] = {}
    for index, record in enumerate(records):
        first.setdefault(record["prompt"], index)
    others = (index for index in range(len(records)) if index not in set(first.values()))
    return [*first.values(), *others][:count]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
