"""Trackers, where metrics go besides a run's files, and the section that says what is reported."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from pgpo_jax.errors import InputError, require
from pgpo_jax.logs.identity import Identity


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


class TrackedRun(NamedTuple):
    """A run that begins or goes on, as its trackers are told."""

    folder: Path
    config: dict[str, Any]
    """Its configuration, resolved."""
    start: int | None
    """The step of the checkpoint that it goes on from; None where it begins."""
    identity: Identity


class Tracker(NamedTuple):
    """Somewhere else that metrics go."""

    log: Callable[[int, dict[str, float]], Any]
    close: Callable[[], Any]


def _wandb(config: MetricsConfig, run: TrackedRun) -> Tracker:
    wandb = _import("wandb")
    session = wandb.init(
        project=config.project,
        id=run.identity.id,
        name=run.identity.name,
        dir=str(run.folder),
        config=run.config,
        resume="never" if run.start is None else "allow",
    )
    return Tracker(_after(run.identity.sent, session.log), session.finish)


def _after(sent: int, log: Callable[..., Any]) -> Callable[[int, dict[str, float]], Any]:
    """Sends the rows of steps that were not sent before."""
    return lambda step, row: log(row, step=step) if step > sent else None


def _tensorboard(config: MetricsConfig, run: TrackedRun) -> Tracker:
    purge = None if run.start is None else run.start + 1
    writer = _import("tensorboardX").SummaryWriter(
        str(run.folder / "tensorboard" / (config.name or "")), purge_step=purge
    )

    def log(step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _trackio(config: MetricsConfig, run: TrackedRun) -> Tracker:
    trackio = _import("trackio")
    trackio.init(
        project=config.project,
        name=f"{run.identity.name}-{run.identity.id}",  # it goes on with a run by its name
        config=run.config,
        resume="never" if run.start is None else "allow",
    )
    return Tracker(_after(run.identity.sent, trackio.log), trackio.finish)


TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio}


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"metrics.trackers: got {name}, which is not installed; "
            "pip install 'pgpo_jax[trackers]', or drop it"
        ) from error
