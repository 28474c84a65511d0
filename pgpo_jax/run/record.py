"""Records of a step: the metrics of its responses, and the responses themselves."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pgpo_jax import sharding
from pgpo_jax.data import Rollouts, TeacherPrompts
from pgpo_jax.run.setup import Run
from pgpo_jax.tasks import Outcome, Question, given_answer


class Clock:
    """Seconds of the phases of a step."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Ends a phase, which began with the end of the one before."""
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now


def summarise(
    run: Run,
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
    shown: TeacherPrompts,
    clock: Clock,
) -> dict[str, float]:
    """Metrics of rewards, groups, lengths and times, over all hosts."""
    flat = [outcome for group in outcomes for outcome in group]
    lengths = rollouts.response_mask.sum(-1).reshape(-1)
    last = np.take_along_axis(rollouts.responses.reshape(len(lengths), -1), lengths[:, None] - 1, 1)
    columns = {
        "reward": [outcome.reward for outcome in flat],
        "success": [outcome.reward >= run.reprompt.threshold for outcome in flat],
        "well_formed": [outcome.well_formed for outcome in flat],
        "failed": [outcome.failed for outcome in flat],
        "context": shown.has_context,
        "length": lengths,
        "cut": ~np.isin(last[:, 0], run.policy.sampling.end_tokens),
        "first": _equals_first(rollouts.texts),
    }
    # Not a number where a function did not judge a response.
    for name in run.task.rewards:
        columns[f"reward/{name}"] = [dict(outcome.parts).get(name, math.nan) for outcome in flat]
    samples = run.policy.sampling.num_samples
    rows = run.config.data.questions_per_step * samples
    table = np.stack([np.asarray(column, np.float32) for column in columns.values()], axis=1)
    every = dict(zip(columns, sharding.gather_rows(table, rows).T, strict=True))
    means = {name: float(values.mean()) for name, values in every.items()}
    shortened = np.array([[shown.shortened]], np.float32)
    tokens = float(every["length"].sum())
    return {
        "reward/mean": means["reward"],
        # The mean of equal fractions rounds; equal rewards have a deviation of 0.
        "reward/std": float(every["reward"].std()) if np.ptp(every["reward"]) else 0.0,
        "reward/failed": means["failed"],
        **_reward_means(every, run.task.rewards),
        "format": means["well_formed"],
        "success_fraction": means["success"],
        "success_group_fraction": float(every["success"].reshape(-1, samples).any(-1).mean()),
        "identical_group_fraction": float(every["first"].reshape(-1, samples).all(-1).mean()),
        "context_fraction": means["context"],
        "data/left_out": float(run.left_out.count),
        "context_shortened": float(sharding.gather_rows(shortened, jax.process_count()).sum()),
        "response_length/mean": means["length"],
        "response_length/max": float(every["length"].max()),
        "response_length/clip_fraction": means["cut"],
        **{f"time/{phase}": seconds for phase, seconds in clock.seconds.items()},
        "tokens_per_second/rollout": tokens / clock.seconds["rollout"],
        "tokens_per_second/train": tokens * run.config.data.passes / clock.seconds["train"],
    }


def _reward_means(every: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """Of each reward function over the responses that it judged, without those that judged none."""
    judged = {
        f"reward/{name}": values[np.isfinite(values)]
        for name in names
        for values in [every[f"reward/{name}"]]
    }
    return {name: float(values.mean()) for name, values in judged.items() if len(values)}


def _equals_first(texts: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each response gives the answer of its group's first one, question-major."""
    answers = [[given_answer(text) for text in group] for group in texts]
    return [answer == group[0] for group in answers for answer in group]


def records(
    questions: Sequence[Question],
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
    shown: TeacherPrompts,
) -> list[dict[str, Any]]:
    """This host's responses for samples.jsonl, with what the teacher saw."""
    samples = len(rollouts.texts[0])
    return [
        {
            "key": question.key,
            "prompt": question.messages[-1]["content"],
            "response": rollouts.texts[i][j],
            "answer": question.answer,
            "reward": outcomes[i][j].reward,
            "feedback": outcomes[i][j].feedback,
            **({"rewards": dict(outcomes[i][j].parts)} if outcomes[i][j].parts else {}),
            "has_context": bool(shown.has_context[i * samples + j]),
            "teacher_prompt": shown.texts[i * samples + j],
        }
        for i, question in enumerate(questions)
        for j in range(samples)
    ]


def token_columns(
    tokenizer: Any, rollouts: Rollouts, divergence: Sequence[np.ndarray] | None, row: int
) -> dict[str, Any]:
    """The texts of a response's tokens, and the divergence at each in nats."""
    mask = rollouts.response_mask.reshape(-1, rollouts.response_mask.shape[-1])[row]
    tokens, places = np.unique(
        rollouts.responses.reshape(-1, mask.size)[row][mask], return_inverse=True
    )
    texts = tokenizer.batch_decode(tokens[:, None].tolist(), clean_up_tokenization_spaces=False)
    values = [] if divergence is None else divergence[row].tolist()
    return {
        "tokens": [texts[place] for place in places],
        "divergence": [float(f"{value:.3g}") if math.isfinite(value) else None for value in values],
    }
