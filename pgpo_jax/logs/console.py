"""Console of a run: progress with the time left, tables, warnings in plain words."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console as RichConsole
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

from pgpo_jax.errors import printable
from pgpo_jax.logs.alarms import is_number

Row = Mapping[str, Any]

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
"""What a line of progress shows, where a row has it, and how."""


class Console:
    """Talks to a run's user: a bar on a terminal, otherwise a line every so often."""

    def __init__(self, log_seconds: float, active: bool = True) -> None:
        """Says nothing yet.

        Args:
          log_seconds: Between two lines of progress where stdout is no terminal.
          active: False on all hosts but the first: nothing is said.
        """
        self._log_seconds = log_seconds
        self._active = active
        self._console = RichConsole(highlight=False)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._phases: dict[str, _Phase] = {}

    def progress(self, phase: str, done: int, total: int, row: Row | None = None) -> None:
        """Tells how far a phase ("warm start", "train") is.

        Args:
          phase: Its name.
          done: Steps done, of `total`.
          row: Its latest metrics, of which `SHOWN` names the ones to show.
        """
        if not self._active:
            return
        text = summary(row or {})
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
        if state.said is not None and done < total and now - state.said < self._log_seconds:
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
        """Ends the progress display."""
        if self._progress is not None:
            self._progress.stop()


@dataclass
class _Phase:
    """Of a phase that is told in lines: when and where it began, and when it was last told."""

    started: float
    first: int
    said: float | None = None


def _make_progress(console: RichConsole) -> Progress:
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


def summary(row: Row) -> str:
    """What a line says of a row of metrics: what `SHOWN` names."""
    shown = [form.format(row[name]) for name, form in SHOWN.items() if is_number(row.get(name))]
    return " ".join(shown)


def _short(value: Any, limit: int = 300) -> str:
    """One line of at most `limit` characters, the middle of a longer text left out."""
    text = f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
