"""What a response gives as its answer, and what is said about it."""

from __future__ import annotations

import re
from typing import NamedTuple

NO_TAGS = "The response does not give its answer between <answer> and </answer>."


class Outcome(NamedTuple):
    """What a verifier says about one response."""

    reward: float
    """Any finite number; the package's own verifiers give 1 where right, 0 where wrong."""
    feedback: str = ""
    """What the teacher may be told: only what says what to do differently, else empty, since a
    response with feedback has a context to learn from. Never the right answer."""
    well_formed: bool = True
    """Whether the response has the requested format, right or wrong."""
    failed: bool = False
    """The check itself failed (time-out, nothing to parse): reward 0, and counted."""
    parts: tuple[tuple[str, float], ...] = ()
    """What each of a user's reward functions that judged the response gave, by its name in the
    metrics."""


def tagged_answer(response: str) -> tuple[str, bool]:
    """The text after the last `<answer>`, up to the next `</answer>`, stripped.

    Returns:
      That text (of the whole response if there is no `<answer>`) and whether both tags stand.
    """
    _, opening, rest = response.rpartition("<answer>")
    text, closing, _ = rest.partition("</answer>")
    return text.strip(), bool(opening and closing)


def boxes(text: str) -> list[str]:
    r"""What every `\boxed{...}` with balanced braces holds, in the order in which they open."""
    found: list[tuple[int, int]] = []
    open_braces: list[tuple[int, bool]] = []
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if match[0] == "}":
            if open_braces:
                start, boxed = open_braces.pop()
                if boxed:
                    found.append((start, match.start()))
        elif match[0].endswith("{") and match[0] != "\\{":
            open_braces.append((match.end(), match[0] != "{"))
    return [text[start:end] for start, end in sorted(found)]


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` with balanced braces holds; None if there is none."""
    found = boxes(text)
    return found[-1] if found else None


def given_answer(response: str) -> str:
    """What a response gives as its answer, whatever the verifier: for majority votes.

    The last box, else the text between the last answer tags, else the whole text.
    """
    boxed = last_boxed(response)
    return (tagged_answer(response)[0] if boxed is None else boxed).strip()


def gold_text(answer: str) -> str:
    r"""The part of a gold answer that is the answer: after GSM8K's `####`, inside its box.

    Raises:
      ValueError: for several boxes that hold different texts, or an empty answer.
    """
    _, _, text = answer.rpartition("####")
    held = {box.strip() for box in boxes(text)}
    if len(held) > 1:
        raise ValueError("several boxes with different answers")
    text = held.pop() if held else text.strip()
    if not text:
        raise ValueError("an empty answer")
    return text
