"""What a run says, how it is read back, and the alarms that watch it."""

from pgpo_jax.logs import jsonl
from pgpo_jax.logs.alarms import CONDITIONS, TRENDS, AlarmsConfig, End, Trace, Watch, follow
from pgpo_jax.logs.console import Console
from pgpo_jax.logs.reader import (
    ABSENT,
    Experiment,
    RunLog,
    Series,
    config_differences,
    experiments,
    read_discovery,
    read_multipliers,
    read_runs,
    read_samples,
)
from pgpo_jax.logs.trackers import MetricsConfig
from pgpo_jax.logs.writer import Writer

__all__ = [
    "ABSENT",
    "CONDITIONS",
    "TRENDS",
    "AlarmsConfig",
    "Console",
    "End",
    "Experiment",
    "MetricsConfig",
    "RunLog",
    "Series",
    "Trace",
    "Watch",
    "Writer",
    "config_differences",
    "experiments",
    "follow",
    "jsonl",
    "read_discovery",
    "read_multipliers",
    "read_runs",
    "read_samples",
]
