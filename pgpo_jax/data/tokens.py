"""Prompt text and prompt tokens: chat template, tokenizer, padding, padded sizes.

Everything here is numpy on the host. Lengths are rounded up to a few sizes (`bucket`), so that the
step compiles for a handful of shapes and no more.
"""

from __future__ import annotations

import datetime
import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from pgpo_jax.errors import InputError

Host = np.ndarray
CLOCK = "strftime_now"
"""The chat templates' clock: as an option it is a date, at which the clock stands."""
_CUT = "\udfff"
"""Where a text is cut before it is tokenized: half of a surrogate pair is no character, so no text
has it of its own."""


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
    *,
    generation_prompt: bool = True,
) -> str:
    """The prompt text of one conversation, up to where the response begins.

    With a chat template: the template and its generation prompt (left out on request). Without one,
    a conversation of one user message is its plain text (a base model completes it); anything else
    has no meaning. Where the template refuses a system message, it becomes the beginning of the
    user's, as Gemma's templates have it; that is said once.

    Raises:
      InputError: a conversation that the tokenizer's chat template refuses, or several messages
        for a tokenizer without a chat template.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            return _templated(tokenizer, messages, template_options, generation_prompt)
        except (ImportError, InputError):
            raise
        except Exception as error:  # templates raise whatever jinja or their author chose
            try:
                text = _templated(tokenizer, _folded(messages), template_options, generation_prompt)
            except Exception:
                raise InputError(
                    f"model.path: the chat template refuses the conversation {_snippet(messages)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            _say_folded(f"{type(error).__name__}: {error}")
            return text
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    roles = ", ".join(message["role"] for message in messages)
    raise InputError(
        f"model.path: the tokenizer has no chat template, but the prompt is a conversation "
        f"({roles}); use an instruct model, or plain text prompts without a system message"
    )


def _templated(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    template_options: Mapping[str, Any] | None,
    generation_prompt: bool,
) -> str:
    """What the chat template makes of a conversation."""
    options = dict(template_options or {})
    if CLOCK in options:
        template = _template(tokenizer, options.get("chat_template"))
        options["chat_template"] = _stop_clock(template, str(options.pop(CLOCK)))
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=generation_prompt,
        **options,
    )
    return str(text)


def _folded(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The conversation with its system message at the beginning of the user's first.

    Raises:
      ValueError: It has none, or no user message after it.
    """
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        raise ValueError("a conversation without a system message before a user's")
    system, user, *others = messages
    content = f"{system['content']}\n\n{user['content']}"
    return [{**user, "content": content}, *others]


@functools.lru_cache(maxsize=8)
def _say_folded(cause: str) -> None:
    """Once for every cause."""
    warnings.warn(
        f"the chat template refuses a system message ({cause}); it stands at the beginning of the "
        "user's message instead",
        stacklevel=3,
    )


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of rendered prompts, each ready to be continued.

    A chat template writes its special tokens itself. Without one the tokenizer's opening tokens
    stand before the text (unless it begins with them); its closing ones, such as an end token,
    never stand after it: a response begins there. What `letters` marked is read as letters.
    """
    if not texts:
        return []
    parts = [text.split(_CUT) for text in texts]
    pieces = iter(
        tokenizer([piece for part in parts for piece in part], add_special_tokens=False)[
            "input_ids"
        ]
    )
    rows = [[token for _ in part for token in next(pieces)] for part in parts]
    before = [] if getattr(tokenizer, "chat_template", None) else opening(tokenizer)
    return [row if not before or row[: len(before)] == before else [*before, *row] for row in rows]


def letters(tokenizer: Any, text: str) -> str:
    """`text`, marked so that `tokenize` reads the names of special tokens in it as letters.

    What a model or a verifier wrote is not the template's: with `<|im_end|>` in it, it would end
    its turn and begin another one. Such a name is cut in two, so that neither part is the token.
    """
    names = _special_names(tokenizer)
    return names.sub(rf"\1{_CUT}", text) if names else text


def unmarked(text: str) -> str:
    """`text` without the marks of `letters`, for people."""
    return text.replace(_CUT, "")


def names_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the name of a special token stands in `text`."""
    names = _special_names(tokenizer)
    return bool(names and names.search(text))


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer writes before a text."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []  # it adds none that can be told from the text


def _special_names(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds the first character of every special token's name; of one alone nothing can be cut."""
    return _names_among(tokenizer, len(tokenizer))


# Asked for every text; a tokenizer of 6,000 added tokens takes 30 ms to list them.
@functools.lru_cache(maxsize=8)
def _names_among(tokenizer: Any, size: int) -> re.Pattern[str] | None:
    """Of a tokenizer of that size: one that has been given tokens is asked again."""
    del size
    tokens = tokenizer.added_tokens_decoder.values()
    names = sorted({str(token) for token in tokens if token.special and len(str(token)) > 1})
    if not names:
        return None
    return re.compile(rf"(?=(?:{'|'.join(map(re.escape, names))}))(.)", re.DOTALL)


def _template(tokenizer: Any, name: str | None) -> str:
    """The chat template; `name` chooses one of several, or is one."""
    try:
        return tokenizer.get_chat_template(name)
    except ValueError as error:
        raise InputError(f"model.path: got no chat template: {error}") from error


@functools.lru_cache(maxsize=8)
def _stop_clock(template: str, date: str) -> str:
    """The chat template with the date in the place of every look at the clock."""
    try:
        day = datetime.date.fromisoformat(date)
    except ValueError as error:
        raise InputError(
            f"data.template_options: got {CLOCK} {date!r}; must be a date, as 2026-01-31"
        ) from error
    # The renderer takes no functions from its caller, so the template itself is changed.
    call = re.compile(rf"\b{CLOCK}\s*\(\s*(['\"])(.*?)\1\s*\)")
    template = call.sub(lambda found: repr(day.strftime(found[2])), template)
    asked = re.compile(rf"\{{#.*?#\}}|\b{CLOCK}\s+is\s+(not\s+)?defined\b", re.DOTALL)
    if re.search(rf"\b{CLOCK}\b", asked.sub("", template)):
        raise InputError(
            "model.path: the chat template reads the clock in a form that cannot be stopped at a "
            "date, so a resumed run would ask other prompts; state the date in the template"
        )
    return template


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
      conversations: one list of `{"role", "content"}` messages per prompt.
      max_length: the limit in tokens.
      template_options: options of the chat template, such as `{"enable_thinking": False}`.
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


def lengths(
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    template_options: Mapping[str, Any] | None = None,
) -> Int[Host, " prompt"]:
    """Tokens of each prompt as `encode` makes it, however many there are, without keeping them."""
    found = []
    for start in range(0, len(conversations), 1000):  # the tokens of all may not fit the memory
        part = conversations[start : start + 1000]
        texts = [render(tokenizer, messages, template_options) for messages in part]
        found += map(len, tokenize(tokenizer, texts))
    return np.array(found, int)


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
