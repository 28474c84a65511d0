"""Rows of a data set and their columns: what is checked of each, and how refusals are counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pgpo_jax.errors import InputError

Rows = list[tuple[str, dict[str, Any]]]  # (where it stands, for errors and keys; the row)
Read = TypeVar("Read")
SHOWN = 3
"""Refused rows that are shown; the others are counted."""


MEANT = {
    "prompt": (
        "question", "messages", "problem", "instruction", "query", "input", "conversations", "text",
    ),
    "answer": (
        "target", "label", "solution", "output", "response", "final_answer", "ground_truth",
        "answerKey", "gold",
    ),
}  # fmt: skip
"""What data sets call a column that is lacking, for a hint: which one is meant is for the user to
say."""


class RowError(ValueError):
    """Why a row cannot be used: what was got and the rule; whoever reads the rows says where."""


def read_each(
    field: str, found: Sequence[tuple[str, Any]], read: Callable[[str, Any], Read]
) -> list[Read]:
    """`read(where, row)` of every row.

    Raises:
      InputError: with the number of rows that raised a `RowError`, and the first of them.
    """
    kept: list[Read] = []
    refused: list[str] = []
    for where, row in found:
        try:
            kept.append(read(where, row))
        except RowError as error:
            refused.append(f"{where}: {error}")
    refuse(field, refused, len(found))
    return kept


def refuse(field: str, refused: Sequence[str], total: int) -> None:
    """Raises InputError for refused rows, if there are any, counted among `total`."""
    if not refused:
        return
    count = f"{len(refused):,} of {total:,} rows: " if len(refused) > 1 else ""
    # The rule after the last semicolon is the same for most of them, so it is said once.
    shown = [refused[0], *(text.rpartition("; ")[0] or text for text in refused[1:SHOWN])]
    more = f" | and {len(refused) - SHOWN:,} more" if len(refused) > SHOWN else ""
    raise InputError(f"{field}: {count}{' | '.join(shown)}{more}")


def listed(names: Iterable[str], limit: int = SHOWN) -> str:
    """The first names, and how many more there are."""
    found = [*names]
    more = f" and {len(found) - limit:,} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more


def column(row: Mapping[str, Any], name: str) -> Any:
    """One required column of a row.

    Raises:
      RowError: with the columns it has.
    """
    if name not in row:
        meant = next((other for other in MEANT.get(name, ()) if other in row), None)
        hint = f", or name the one that is meant, as task.columns {{{name}: {meant}}}"
        raise RowError(
            f"got the columns {', '.join(row) or 'none'}; must have {name!r}{hint if meant else ''}"
        )
    if row[name] is None:
        raise RowError(f"got null; must have {name!r} in every row")
    return row[name]


def conversation(row: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    """The messages of a row: `prompt`, a string or a conversation, after `system` if there is one.

    Raises:
      RowError: for anything else, or a conversation that does not end with a question.
    """
    prompt, system = column(row, "prompt"), row.get("system")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    _refuse_tools_and_parts(row, messages)
    if isinstance(prompt, str) and re.match(r'\s*\[\s*\{\s*"(role|content)"\s*:', prompt):
        raise RowError("got a conversation written as JSON text; must be the list itself")
    valid = isinstance(messages, list) and messages
    if not valid or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise RowError(
            f"got the prompt {str(prompt)[:80]!r}; must be a string or a list of messages with the "
            "strings `role` and `content`"
        )
    if messages[-1]["role"] != "user":
        raise RowError(
            f"got a prompt whose last message is the {messages[-1]['role']}'s; must be the user's, "
            "so leave out what answers it"
        )
    if not messages[-1]["content"].strip():
        raise RowError("got an empty prompt; must ask something")
    if system is not None and messages[0]["role"] != "system":
        check_text("system", system)
        messages = [{"role": "system", "content": system}, *messages]
    for message in messages:
        check_text("prompt", message["content"])
    # Parquet gives every message all the keys that any has.
    return tuple({k: v for k, v in message.items() if v is not None} for message in messages)


def _refuse_tools_and_parts(row: Mapping[str, Any], messages: Any) -> None:
    """What a chat template may know and this package does not: to drop it would ask another
    question."""
    if row.get("tools") and not isinstance(row["prompt"], str):
        raise RowError("got a column 'tools'; tools are not supported, so write them into the text")
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, Mapping):
            return
        if message.get("tool_calls") or message.get("role") == "tool":
            raise RowError("got a message with tool calls; tools are not supported: must be text")
        if isinstance(message.get("content"), list):
            parts = {str(p.get("type")) for p in message["content"] if isinstance(p, Mapping)}
            held = f" ({', '.join(sorted(parts))})" if parts else ""
            raise RowError(
                f"got a message whose content is a list{held}; content lists are not supported: "
                "must be text"
            )


_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


def check_text(name: str, value: Any) -> None:
    """Text that a tokenizer takes as it is.

    Raises:
      RowError: for another type, a NUL (which stands in no text, but in files that are none) or
        half of a surrogate pair (which is no character).
    """
    if not isinstance(value, str):
        raise RowError(f"got {str(value)[:80]} in the column {name!r}; must be a string")
    if found := _NO_TEXT.search(value):
        raise RowError(
            f"got {found[0]!a} in the column {name!r} (character {found.start() + 1}); must be "
            "text without NUL and without half surrogate pairs"
        )
