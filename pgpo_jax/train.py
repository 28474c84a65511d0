"""Trains a student to follow its own teacher, or goes on where the run in the folder stopped.

One step: the student answers questions, the answers are verified, the teacher (an average of the
student's past) is shown a successful sibling answer, and one jitted function (`step.py`) moves the
student towards what the teacher would have said.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pgpo_jax import config as config_module
from pgpo_jax import data, fused, keys, methods, sharding
from pgpo_jax.command import parse
from pgpo_jax.config import Config
from pgpo_jax.data import Batch, Rollouts, TeacherPrompts, to_rows
from pgpo_jax.errors import command
from pgpo_jax.evaluation import held_out, verify
from pgpo_jax.keys import Stream
from pgpo_jax.logs import read_multipliers
from pgpo_jax.optimizer import information_state, learning_rate, make_optimizer
from pgpo_jax.reprompt import answer_prompts, reprompt
from pgpo_jax.run import (
    STOPPED,
    Clock,
    Run,
    Session,
    check_rows,
    check_siblings,
    hold_folder,
    join,
    load_run,
    reactions,
    records,
    summarise,
    token_columns,
)
from pgpo_jax.sampler import rollout
from pgpo_jax.state import TrainState, abstract_train_state, init_train_state, train_state_shardings
from pgpo_jax.step import make_train_step
from pgpo_jax.tasks import Outcome, Question
from pgpo_jax.warm_start import warm_start

__all__ = ["COMMAND", "STOPPED", "main", "train"]

COMMAND = config_module.command("train", __doc__)


def train(config: Config) -> int:
    """Runs, or resumes, a run; returns the exit code."""
    run = _prepare(config)
    evaluation_key = keys.key(config.seed, Stream.EVALUATION)
    with hold_folder(run.config) as changes, Session(run, evaluation_key) as session:
        run, state = _begin(run, session, changes)
        train_step = _build(run, state)
        while session.goes_on(state):  # evaluates, saves, and ends after the last update
            step, clock = int(state.step), Clock()
            questions = _questions(run, step)
            key = keys.key(config.seed, Stream.ROLLOUT, step)
            names = [question.key for question in questions]
            asked = [question.messages for question in questions]
            rollouts = rollout(run.policy, state.student, asked, key, names=names)
            clock.lap("rollout")
            outcomes = verify(run.task, questions, rollouts.texts)
            rng = keys.generator(config.seed, Stream.REPROMPT, step)
            shown = reprompt(run.policy, questions, rollouts, outcomes, rng, run.reprompt)
            batch = _make_batch(run, questions, rollouts, outcomes, shown)
            clock.lap("reprompt")
            updates = int(information_state(state.opt_state).count)
            placed = sharding.to_global(batch, run.policy.mesh)
            state, measured = train_step(state, placed, run.policy.frozen)
            # Nothing is gained by fetching one step late: the next answers need this student.
            divergence = _take_divergence(run, measured, batch)
            row = {name: float(value) for name, value in jax.device_get(measured).items()}
            clock.lap("train")
            row |= summarise(run, rollouts, outcomes, shown, clock)
            if row["skipped"]:
                del row["multiplier"]  # the state's is that of an update before
            row["skipped/total"] = step - updates + int(row["skipped"])
            row["lr"] = float(np.asarray(learning_rate(run.config.optimizer)(updates)))
            told = records(questions, rollouts, outcomes, shown)
            tokens = functools.partial(token_columns, run.policy.tokenizer, rollouts, divergence)
            session.writer.samples(step + 1, told, tokens)
            if session.write(step + 1, row):  # an alarm asks for a reaction
                run, state = reactions.react(run), reactions.react_in_state(run.config, state)
                train_step = _build(run, state)
        return session.finish(state)


def _prepare(config: Config) -> Run:
    """The run, loaded; what can be refused is refused here, the cheapest first."""
    mesh = join(config)
    check_rows(config, mesh)
    notes = check_siblings(config.sampling, config.reprompt)
    run = load_run(config, mesh)
    run = run._replace(notes=(*notes, *run.notes))
    if config.evaluation.every:
        held_out(run.task, config.evaluation)
    _indices(run, 0)
    return run


def _begin(run: Run, session: Session, changes: Sequence[str]) -> tuple[Run, TrainState]:
    """The state to go on from: that of the newest checkpoint, or the model after its warm start.

    `changes` says what changed in the configuration since the run was started.
    """
    config = run.config
    optimizer = make_optimizer(config.optimizer, read_multipliers(config.optimizer.replay))
    state = session.restore(abstract_train_state(run.params, optimizer, run.teacher), changes)
    if state is None:
        params = run.params
        if steps := config.warm_start.steps:

            def report(done: int, loss: float) -> None:
                session.writer.progress("warm start", done, steps, {"loss": loss})

            params = warm_start(
                run.policy, params, run.task, config.warm_start, run.reprompt, config.seed, report
            )
        state = init_train_state(params, optimizer, run.teacher)
    run = run._replace(params=None, teacher=None)  # the state holds and donates them
    return (reactions.react(run) if session.reacted else run), state


def _build(run: Run, state: TrainState) -> Callable[..., Any]:
    """The update that a run's configuration states."""
    config = run.config
    optimizer = make_optimizer(config.optimizer, read_multipliers(config.optimizer.replay))
    return make_train_step(
        run.policy.graphdef,
        optimizer,
        fused.Options(
            config.distillation,
            config.metrics.estimators,
            run.policy.sampling.vocabulary(),
        ),
        train_state_shardings(state.student, optimizer, state.teacher),
        objective=methods.make_objective(config.objective),
        teacher_config=config.teacher,
        teacher_graphdef=run.teacher_graphdef,
    )


def _indices(run: Run, step: int) -> np.ndarray:
    questions_per_step = run.config.data.questions_per_step
    return data.batch_indices(run.config.seed, step, len(run.task.train), questions_per_step)


def _questions(run: Run, step: int) -> list[Question]:
    """This host's questions of a step."""
    indices = _indices(run, step)
    return [run.task.train[int(i)] for i in indices[sharding.host_rows(len(indices))]]


def _make_batch(
    run: Run,
    questions: Sequence[Question],
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
    shown: TeacherPrompts,
) -> Batch:
    """This host's rows of the update."""
    config, answers = run.config, None
    if config.objective.views:
        answers = answer_prompts(run.policy, questions, rollouts, outcomes, run.reprompt)
    rewards = [[outcome.reward for outcome in group] for group in outcomes]
    group = methods.group_statistics(
        rewards, run.reprompt.threshold, config.objective.scale_advantage
    )
    examples = data.make_examples(rollouts, shown, group, answers)
    return data.pack(examples, config.data, run.policy.mesh)


def _take_divergence(run: Run, measured: dict[str, Any], batch: Batch) -> list[np.ndarray] | None:
    """Takes the divergence of each response's tokens out of the measurements, for the samples."""
    divergence = measured.pop("token_divergence")
    if not run.config.metrics.samples_per_step:
        return None
    return to_rows(batch, sharding.to_host(divergence))


def main(argv: Sequence[str]) -> int:
    """The command line; see `--help`."""
    return train(config_module.from_arguments(parse(COMMAND, argv)))


if __name__ == "__main__":
    sys.exit(command(main))
