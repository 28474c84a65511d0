"""Solves hard questions at test time: the model learns from its own failed attempts at each.

Questions that the model almost never answers are found by screening. For each of them the model
begins anew, makes attempts, and learns from the feedback on them until one succeeds. The share of
questions solved within k attempts, discovery@k, stands beside that of independent attempts and of
conversations that are shown the feedback. The section `discovery` says which questions, which
methods and how many attempts. The same command goes on with what is missing. The last line is the
result as JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from pgpo_jax import config as config_module
from pgpo_jax import keys
from pgpo_jax.command import parse
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError, command
from pgpo_jax.run import (
    STOPPED,
    Interrupted,
    Models,
    Run,
    Session,
    configured_optimizer,
    hold_folder,
    join,
    load_run,
    run_discovery,
    warm_up,
)
from pgpo_jax.state import abstract_train_state, init_train_state

COMMAND = config_module.command("discover", __doc__)


def discover(config: Config) -> int:
    """Asks the hard questions, or those that are left; returns the exit code."""
    _check(config)
    mesh = join(config)
    _check_devices(config, mesh)
    run = load_run(config, mesh)
    # The session is that of a run without updates of its own: it keeps the warm start.
    evaluation = dataclasses.replace(run.config.evaluation, every=0)
    quiet = dataclasses.replace(run.config, steps=0, evaluation=evaluation)
    key = keys.key(config.seed, keys.Stream.EVALUATION)
    with hold_folder(run.config) as changes, Session(run._replace(config=quiet), key) as session:
        models = _begin(run, session, changes)
        if models is None:
            return STOPPED
        run = run._replace(params=None, teacher=None)
        try:
            told = run_discovery(run, models, session)
        except Interrupted:
            session.writer.say(f"stopped; the same command goes on: {config.output_dir}")
            return STOPPED
        title = "discovery@k over {questions} questions, 95 % intervals".format(**told)
        session.writer.table(title, _rows(told))
        for other, (gap, low, high) in told.get("ahead", {}).items():
            session.writer.say(
                f"distillation less {other} at {told['attempts']} attempts: {gap:+.1%} of the "
                f"questions [{low:+.1%}, {high:+.1%}]"
            )
    print(json.dumps(told))
    return 0


def _check(config: Config) -> None:
    """Refuses what would show the model the answer, or has no meaning for a single question."""
    source, feedback = config.reprompt.source, config.reprompt.use_feedback
    if source != "sibling":
        raise InputError(
            f"reprompt.source: got {source}; must be sibling, for a solution that is shown is not "
            "discovered"
        )
    if config.reprompt.demonstration == "other":
        raise InputError(
            "reprompt.demonstration: got other; there is no other question whose success could be "
            "shown, so choose another"
        )
    if config.objective.views:
        raise InputError(
            f"objective.advantage: got {config.objective.advantage}, which shows the model the "
            "right answer; must be another, for what is shown is not discovered"
        )
    if feedback == "never" and "distillation" in config.discovery.methods:
        raise InputError(
            "reprompt.use_feedback: got never; distillation learns from nothing else before the "
            "first success: choose without_demonstration or always"
        )
    if config.data.updates_per_rollout > 1:
        raise InputError(
            f"data.updates_per_rollout: got {config.data.updates_per_rollout}; must be 1, for a "
            "step is about one question (data.passes goes over its responses again)"
        )
    if config.teacher.refresh in ("restarts", "gated"):
        raise InputError(
            f"teacher.refresh: got {config.teacher.refresh}, which goes by the steps of a run; "
            "choose ema, periodic, live, frozen or trust_region"
        )


def _check_devices(config: Config, mesh: Mesh) -> None:
    """One process, whose devices divide an update's rows."""
    if jax.process_count() > 1:
        raise InputError(
            f"distributed: got {jax.process_count()} processes; discovery asks one question after "
            "the other in one: give different processes different questions (task.seed, files)"
        )
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.data.micro_batches
    if (samples := config.discovery.samples_per_step) % parts:
        raise InputError(
            f"discovery.samples_per_step: got {samples}; must divide by devices (data x fsdp) x "
            f"micro-batches = {parts}"
        )


def _begin(run: Run, session: Session, changes: Sequence[str]) -> Models | None:
    """The model that every question begins with: as it comes, or after the warm start, which is
    saved. None where a signal ended that."""
    config = run.config
    optimizer = configured_optimizer(config)
    state = session.restore(abstract_train_state(run.params, optimizer, run.teacher), changes)
    if state is None and not config.warm_start.steps:
        return Models(run.params, run.teacher)
    if state is None:
        params = warm_up(run, session)
        if params is None:
            return None
        state = init_train_state(params, optimizer, run.teacher)
        session.goes_on(state)
    if (step := int(state.step)) > 0:
        raise InputError(
            f"output_dir: {config.output_dir} holds a training run at step {step}; choose another "
            "(its student: convert export, then model.path)"
        )
    return Models(state.student, None if run.teacher_graphdef is None else state.teacher)


def _rows(told: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line of the table for every k."""
    curves = told["methods"]
    ks = next(iter(curves.values()))["attempts"]
    return [
        {"k": str(k)}
        | {
            method: f"{values['share'][i]:.1%} [{values['low'][i]:.1%}, {values['high'][i]:.1%}]"
            for method, values in curves.items()
        }
        for i, k in enumerate(ks)
    ]


def main(argv: Sequence[str]) -> int:
    """The command line; see `--help`."""
    return discover(config_module.from_arguments(parse(COMMAND, argv)))


if __name__ == "__main__":
    sys.exit(command(main))
