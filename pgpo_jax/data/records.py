"""The records that cross stages, numpy on the host, and the section `data`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from pgpo_jax.errors import require
from pgpo_jax.objective import GroupStatistics

Host = np.ndarray
KINDS = ("none", "demonstration", "feedback", "both")
"""What a teacher's prompt shows beside the question."""


class Rollouts(NamedTuple):
    """What the student answered: `num_samples` responses (a group) for each question."""

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
    """The decoded responses, without the tokens that bound them."""


class TeacherPrompts(NamedTuple):
    """What the teacher sees before each response; rows are question-major, `Q * G` of them."""

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
    kinds: Int[Host, " row"] | None = None
    """What each prompt shows, as a place in `KINDS`; a control that shows nothing keeps what it
    would have shown. None: nobody asks."""


class AnswerPrompts(NamedTuple):
    """Prompts that show a final answer, for methods that weigh tokens by it; one row a response."""

    right: Int[Host, "row right_time"]
    """The prompt with the right final answer, left-padded."""
    right_mask: Bool[Host, "row right_time"]
    """True at its real tokens."""
    wrong: Int[Host, "row wrong_time"]
    """The prompt with a wrong response's final answer; the plain prompt where there is none."""
    wrong_mask: Bool[Host, "row wrong_time"]
    """True at its real tokens."""
    has_wrong: Bool[Host, " row"]
    """Whether the group has a wrong response to show."""


class Examples(NamedTuple):
    """A host's responses and what is read before them: `N = Q * G` rows, question-major."""

    prompts: dict[str, tuple[np.ndarray, np.ndarray]]
    """Tokens `[row, prompt_time]`, left-padded, and their mask, by view: what the `student` reads,
    what the `teacher` reads, and whatever else comes before the same responses."""
    responses: Int[Host, "row time"]
    """Sampled tokens, right-padded."""
    response_mask: Bool[Host, "row time"]
    """True at sampled tokens, the end token included."""
    sampler_log_probs: Float[Host, "row time"]
    """Log-probabilities of the sampled tokens as the sampler saw them, nats."""
    has_context: Bool[Host, " row"]
    """True where the teacher got a demonstration or feedback."""
    group: GroupStatistics | None = None
    """What the rewards say, for objectives that read it."""
    has_wrong: Bool[Host, " row"] | None = None
    """As in `AnswerPrompts`."""
    old_log_probs: Float[Host, "row time"] | None = None
    """Log-probabilities of the sampled tokens under the student before the step's first update,
    nats; None: the sampler's stand for them."""
    kinds: Int[Host, " row"] | None = None
    """As in `TeacherPrompts`."""

    def take(self, rows: Int[Host, " taken"]) -> Examples:
        """Some of the rows, as wide as all."""
        return jax.tree.map(lambda array: array[rows], self)

    def with_context_only(self) -> Examples:
        """The examples with every response empty whose teacher got nothing: a row without tokens
        takes no room where rows are packed."""
        kept = self.response_mask & self.has_context[:, None]
        return self._replace(response_mask=kept)


