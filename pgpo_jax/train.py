"""Trains a student to follow its own teacher, or goes on where the run in the folder stopped.

One step: the student answers questions, the answers are verified, the teacher (an average of the
student's past) is shown a successful sibling answer, and one jitted function (`step.py`) moves the
student towards what the teacher would have said: once, or several times (`run/updates.py`).
"""

import functools
import sys
from collections.abc import Sequence

import numpy as np

from pgpo_jax import config as config_module
from pgpo_jax import data, keys, sharding
from pgpo_jax.command import parse
from pgpo_jax.config import Config
from pgpo_jax.errors import command
from pgpo_jax.evaluation import held_out, verify
from pgpo_jax.keys import Stream
from pgpo_jax.reprompt import reprompt
from pgpo_jax.run import (
    STOPPED,
    Clock,
    Run,
    Session,
    check_rows,
    check_siblings,
    configured_optimizer,
    hold_folder,
    join,
    judged_examples,
    load_run,
    make_updates,
    reactions,
    records,
    summarise,
    token_columns,
    warm_up,
)
from pgpo_jax.sampler import rollout
from pgpo_jax.state import (
    TrainState,
    abstract_train_state,
    init_train_state,
    with_fresh_teacher,
)
from pgpo_jax.tasks import Question

__all__ = ["COMMAND", "STOPPED", "main", "train"]

COMMAND = config_module.command("train", __doc__)


def train(config: Config) -> int:
    """Runs, or resumes, a run; returns the exit code."""
    run = _prepare(config)
    evaluation_key = keys.key(config.seed, Stream.EVALUATION)
    with hold_folder(run.config) as changes, Session(run, evaluation_key) as session:
        begun = _begin(run, session, changes)
        if begun is None:
            return STOPPED
        run, state = begun
        update = make_updates(run, state)
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
            solve = run.task.solution
            shown = reprompt(run.policy, questions, rollouts, outcomes, rng, run.reprompt, solve)
            examples = judged_examples(run, questions, rollouts, outcomes, shown)
            clock.lap("reprompt")
            # Nothing is gained by fetching one step late: the next answers need this student.
            state, row, divergence = update(state, examples)
            clock.lap("train")
            row |= summarise(run, rollouts, outcomes, shown, clock)
            told = records(questions, rollouts, outcomes, shown)
            tokens = functools.partial(token_columns, run.policy.tokenizer, rollouts, divergence)
            session.writer.samples(step + 1, told, tokens)
            if session.refreshes_teacher(run.config, step + 1, row):
                state = with_fresh_teacher(state)
            if session.write(step + 1, row):  # an alarm asks for a reaction
                run, state = reactions.react(run), reactions.react_in_state(run.config, state)
                update = make_updates(run, state)
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


def _begin(run: Run, session: Session, changes: Sequence[str]) -> tuple[Run, TrainState] | None:
    """The state to go on from: that of the newest checkpoint, or the model after its warm start.

    `changes` says what changed in the configuration since the run was started. None where a signal
    ended the warm start.
    """
    config = run.config
    optimizer = configured_optimizer(config)
    state = session.restore(abstract_train_state(run.params, optimizer, run.teacher), changes)
    if state is None:
        params = warm_up(run, session) if config.warm_start.steps else run.params
        if params is None:
            return None
        state = init_train_state(params, optimizer, run.teacher)
    run = run._replace(params=None, teacher=None)  # the state holds and donates them
    return (reactions.react(run) if session.reacted else run), state


def _indices(run: Run, step: int) -> np.ndarray:
    questions_per_step = run.config.data.questions_per_step
    return data.batch_indices(run.config.seed, step, len(run.task.train), questions_per_step)


def _questions(run: Run, step: int) -> list[Question]:
    """This host's questions of a step."""
    indices = _indices(run, step)
    return [run.task.train[int(i)] for i in indices[sharding.host_rows(len(indices))]]


def main(argv: Sequence[str]) -> int:
    """The command line; see `--help`."""
    return train(config_module.from_arguments(parse(COMMAND, argv)))


if __name__ == "__main__":
    sys.exit(command(main))
