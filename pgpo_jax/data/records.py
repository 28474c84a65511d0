"""The records that cross stages, and how text becomes padded tokens in a replayable order.

Everything here is numpy on the host; only :class:`Batch` enters ``jit``. Lengths are rounded up to
a few sizes (:func:`bucket`), so that the step compiles for a handful of shapes and no more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgpo_jax.errors import InputError, require
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


def bucket(length: int, maximum: int, least: int = 16) -> int:
    """The padded size for `length` tokens: 16, 24, 32, 48, 64, 96, ... and never above `maximum`.

    Powers of two and their three-quarters waste at most a third and leave two sizes per octave, so
    a run compiles a function a few times and not once per step. The sizes begin at `least`, a power
    of two.

    Raises:
        ValueError: if `length` is longer than `maximum`.
    """
    if length > maximum:
        raise ValueError(f"length: got {length} tokens, must be at most {maximum}")
    power = least
    while power < length:
        power *= 2
    size = power * 3 // 4 if power > least and length <= power * 3 // 4 else power
    return min(size, maximum)


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of one conversation, up to where the response begins.

    With a chat template: the template and its generation prompt. Without one, a conversation of
    one user message is its plain text (a base model completes it); anything else has no meaning.

    Raises:
        InputError: a conversation that the tokenizer's chat template refuses, or several messages
            for a tokenizer without a chat template.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                **(template_options or {}),
            )
        except ImportError:
            raise
        except Exception as error:  # templates raise whatever jinja or their author chose
            raise InputError(
                f"model.path: the chat template refuses the conversation {_snippet(messages)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return str(text)
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    roles = ", ".join(message["role"] for message in messages)
    raise InputError(
        f"model.path: the tokenizer has no chat template, but the prompt is a conversation "
        f"({roles}); use an instruct model, or plain text prompts without a system message"
    )


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of rendered prompts. A chat template writes its special tokens itself."""
    if not texts:
        return []
    special = not getattr(tokenizer, "chat_template", None)
    return [list(row) for row in tokenizer(list(texts), add_special_tokens=special)["input_ids"]]


def encode(
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    max_length: int,
    template_options: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    field: str = "data.max_prompt_length",
) -> list[list[int]]:
    """Chat-templates and tokenizes prompts, each up to where its response begins.

    Args:
        tokenizer: a Hugging Face tokenizer.
        conversations: one list of ``{"role", "content"}`` messages per prompt.
        max_length: the limit in tokens.
        template_options: options of the chat template, such as ``{"enable_thinking": False}``.
        names: what to call each question in an error (its key).
        field: the setting that `max_length` comes from, for the error.

    Returns:
        One list of token ids per conversation, in order.

    Raises:
        InputError: naming the question, its tokens and the limit, if a prompt is over-long.
    """
    texts = [render(tokenizer, messages, template_options) for messages in conversations]
    rows = tokenize(tokenizer, texts)
    for index, row in enumerate(rows):
        if len(row) > max_length:
            name = f"{names[index]!r} " if names else ""
            raise InputError(
                f"{field}: question {name}({_snippet(conversations[index])}) has "
                f"{len(row)} tokens, must be at most {max_length}; raise the limit or drop it"
            )
        if not row:
            name = names[index] if names else index
            raise InputError(f"task.path: question {name!r} has no tokens, a prompt must have one")
    return rows


def _snippet(messages: Sequence[Mapping[str, str]]) -> str:
    text = " ".join(str(messages[-1].get("content", "")).split()) if messages else ""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def left_pad(
    rows: Sequence[Sequence[int]], width: int, pad: int = 0
) -> tuple[Int[Host, "row time"], Bool[Host, "row time"]]:
    """Right-aligns token rows in `width` columns; returns int32 tokens and their mask."""
    tokens = np.full((len(rows), width), pad, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(f"width: got {width}, must hold row {index} of {len(row)} tokens")
        start = width - len(row)
        tokens[index, start:] = row
        mask[index, start:] = True
    return tokens, mask


def right_pad(
    rows: Sequence[Sequence[int]], width: int, pad: int = 0
) -> tuple[Int[Host, "row time"], Bool[Host, "row time"]]:
    """Left-aligns token rows in `width` columns; returns int32 tokens and their mask."""
    tokens, mask = left_pad([row[::-1] for row in rows], width, pad)
    return np.ascontiguousarray(tokens[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])


def widen_left(
    tokens: Int[Host, "row time"], mask: Bool[Host, "row time"], width: int
) -> tuple[Int[Host, "row wide"], Bool[Host, "row wide"]]:
    """Adds left padding up to `width` columns (hosts must agree on one width)."""
    extra = ((0, 0), (width - tokens.shape[1], 0))
    return np.pad(tokens, extra), np.pad(mask, extra)


@functools.lru_cache(maxsize=2)  # a step needs one epoch's order; the next epoch's replaces it
def _epoch_order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)


def batch_indices(
    seed: int, step: int, total: int, questions_per_step: int
) -> Int[Host, " question"]:
    """Which questions step `step` (from 0) uses: a pure function, so any step can be replayed.

    Each epoch is a fresh permutation of all questions; its last partial batch is dropped.

    Raises:
        InputError: if there are fewer questions than one step needs.
    """
    steps_per_epoch = total // questions_per_step
    if steps_per_epoch == 0:
        raise InputError(
            f"data.questions_per_step: got {questions_per_step}, must be at most the number of "
            f"training questions, {total}"
        )
    epoch, position = divmod(step, steps_per_epoch)
    start = position * questions_per_step
    return _epoch_order(seed, epoch, total)[start : start + questions_per_step].copy()


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
