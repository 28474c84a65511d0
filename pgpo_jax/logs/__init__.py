"""What a run says, how it is read back, and the alarms that watch it."""

from pgpo_jax.logs.alarms import CONDITIONS, TRENDS, AlarmsConfig, End, Trace, Watch, follow
from pgpo_jax.logs.reader import ABSENT, Group, Run, Series
from pgpo_jax.logs.writer import MetricsConfig, Writer, count_compilations

__all__ = [
    "ABSENT",
    "CONDITIONS",
    "TRENDS",
    "AlarmsConfig",
    "End",
    "Group",
    "MetricsConfig",
    "Run",
    "Series",
    "Trace",
    "Watch",
    "Writer",
    "count_compilations",
    "follow",
]
