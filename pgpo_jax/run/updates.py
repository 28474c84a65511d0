"""Updates of a step: mini-batches of whole questions in a drawn order, and their common metrics."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from pgpo_jax import data, fused, methods, sharding
from pgpo_jax.config import Config
from pgpo_jax.data import Examples, Rollouts, TeacherPrompts
from pgpo_jax.logs import read_multipliers
from pgpo_jax.optimizer import information_state, learning_rate, make_optimizer
from pgpo_jax.reprompt import answer_prompts
from pgpo_jax.run.setup import Run
from pgpo_jax.state import TrainState, train_state_shardings
from pgpo_jax.step import make_score, make_train_step
from pgpo_jax.tasks import Outcome, Question


def configured_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a configuration states, with the multipliers that it replays."""
    return make_optimizer(config.optimizer, read_multipliers(config.optimizer.replay))


def judged_examples(
    run: Run,
    questions: Sequence[Question],
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
    shown: TeacherPrompts,
) -> Examples:
    """This host's rows of the updates."""
    config, answers = run.config, None
    if config.objective.views:
        answers = answer_prompts(run.policy, questions, rollouts, outcomes, run.reprompt)
    rewards = [[outcome.reward for outcome in group] for group in outcomes]
    group = methods.group_statistics(
        rewards, run.reprompt.threshold, config.objective.scale_advantage
    )
    return data.make_examples(rollouts, shown, group, answers)


class Updated(NamedTuple):
    """What the updates of a step leave."""

    state: TrainState
    row: dict[str, Any]
    """Metrics, as `summarise_updates` has them."""
    divergence: list[np.ndarray] | None
    """Nats at the tokens of each of this host's responses, in the first pass; None where no samples
    are written."""


def make_updates(run: Run, state: TrainState) -> Callable[[TrainState, Examples], Updated]:
    """The updates of a step as a run's configuration states them, one unless it asks for more.

    Each is an update as the paper has it, on a mini-batch of its own: one information, one
    multiplier, one optimizer update and one step of the teacher; the paper's step is one such
    update. What a group says of its responses (advantages, demonstrations) is that of the whole
    group, what responses weigh is that of the mini-batch. Hosts call it together, each with its own
    responses.
    """
    config, mesh = run.config, run.policy.mesh
    optimizer = configured_optimizer(config)
    vocabulary = run.policy.sampling.vocabulary()
    options = fused.Options(config.distillation, config.metrics.estimators, vocabulary)
    train_step = make_train_step(
        run.policy.graphdef,
        optimizer,
        options,
        train_state_shardings(state.student, optimizer, state.teacher),
        objective=methods.make_objective(config.objective),
        teacher_config=config.teacher,
        teacher_graphdef=run.teacher_graphdef,
    )
    score = None
    if config.objective.old_log_probs == "recomputed":
        score = make_score(run.policy.graphdef, options, mesh)
    rate = learning_rate(config.optimizer)

    def update(state: TrainState, examples: Examples) -> Updated:
        before = int(information_state(state.opt_state).count)
        parts = list(_mini_batches(run, int(state.step)))
        if score is not None:
            examples = _recompute(score, state.student, examples, parts, run)
        found, divergence, places = [], {}, []
        gaps = np.full(len(examples.responses), np.nan, np.float32)  # nats, of each response
        for index, rows in enumerate(parts):
            taken = examples.take(rows)
            if config.data.without_context == "drop":
                taken = taken.with_context_only()
            batch = data.pack(taken, config.data, mesh)
            last = () if len(parts) == 1 else (np.int32(index + 1 == len(parts)),)
            placed = sharding.to_global(batch, mesh)
            state, measured = train_step(state, placed, run.policy.frozen, *last)
            per_token = measured.pop("token_divergence")
            per_response = measured.pop("response_information")
            if index < config.data.updates_per_rollout:  # of the first pass
                places.append((rows[batch.rows], per_response))
                if config.metrics.samples_per_step:
                    values = data.to_rows(batch, sharding.to_host(per_token))
                    divergence |= zip(rows.tolist(), values, strict=True)
            found.append(measured)
        for where, per_response in places:  # fetched late: the next update need not wait for it
            gaps[where] = sharding.to_host(per_response)
        row = summarise_updates(jax.device_get(found)) | _by_kind(run, examples, gaps)
        done = int(information_state(state.opt_state).count)
        row["skipped/total"] = int(state.step) * len(parts) - done
        rates = [float(np.asarray(rate(k))) for k in range(before, max(done, before + 1))]
        row["lr"] = _mean(rates)
        told = [divergence[place] for place in sorted(divergence)]
        return Updated(state, row, told or None)

    return update


