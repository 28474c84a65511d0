"""The records that cross stages; numpy on the host, only `Batch` enters `jit`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgpo_jax.errors import require
from pgpo_jax.methods import Judged

Host = np.ndarray
Either = Array | np.ndarray


class Rollouts(NamedTuple):
    """What the student answered: ``num_samples`` responses (a group) for each question."""

    prompts: Int[Host, "question prompt_time"]
    """Prompt tokens, left-padded."""
    prompt_mask: Bool[Host, "question prompt_time"]
    """True at real prompt tokens."""
    responses: Int[Host, "question sample time"]
    """Sampled tokens, right-padded; the end token is among them."""
    response_mask: Bool[Host, "question sample time"]
    """True at sampled tokens, the end token included."""
    log_probs: Float[Host, "question sample time"]
    """Nats, of the distribution that was really sampled from."""
    texts: list[list[str]]
    """The decoded responses, without special tokens."""


class Contexts(NamedTuple):
    """What the teacher sees before each response; rows are question-major, ``Q * G`` of them."""

    prompts: Int[Host, "row teacher_time"]
    """Teacher prompt tokens, left-padded."""
    prompt_mask: Bool[Host, "row teacher_time"]
    """True at real teacher prompt tokens."""
    has_context: Bool[Host, " row"]
    """True where the response got a demonstration or feedback: only these rows train."""
    texts: list[str]
    """The teacher prompts as text, for the samples on disk."""
    shortened: int
    """How many teacher prompts needed a shorter demonstration (or feedback) to fit."""


class Evidence(NamedTuple):
    """Prompts that show a final answer, for methods that weigh tokens by it; one row a response."""

    prompts: Int[Either, "row right_time"]
    """The prompt with the right final answer, left-padded."""
    prompt_mask: Bool[Either, "row right_time"]
    """True at its real tokens."""
    wrong_prompts: Int[Either, "row wrong_time"]
    """The prompt with a wrong response's final answer; the plain prompt where there is none."""
    wrong_prompt_mask: Bool[Either, "row wrong_time"]
    """True at its real tokens."""
    has_wrong: Bool[Either, " row"]
    """Whether the group has a wrong response to show."""


class Batch(NamedTuple):
    """One batch for the training step: ``N = Q * G`` rows, question-major."""

    prompts: Int[Either, "row prompt_time"]
    """The student's prompt tokens, left-padded."""
    prompt_mask: Bool[Either, "row prompt_time"]
    """True at real prompt tokens."""
    teacher_prompts: Int[Either, "row teacher_time"]
    """The teacher's prompt tokens, left-padded; of another length than the student's."""
    teacher_prompt_mask: Bool[Either, "row teacher_time"]
    """True at real teacher prompt tokens."""
    responses: Int[Either, "row time"]
    """Sampled tokens, right-padded."""
    response_mask: Bool[Either, "row time"]
    """True at sampled tokens, the end token included."""
    has_context: Bool[Either, " row"]
    """True where the teacher got a demonstration or feedback."""
    sampler_log_probs: Float[Either, "row time"]
    """Log-probabilities of the sampled tokens as the sampler saw them, nats."""
    judged: Judged | None = None
    """What the rewards say, for objectives that read it."""
    evidence: Evidence | None = None
    """Prompts with final answers in them, for objectives that need them."""


@dataclass(frozen=True)
class DataConfig:
    """How questions become batches (config section ``data``)."""

    questions_per_step: int = 32
    """Questions in a step; each gets `sampling.num_samples` responses."""

    micro_batches: int = 1
    """Parts that a step's rows are worked through in, to save memory; changes no number."""

    packing: Literal["auto", "always", "never"] = "auto"
    """Whether several prompts with their responses share a row of the update (`packing.py`).

    Padded, every row is as wide as the batch's longest prompt and longest response. `auto` packs a
    batch where that saves a fifth of the columns: less is not worth the further shapes, each of
    which is a compilation. It goes by the batch alone, so a resumed run decides alike. On a GPU
    `auto` does not pack, for cudnn's attention cannot keep the sequences of a row apart; `always`
    takes XLA's there. Only the order of sums differs; micro-batches may become fewer.
    """

    max_prompt_length: int = 2048
    """Longest question prompt in tokens; a longer one is an error, never cut."""

    template_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the tokenizer's chat template, e.g. `{enable_thinking: false}` for Qwen3."""

    def __post_init__(self) -> None:
        require(
            "data",
            self,
            questions_per_step=(self.questions_per_step >= 1, "at least 1"),
            micro_batches=(self.micro_batches >= 1, "at least 1"),
            max_prompt_length=(self.max_prompt_length >= 1, "at least 1"),
        )


def make_batch(
    rollouts: Rollouts,
    contexts: Contexts,
    judged: Judged | None = None,
    evidence: Evidence | None = None,
) -> Batch:
    """Joins rollouts and teacher contexts into rows; a prompt is repeated for its group.

    Args:
        rollouts: the responses.
        contexts: what the teacher sees before each.
        judged: what the rewards say (`objectives.judge`).
        evidence: for objectives that need it.

    Raises:
        ValueError: if the contexts are not one row per response.
    """
    questions, samples, time = rollouts.responses.shape
    rows = questions * samples
    if len(contexts.has_context) != rows:
        raise ValueError(
            f"contexts: got {len(contexts.has_context)} rows, must be {questions} questions x "
            f"{samples} samples = {rows}"
        )
    return Batch(
        prompts=np.repeat(rollouts.prompts, samples, axis=0),
        prompt_mask=np.repeat(rollouts.prompt_mask, samples, axis=0),
        teacher_prompts=contexts.prompts,
        teacher_prompt_mask=contexts.prompt_mask,
        responses=np.asarray(rollouts.responses).reshape(rows, time),
        response_mask=np.asarray(rollouts.response_mask).reshape(rows, time),
        has_context=contexts.has_context,
        sampler_log_probs=np.asarray(rollouts.log_probs).reshape(rows, time),
        judged=judged,
        evidence=evidence,
    )
