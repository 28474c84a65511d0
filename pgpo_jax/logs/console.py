"""Console of a run: progress with the time left, tables, warnings in plain words."""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
    r"eval/(avg@\d+)": "{} {:.1%}",
    r"eval/(pass@\d+)": "{} {:.1%}",
    "eval/format": "well-formed {:.0%}",
    r"eval/([\w-]+)/(avg@\d+)": "{} {} {:.1%}",
    r"solved/(\w+)": "{} {:.0%}",
}
"""What a line of progress shows, where a row has it (a pattern), and how: the pattern's groups,
then the value."""


FIRST, BEAT = 25.0, 55.0
"""Seconds of silence after which a log hears that a phase goes on: at its beginning, and later."""


class Console:
    """Talks to a run's user: a bar on a terminal, otherwise a line every so often, at least one a
    minute while a phase goes on. A context manager."""

    def __init__(
        self, log_seconds: float, active: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Says nothing yet.

        Args:
          log_seconds: Between two lines of progress where stdout is no terminal.
          active: False on all hosts but the first: nothing is said.
          clock: Seconds.
        """
        self._log_seconds = log_seconds
        self._active = active
        self._clock = clock
        self._console = RichConsole(highlight=False)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._phases: dict[str, _Phase] = {}  # that are not done; the last one goes on
        self._said = clock()
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, phase: str, done: int, total: int) -> None:
        """Tells that a phase goes on, which has something to say of itself later."""
        if not self._active:
            return
        if self._console.is_terminal:
            self._bar(phase, done, total, None)
            return
        with self._lock:
            self._goes_on(phase, done, total)

    def progress(self, phase: str, done: int, total: int, row: Row | None = None) -> None:
        """Tells how far a phase ("warm start", "train") is.

        Args:
          phase: Its name.
          done: Steps done, of `total`.
          row: Its latest metrics, of which `SHOWN` names the ones to show; None for a phase whose
            results are told when it is done, so that it is heard of only where it takes long.
        """
        if not self._active:
            return
        if self._console.is_terminal:
            self._bar(phase, done, total, summary(row or {}))
            if row is None and done >= total and self._progress is not None:
                self._progress.remove_task(self._bars.pop(phase))
            return
        with self._lock:
            now = self._clock()
            state = self._goes_on(phase, done, total)
            if state.started is None:
                state.started, state.first = now, done
            if done >= total:
                del self._phases[phase]
            state.counts = row is None
            if state.counts:
                since = state.begun if state.said is None else state.said
                due = state.first < done < total and now - since >= self._log_seconds
            elif state.said is None or done >= total:
                due = True
            else:
                due = now - state.said >= self._log_seconds
            if due:
                state.said = now
                text = [summary(row)] if row else []
                self.say(f"{phase} {done}/{total}: {', '.join(text + state.left(now))}")

    def beat(self) -> None:
        """Says that the phase that goes on does so, if nothing was said for long."""
        with self._lock:
            if not self._phases or self._closed.is_set():
                return
            now, (phase, state) = self._clock(), list(self._phases.items())[-1]
            limit = FIRST if state.said is None else BEAT
            if now - max(self._said, state.begun) < max(limit, self._log_seconds):
                return
            state.said = now
            waited = f"{_duration(now - state.heard)} in the next"
            self.say(f"{phase} {state.done}/{state.total}: {', '.join([waited, *state.left(now)])}")

    def _goes_on(self, phase: str, done: int, total: int) -> "_Phase":
        """The phase, from now on the one that goes on."""
        now = self._clock()
        state = self._phases.pop(phase, None) or _Phase(now)
        state.done, state.total, state.heard = done, total, now
        self._phases[phase] = state
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return state

    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            self.beat()

    def _bar(self, phase: str, done: int, total: int, text: str | None) -> None:
        if self._progress is None:
            self._progress = _make_progress(self._console)
            self._progress.start()
        if phase not in self._bars:
            self._bars[phase] = self._progress.add_task(phase, total=total, text="")
            # The steps that an earlier run did must not count into the speed of this one.
            self._progress.reset(self._bars[phase], completed=max(done - 1, 0))
        fields: dict[str, Any] = {} if text is None else {"text": text}
        self._progress.update(self._bars[phase], completed=done, **fields)

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
        self._said = self._clock()
        # On a terminal rich wraps and moves the bar; a log gets the line as it is, at once.
        # A log that is full, or a reader that went away, must not end the run.
        with contextlib.suppress(OSError):
            if self._console.is_terminal:
                self._console.print(Text(text))
            else:
                with self._lock:
                    print(text, file=sys.stdout, flush=True)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self.say(f"warning: {text}")

    def close(self) -> None:
        """Ends the progress display."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self._progress is not None:
            self._progress.stop()


@dataclass
class _Phase:
    """Of a phase that is told in lines: how far it is, and when it was heard of."""

    begun: float
    started: float | None = None
    """When its first steps were done, `first` of them: the very first may compile."""
    first: int = 0
    said: float | None = None
    heard: float = 0.0
    done: int = 0
    total: int = 0
    counts: bool = False
    """Whether it has no metrics, and its steps are not worth a number of seconds."""

    def left(self, now: float) -> list[str]:
        """The seconds of a step and the time left, where they are known."""
        if self.started is None or not self.first < self.done < self.total:
            return []
        seconds = (self.heard - self.started) / (self.done - self.first)
        left = max(seconds * (self.total - self.done) - (now - self.heard), 0)
        shown = f"{seconds:.2g}" if seconds < 99 else f"{seconds:.0f}"
        return [*([] if self.counts else [f"{shown} s a step"]), f"{_duration(left)} left"]


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
    return " ".join(
        (form if _is_share(name, row) else form.replace(".1%", ".3g")).format(
            *found.groups(), value
        )
        for pattern, form in SHOWN.items()
        for name, value in row.items()
        if (found := re.fullmatch(pattern, name)) and is_number(value)
    )


def _is_share(name: str, row: Row) -> bool:
    """Not the mean of rewards that leave [0, 1], which the row tells."""
    section, _, last = name.rpartition("/")
    return f"{section}/reward_min" not in row or not last.startswith("avg@")


def _short(value: Any, limit: int = 300) -> str:
    """One line of at most `limit` characters, the middle of a longer text left out."""
    text = f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