def summarise_updates(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a step's updates as one row.

    Means over the updates that were done, or over all where none was. `finite` and `skipped` are
    the parts of all of them that were so, `updates` counts those done, and
    `teacher_student_distance` is the last one's. Without an update there is no `multiplier`; of
    several that could be, `multipliers` has each, for a replay.
    """
    every = [{name: float(value) for name, value in each.items()} for each in found]
    done = [each for each in every if not each["skipped"]]
    row: dict[str, Any] = {}
    for name in every[0]:
        over = every if name in ("finite", "skipped") else done or every
        row[name] = _mean([each[name] for each in over])
    if "teacher_student_distance" in row:
        row["teacher_student_distance"] = every[-1]["teacher_student_distance"]
    row["updates"] = len(done)
    if not done:
        del row["multiplier"]  # the state's is that of an update before
    elif len(every) > 1:
        row["multipliers"] = [each["multiplier"] for each in done]
    return row


def _by_kind(run: Run, examples: Examples, information: np.ndarray) -> dict[str, float]:
    """The share of responses whose teacher was shown each kind of context, and the information of
    these where there are any, over all hosts."""
    if examples.kinds is None:
        return {}
    counts = examples.has_context & examples.response_mask.any(axis=1)
    table = np.stack([examples.kinds, counts, information], axis=1).astype(np.float32)
    rows = run.config.data.questions_per_step * run.policy.sampling.num_samples
    kinds, counted, gaps = sharding.gather_rows(table, rows).T
    found = {}
    for kind, name in enumerate(data.KINDS):
        found[f"context/{name}"] = float(np.mean(kinds == kind))
        if kind and (mine := (kinds == kind) & (counted > 0)).any():
            found[f"information/{name}"] = float(gaps[mine].mean())
    return found


def _mean(values: list[float]) -> float:
    """Of one value that value, bit for bit."""
    return sum(values[1:], values[0]) / len(values)


def _mini_batches(run: Run, step: int) -> Iterator[np.ndarray]:
    """This host's rows of every update."""
    config, samples = run.config, run.policy.sampling.num_samples
    first = sharding.host_rows(config.data.questions_per_step).start
    for places in data.mini_batches(config.seed, step, config.data):
        own = places[sharding.host_rows(len(places))] - first
        yield (own[:, None] * samples + np.arange(samples)).reshape(-1)


def _recompute(
    score: Callable[..., Any], student: Any, examples: Examples, parts: list[np.ndarray], run: Run
) -> Examples:
    """The examples with the student's log-probs, mini-batch by mini-batch as they will be trained:
    in the same shapes, and in no more memory."""
    old, mesh = np.zeros(examples.response_mask.shape, np.float32), run.policy.mesh
    for rows in parts[: run.config.data.updates_per_rollout]:
        batch = data.pack(examples.take(rows), run.config.data, mesh)
        placed = sharding.to_global(batch, mesh)
        found = sharding.to_host(score(student, placed, run.policy.frozen))
        for row, values in zip(rows, data.to_rows(batch, found), strict=True):
            old[row][examples.response_mask[row]] = values
    return examples._replace(old_log_probs=old)
