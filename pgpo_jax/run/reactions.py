"""What a run may change by itself when an alarm fires: one change, from the next update on.

A reaction is a change of the configuration, and for `refresh_teacher` of the state, so nothing in
the update knows of it. What reactions and alarms were worth is in benchmarks/EVIDENCE.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from pgpo_jax.config import Config
from pgpo_jax.run.setup import Run
from pgpo_jax.state import TrainState, with_fresh_teacher


def _change(section: str, **fields: Any) -> Callable[[Config], Config]:
    def changed(config: Config) -> Config:
        part = dataclasses.replace(getattr(config, section), **fields)
        return dataclasses.replace(config, **{section: part})

    return changed


def _lower_rate(config: Config) -> Config:
    return _change("optimizer", learning_rate=0.1 * config.optimizer.learning_rate)(config)


REACTIONS: dict[str, Callable[[Config], Config]] = {
    "none": lambda config: config,
    "lower_rate": _lower_rate,
    "freeze_teacher": _change("teacher", refresh="frozen"),
    "refresh_teacher": lambda config: config,
    "rehearse": _change("objective", rehearsal=1.0),
}
"""Reaction -> the configuration after it."""


def wanted(config: Config, fired: tuple[str, ...]) -> bool:
    """Whether one of the alarms that fired asks for a reaction."""
    alarms = config.alarms
    return alarms.reaction != "none" and bool(set(fired) & set(alarms.react_on))


def react(run: Run) -> Run:
    """The run with the configuration of the updates after the reaction."""
    return run._replace(config=REACTIONS[run.config.alarms.reaction](run.config))


def react_in_state(config: Config, state: TrainState) -> TrainState:
    """The state after the reaction: a refreshed teacher is the student of now."""
    if config.alarms.reaction != "refresh_teacher":
        return state
    return with_fresh_teacher(state)
