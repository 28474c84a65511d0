"""Evaluations of a run: its sets of held-out questions, the teacher's, and the pre-flight check."""

import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pgpo_jax import sharding
from pgpo_jax.evaluation import (
    Answered,
    Pace,
    Tell,
    answer,
    evaluate,
    held_out,
    question_rewards,
    within_training,
)
from pgpo_jax.logs import Writer
from pgpo_jax.reprompt import resolve_templates, teacher_messages
from pgpo_jax.run.setup import Run
from pgpo_jax.sampler import Policy
from pgpo_jax.state import TrainState
from pgpo_jax.tasks import Question


class Interrupted(Exception):
    """An evaluation was ended by a signal; it is done again from its beginning."""


class Evaluated(NamedTuple):
    """What the sets of held-out questions say of a student."""

    metrics: dict[str, float]
    rewards: dict[str, list[float]]
    """Mean reward of every question, by the label of its set."""
    answered: Answered
    """This host's answers to the questions of the first set."""
    warnings: list[str]
    """What the averages leave out."""


def evaluate_sets(run: Run, params: Any, key: jax.Array, tell: Callable[[str], Tell]) -> Evaluated:
    """Scores a student on every set of held-out questions.

    Args:
      run: Task, policy, what to ask.
      params: The student.
      key: The same at every evaluation, so that the difference is the student's.
      tell: Of a phase's name, who hears how far it is.
    """
    config, metrics, rewards, first, warnings = run.config.evaluation, {}, {}, None, []
    for each in run.held_out:
        label = each.label
        own = jax.random.fold_in(key, zlib.crc32(label.encode()) >> 1) if label else key
        scored, answered = evaluate(
            run.policy,
            params,
            each.task,
            own,
            config,
            run.reprompt.threshold,
            tell(f"evaluation of {label}" if label else "evaluation"),
        )
        first = first or answered
        count, total, _ = each.left_out
        asked = len(held_out(each.task, config))
        scored |= {"questions": float(asked), "left_out": float(count)}
        metrics |= {each.prefix + name: value for name, value in scored.items()}
        rewards[label] = question_rewards(answered, asked)
        if count:
            warnings.append(
                f"{count:,} of {total:,} {each.name} are left out as over-long: averages are over "
                f"{asked:,}"
            )
    assert first is not None, "the run's own set is always there"
    return Evaluated(metrics, rewards, first, warnings)


def evaluate_run(
    run: Run, state: TrainState, key: jax.Array, writer: Writer, stopping: Callable[[], bool]
) -> float:
    """Scores the student on the held-out questions, writes what is found and shows a few answers.

    Nothing is written before all is known, so an evaluation that is interrupted left no trace.

    Args:
      run: Task, policy, what to ask.
      state: Student and teacher.
      key: The same at every evaluation, so that the difference is the student's.
      writer: Takes the metrics, the rewards of every question and the answers shown.
      stopping: Whether to end before the next batch of questions; on all hosts alike.

    Returns:
      avg@k, by which the best student is kept.

    Raises:
      Interrupted: `stopping` said so.
    """

    def tell(phase: str) -> Tell:
        def told(done: int, total: int) -> None:
            writer.progress(phase, done, total)
            if done < total and stopping():
                raise Interrupted

        return told

    config, step, started = run.config.evaluation, int(state.step), time.perf_counter()
    metrics, rewards, answered, warnings = evaluate_sets(run, state.student, key, tell)
    if config.teacher_questions and run.task.demonstration:
        questions = run.task.test[: config.teacher_questions]
        policy = run.policy
        if run.teacher_graphdef is not None:  # another model, without the student's adapters
            policy = policy._replace(graphdef=run.teacher_graphdef, frozen=None)
        asked = _Asked(run, (policy, state.teacher), key, tell("evaluation of the teacher"))
        found = asked.rewards(questions, shown=True)
        metrics["eval/teacher_with_demonstration"] = float(found.mean())
    metrics["time/evaluate"] = time.perf_counter() - started
    if step == 0 and config.preflight_questions and run.task.demonstration:
        model = (run.policy, state.student)
        metrics |= _preflight(_Asked(run, model, key, tell("pre-flight")), writer)
    writer.write(step, metrics, warnings)
    own = rewards.pop("")
    writer.evaluation(step, own, rewards)
    shown = zip(answered.questions, answered.texts, answered.outcomes, strict=True)
    rows = [
        {
            "question": question.messages[-1]["content"],
            "response": texts[0],
            "answer": question.answer,
            "reward": outcomes[0].reward,
        }
        for question, texts, outcomes in list(shown)[: run.config.metrics.samples_shown]
    ]
    writer.table(f"held-out answers at step {step}", rows)
    return metrics[f"eval/avg@{config.num_samples}"]


class _Asked(NamedTuple):
    """A model of a run that is asked some questions, and who hears how far that is."""

    run: Run
    model: tuple[Policy, Any]
    key: jax.Array
    tell: Tell

    def rewards(self, questions: Sequence[Question], *, shown: bool) -> np.ndarray:
        """Rewards `[question, sample]`, with or without a right answer in the prompt."""
        run, (policy, params) = self.run, self.model
        policy = within_training(policy)
        if shown:
            policy = policy.with_limit("reprompt.max_length", run.reprompt.max_length)
            options = policy.prompts.template_options | run.reprompt.template_options
            prompts = dataclasses.replace(policy.prompts, template_options=options)
            policy = policy._replace(prompts=prompts)
        templates, demonstration = resolve_templates(run.reprompt), run.task.demonstration

        def show(question: Question):
            if not shown or demonstration is None:
                return question.messages
            return teacher_messages(question.messages, demonstration(question), "", templates)

        pace = Pace(run.config.evaluation.questions_per_batch, self.tell)
        answered = answer(policy, params, run.task, questions, self.key, show, pace)
        rewards = np.array(
            [[outcome.reward for outcome in group] for group in answered.outcomes], np.float32
        ).reshape(-1, policy.sampling.num_samples)
        return sharding.gather_rows(rewards, len(questions))


def _preflight(student: _Asked, writer: Writer) -> dict[str, float]:
    """Whether the model can use a demonstration: without that its teacher knows no more than it."""
    run = student.run
    questions = run.task.test[: run.config.evaluation.preflight_questions]
    both = [student.rewards(questions, shown=shown) for shown in (False, True)]
    plain, helped = (float(rewards.mean()) for rewards in both)
    share = all(rewards.min() >= 0 and rewards.max() <= 1 for rewards in both)
    form = "{:.1%} right" if share else "a mean reward of {:.3g}"
    with_one = ("{:.1%}" if share else "{:.3g}").format(helped)
    writer.say(
        f"pre-flight: {form.format(plain)} without a demonstration in the prompt, {with_one} with"
    )
    if helped <= plain:
        writer.warn(
            "the model does not profit from a demonstration, so its teacher knows no more than it "
            "does; use a larger model or a warm start"
        )
    return {"preflight/plain": plain, "preflight/with_demonstration": helped}
