"""Evaluations of a run: the held-out questions, the teacher's, and the pre-flight check."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pgpo_jax import sharding
from pgpo_jax.evaluation import (
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


def evaluate_run(run: Run, state: TrainState, key: jax.Array, writer: Writer) -> float:
    """Scores the student on the held-out questions, writes what is found and shows a few answers.

    Args:
      run: Task, policy, what to ask.
      state: Student and teacher.
      key: The same at every evaluation, so that the difference is the student's.
      writer: Takes the metrics, the rewards of every question and the answers shown.

    Returns:
      avg@k, by which the best student is kept.
    """
    config, step, started = run.config.evaluation, int(state.step), time.perf_counter()
    threshold = run.reprompt.threshold
    metrics, answered = evaluate(run.policy, state.student, run.task, key, config, threshold)
    if config.teacher_questions and run.task.demonstration:
        questions = run.task.test[: config.teacher_questions]
        policy = run.policy
        if run.teacher_graphdef is not None:  # another model, without the student's adapters
            policy = policy._replace(graphdef=run.teacher_graphdef, frozen=None)
        accuracy = _accuracy(run, (policy, state.teacher), key, questions, shown=True)
        metrics["eval/teacher_with_demonstration"] = accuracy
    metrics["time/evaluate"] = time.perf_counter() - started
    if step == 0 and config.preflight_questions and run.task.demonstration:
        metrics |= _preflight(run, state.student, key, writer)
    writer.write(step, metrics)
    asked = len(held_out(run.task, config))
    writer.evaluation(step, question_rewards(answered, asked))
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


def _accuracy(
    run: Run,
    model: tuple[Policy, Any],
    key: jax.Array,
    questions: Sequence[Question],
    *,
    shown: bool,
) -> float:
    """Mean reward on some questions, with or without a right answer in the prompt."""
    policy, params = within_training(model[0]), model[1]
    if shown:
        policy = policy.with_limit("reprompt.max_length", run.reprompt.max_length)
    templates, demonstration = resolve_templates(run.reprompt), run.task.demonstration

    def show(question: Question):
        if not shown or demonstration is None:
            return question.messages
        return teacher_messages(question.messages, demonstration(question), "", templates)

    batch = run.config.evaluation.questions_per_batch
    answered = answer(policy, params, run.task, questions, key, show, batch)
    rewards = np.array(
        [[outcome.reward for outcome in group] for group in answered.outcomes], np.float32
    ).reshape(-1, policy.sampling.num_samples)
    return float(sharding.gather_rows(rewards, len(questions)).mean())


def _preflight(run: Run, student: Any, key: jax.Array, writer: Writer) -> dict[str, float]:
    """Whether the model can use a demonstration: without that its teacher knows no more than it."""
    questions = run.task.test[: run.config.evaluation.preflight_questions]
    model = (run.policy, student)
    plain = _accuracy(run, model, key, questions, shown=False)
    helped = _accuracy(run, model, key, questions, shown=True)
    writer.say(
        f"pre-flight: {plain:.1%} right without a demonstration in the prompt, {helped:.1%} with"
    )
    if helped <= plain:
        writer.warn(
            "the model does not profit from a demonstration, so its teacher knows no more than it "
            "does; use a larger model or a warm start"
        )
    return {"preflight/plain": plain, "preflight/with_demonstration": helped}
