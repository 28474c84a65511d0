"""What a step leaves in the files of a run: metrics of its responses, and the responses."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pgpo_jax import sharding
from pgpo_jax.config import Config
from pgpo_jax.data import Contexts, Rollouts
from pgpo_jax.run.setup import Run
from pgpo_jax.tasks import Outcome


def summarise(
    config: Config,
    run: Run,
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
    contexts: Contexts,
) -> dict[str, Any]:
    """Metrics of rewards, groups and lengths, over all hosts."""
    flat = [outcome for group in outcomes for outcome in group]
    lengths = rollouts.response_mask.sum(-1).reshape(-1)
    last = np.take_along_axis(rollouts.responses.reshape(len(lengths), -1), lengths[:, None] - 1, 1)
    cut = ~np.isin(last[:, 0], run.sampling.end_tokens)
    columns = np.array(
        [
            (
                outcome.reward,
                outcome.reward >= config.reprompt.threshold,
                outcome.well_formed,
                outcome.failed,
                has_context,
                length,
                is_cut,
            )
            for outcome, has_context, length, is_cut in zip(
                flat, contexts.has_context, lengths, cut, strict=True
            )
        ],
        np.float32,
    )
    samples = config.sampling.num_samples
    total = config.data.questions_per_step * samples
    reward, success, well_formed, failed, context, length, clipped = sharding.gather_rows(
        columns, total
    ).T
    return {
        "reward/mean": float(reward.mean()),
        "reward/std": float(reward.std()),
        "reward/failed": float(failed.mean()),
        "format": float(well_formed.mean()),
        "success_group_fraction": float(success.reshape(-1, samples).any(-1).mean()),
        "context_fraction": float(context.mean()),
        "context_shortened": float(contexts.shortened),
        "response_length/mean": float(length.mean()),
        "response_length/max": float(length.max()),
        "response_length/clip_fraction": float(clipped.mean()),
        "tokens": float(length.sum()),
    }


def records(run, questions, rollouts, outcomes, contexts) -> list[dict[str, Any]]:
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
            "has_context": bool(contexts.has_context[i * samples + j]),
            "teacher_prompt": contexts.texts[i * samples + j],
        }
        for i, question in enumerate(questions)
        for j in range(samples)
    ]


def token_columns(
    run: Run, rollouts: Rollouts, divergence: Sequence[np.ndarray] | None, row: int
) -> dict[str, Any]:
    """The texts of a response's tokens, and the divergence at each in nats."""
    mask = rollouts.response_mask.reshape(-1, rollouts.response_mask.shape[-1])[row]
    tokens, places = np.unique(
        rollouts.responses.reshape(-1, mask.size)[row][mask], return_inverse=True
    )
    texts = run.tokenizer.batch_decode(tokens[:, None].tolist(), clean_up_tokenization_spaces=False)
    values = [] if divergence is None else divergence[row].tolist()
    return {
        "tokens": [texts[place] for place in places],
        "divergence": [float(f"{value:.3g}") if math.isfinite(value) else None for value in values],
    }
