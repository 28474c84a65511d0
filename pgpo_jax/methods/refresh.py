"""Refresh rules that look at the run: restarts at fractions of it, a gate on reward and length.

The update leaves such a teacher as it is; after a step the loop asks `refresh_due`, with numbers
that all hosts have alike, and what the gate remembers is saved with the state.

Sources: StableSDPO (arXiv 2607.01763) restarts and freezes; CGTR (2606.03532) refreshes where the
reward rose and the length tail is safe, here by thresholds of our own.
"""

from collections.abc import Callable
from typing import NamedTuple

from pgpo_jax.teacher import TeacherConfig


class Progress(NamedTuple):
    """What a rule may know of a run after a step."""

    step: int
    """Steps done."""
    steps: int
    """Steps of the whole run."""
    reward: float
    """Mean reward of the step's responses."""
    cut: float
    """The part of them that was cut off at the longest length."""


class Gate(NamedTuple):
    """What `gated` remembers."""

    count: int = 0
    """Steps since it last looked."""
    reward: float = 0.0
    """The sum of their mean rewards."""
    cut: float = 0.0
    """The sum of their parts of cut-off responses."""
    level: float | None = None
    """Mean reward at the last refresh, or at the first look; None before it."""


def _restarts(config: TeacherConfig, gate: Gate, now: Progress) -> tuple[Gate, bool]:
    return gate, now.step in {round(part * now.steps) for part in config.restart_fractions}


def _gated(config: TeacherConfig, gate: Gate, now: Progress) -> tuple[Gate, bool]:
    count, level = gate.count + 1, gate.level
    seen = Gate(count, gate.reward + now.reward, gate.cut + now.cut, level)
    if count < config.period:
        return seen, False
    reward, cut = seen.reward / count, seen.cut / count
    if level is None:
        return Gate(level=reward), False
    opens = reward > level + config.gate_rise and cut <= config.gate_tail
    return Gate(level=reward if opens else level), opens


RULES: dict[str, Callable[[TeacherConfig, Gate, Progress], tuple[Gate, bool]]] = {
    "restarts": _restarts,
    "gated": _gated,
}
"""`teacher.refresh` -> (config, what was remembered, progress) -> what is, and whether the teacher
becomes the student."""


def refresh_due(config: TeacherConfig, gate: Gate, now: Progress) -> tuple[Gate, bool | None]:
    """What is remembered after a step, and whether the teacher becomes the student of now; None
    where the rule is none that looks at the run."""
    rule = RULES.get(config.refresh)
    return (gate, None) if rule is None else rule(config, gate, now)