@dataclass(frozen=True)
class DataConfig:
    """How questions become batches (config section `data`)."""

    questions_per_step: int = 32
    """Questions in a step; each gets `sampling.num_samples` responses."""

    updates_per_rollout: int = 1
    """Mini-batches of whole questions, in a drawn order, that a step's responses are dealt into:
    each is an update of its own, with one information, one multiplier and one step of the teacher.
    The paper's is 1. What counts updates (learning rate, `optimizer.alpha_steps`,
    `teacher.period`) counts each; what counts steps (`steps`, evaluations, checkpoints,
    coefficients of `objective`, alarms) does not."""

    passes: int = 1
    """Times that a step's updates go over its responses, each time in a newly drawn order; a step
    is updates_per_rollout x passes updates."""

    micro_batches: int = 1
    """Parts that an update's rows are worked through in, to save memory; changes no number."""

    packing: Literal["auto", "always", "never"] = "auto"
    """Whether several prompts with their responses share a row of the update (`packing.py`).

    With one sequence a row, every row is as wide as the batch's longest. `auto` packs a batch where
    that saves a fifth of the columns: less is not worth the further shapes, each of which is a
    compilation. It goes by the batch alone, so a resumed run decides alike. On a GPU `auto` does
    not pack, for cudnn's attention cannot keep the sequences of a row apart; `always` takes XLA's
    there. Only the order of sums differs; micro-batches may become fewer.
    """

    without_context: Literal["keep", "drop"] = "keep"
    """Responses whose teacher got no context, from which self-distillation learns nothing: `keep`
    them in the update, for what is measured of every response (`sampler_mismatch`,
    `importance_weight`); or `drop` them, which saves their part of an update's time where rows are
    packed, and then these are means over the others and their tokens have no divergence in
    `samples.jsonl`. Nothing else changes but the order of sums."""

    max_prompt_length: int = 2048
    """Longest question prompt in tokens; a longer one is never cut, see `over_long`."""

    over_long: Literal["drop", "error"] = "drop"
    """What becomes of questions and worked examples whose prompts are over the limit: `drop` leaves
    them out, says how many of how many and counts them (`data/left_out`, `eval/left_out`); `error`
    ends the run before it begins. Questions that are made when they are asked for (`addition`) are
    an error either way."""

    template_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the tokenizer's chat template, e.g. `{enable_thinking: false}` for Qwen3."""

    def __post_init__(self) -> None:
        require(
            "data",
            self,
            questions_per_step=(self.questions_per_step >= 1, "at least 1"),
            updates_per_rollout=(
                self.updates_per_rollout >= 1
                and self.questions_per_step % self.updates_per_rollout == 0,
                f"at least 1, and divide data.questions_per_step = {self.questions_per_step}",
            ),
            passes=(self.passes >= 1, "at least 1"),
            micro_batches=(self.micro_batches >= 1, "at least 1"),
            without_context=(self.without_context in ("keep", "drop"), "keep or drop"),
            max_prompt_length=(self.max_prompt_length >= 1, "at least 1"),
        )

    @property
    def updates(self) -> int:
        """Updates in a step."""
        return self.updates_per_rollout * self.passes


def make_examples(
    rollouts: Rollouts,
    teacher_prompts: TeacherPrompts,
    group: GroupStatistics | None = None,
    answer_prompts: AnswerPrompts | None = None,
) -> Examples:
    """Joins rollouts and teacher prompts into rows; a prompt is repeated for its group.

    Args:
      rollouts: the responses.
      teacher_prompts: what the teacher sees before each.
      group: what the rewards say (`methods.group_statistics`).
      answer_prompts: for objectives that need them.

    Raises:
      ValueError: if the teacher prompts are not one row per response.
    """
    questions, samples, time = rollouts.responses.shape
    rows = questions * samples
    if len(teacher_prompts.has_context) != rows:
        raise ValueError(
            f"teacher_prompts: got {len(teacher_prompts.has_context)} rows, must be {questions} "
            f"questions x {samples} samples = {rows}"
        )
    prompts = {
        "student": (
            np.repeat(rollouts.prompts, samples, axis=0),
            np.repeat(rollouts.prompt_mask, samples, axis=0),
        ),
        "teacher": (teacher_prompts.prompts, teacher_prompts.prompt_mask),
    }
    if answer_prompts is not None:
        prompts["right"] = answer_prompts.right, answer_prompts.right_mask
        prompts["wrong"] = answer_prompts.wrong, answer_prompts.wrong_mask
    return Examples(
        prompts=prompts,
        responses=np.asarray(rollouts.responses).reshape(rows, time),
        response_mask=np.asarray(rollouts.response_mask).reshape(rows, time),
        sampler_log_probs=np.asarray(rollouts.log_probs).reshape(rows, time),
        has_context=teacher_prompts.has_context,
        group=group,
        has_wrong=None if answer_prompts is None else answer_prompts.has_wrong,
        kinds=teacher_prompts.kinds,
    )
