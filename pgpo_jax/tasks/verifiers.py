"""Pure text checks: multiple choice, boxed mathematics, exact, numeric, tool use.

A check is a function `(response, answer) -> Outcome`. It never raises, whatever the response; a
time-out or an expression that cannot be parsed is a reward of 0 with `failed` set. Feedback is made
of fixed sentences that say what to do differently, so that it cannot carry the right answer to the
teacher; that an answer is wrong is no feedback.

Golds and responses have the same readers. At the start of a run every gold goes through
:attr:`Verifier.read_gold`, which gives what the check compares with or says why it cannot.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from pgpo_jax.tasks import mathematics, quantities
from pgpo_jax.tasks.answers import NO_TAGS, Outcome, gold_text, last_boxed, tagged_answer
from pgpo_jax.tasks.mathematics import math


class Verifier(NamedTuple):
    """How one kind of answer is read, checked and written."""

    check: Callable[..., Outcome]
    """(response, answer) -> outcome; takes the options of the config that it names."""
    read_gold: Callable[[str, Mapping[str, Any]], str]
    """(the column `answer` as text, the row) -> the answer that the check compares with.

    Raises ValueError, which says why no response could match (a phrase such as `a ratio`).
    """
    worked: Callable[[str], str]
    """The shortest right response to an answer that `read_gold` gave."""


# --- exact text -----------------------------------------------------------------------------------

_INVISIBLE = "\ufeff\u200b\u200e\u200f\u2060"


def _canonical(text: str) -> str:
    """Canonically equal Unicode and line ends as one; nothing around it that cannot be seen.

    Compatible characters stay different (`x²` is not `x2`), and so do case and inner white space.
    """
    lines = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    stripped = ""
    while stripped != lines:
        stripped, lines = lines, lines.strip().strip(_INVISIBLE)
    return lines


def exact(response: str, answer: str, *, require_tags: bool = False) -> Outcome:
    """1 if the answer given (the whole response, if there are no tags) is the answer's text.

    Canonically equal texts are equal (Unicode NFC); case and inner white space count.
    """
    text, tagged = tagged_answer(response)
    if require_tags and not tagged:
        return Outcome(0.0, NO_TAGS, well_formed=False)
    text = _canonical(text)
    return Outcome(float(text == _canonical(answer)), well_formed=bool(text))


def _exact_gold(answer: str, row: Mapping[str, Any]) -> str:
    if not _canonical(answer):
        raise ValueError("an empty answer")
    return answer


# --- multiple choice ------------------------------------------------------------------------------

_DECORATION = re.compile(r"\\(?:text|math|boxed)[a-z]*\s*\{([^{}]*)\}|[$*`]")
_LEAD = r"(?:(?:the )?(?:correct |right )?(?:answer|option|choice)(?: is)?\s*:?\s+)?"
_LETTER = re.compile(
    # `A. Einstein` may be an option's text; `A) Einstein` and `A: Einstein` are a letter and text.
    rf"{_LEAD}[(\[{{]?\s*([a-z])\s*(?:[)\]}}.:]*|[)\]:]\s*\S.*)",
    re.DOTALL | re.IGNORECASE,
)


def _letter(text: str) -> str | None:
    r"""The letter that a text gives: `B`, `(B)`, `B.`, `\text{B}`, `B: text`, `b` up to `j`."""
    plain = unicodedata.normalize("NFKC", _canonical(text))
    match = _LETTER.fullmatch(_DECORATION.sub(r"\1", plain).strip())
    return None if match is None or match[1] in "klmnopqrstuvwxyz" else match[1]


def _options(row: Mapping[str, Any]) -> dict[str, str] | None:
    """The options in a row's column `choices` or `options`, by label; None if there is none."""
    column = next((row[name] for name in ("choices", "options") if row.get(name)), None)
    if isinstance(column, Mapping):
        pairs = column.items()
        if isinstance(column.get("text"), list) and isinstance(column.get("label"), list):
            pairs = zip(column["label"], column["text"], strict=False)
    elif isinstance(column, list):
        pairs = zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", column, strict=False)
    else:
        return None
    return {str(label): _canonical(str(text)) for label, text in pairs}


def multiple_choice(response: str, answer: str, *, require_tags: bool = False) -> Outcome:
    """1 if the answer given is the letter; no feedback, as in SDPO (arXiv 2601.20802).

    Args:
      response: the student's text. Its answer is the letter alone (a letter of full width is that
        letter), or the text of `answer` as it stands.
      answer: the letter, also in brackets or with a point. To a small one the large one is right.
      require_tags: refuse a bare letter, which the reference accepts.
    """
    text, tagged = tagged_answer(response)
    given = unicodedata.normalize("NFKC", _canonical(text))
    well_formed = tagged and len(given) == 1 and "A" <= given <= "Z"
    letter = _letter(answer)
    same = _canonical(text) == _canonical(answer) if letter is None or text else False
    right = same or (letter is not None and given in (letter, letter.upper()))
    return Outcome(float(right and (tagged or not require_tags)), well_formed=well_formed)


def _choice_gold(answer: str, row: Mapping[str, Any]) -> str:
    letter, options = _letter(answer), _options(row)
    if options is None:
        if letter is None:
            raise ValueError(
                "no letter (an option's text needs the options in a column `choices`; a number "
                "may count from 0 or from 1)"
            )
        return answer
    labels = [label for label, text in options.items() if text == _canonical(answer)]
    if isinstance(row.get("answer"), int):
        raise ValueError("a number, which may count options from 0 or from 1, or be one's text")
    named = {answer.strip(), letter, letter and letter.upper()} & options.keys()
    if len(named | set(labels)) > 1:
        raise ValueError("the letter of one option and the text of another, or of several")
    if named:
        return answer
    if not labels:
        raise ValueError(f"neither one of {', '.join(options)} nor the text of an option")
    return labels[0]


# --- one number -----------------------------------------------------------------------------------

NOT_ONE_NUMBER = "The response does not give its answer as one number."
_ANCHOR = re.compile(
    r"[=≈→]|(?<![0-9\s]):\s|\b(?:is|are|was|were|be|equals|gets?|gives?|makes?|has|have|costs?)\b"
)


def _last_statement(response: str) -> quantities.Quantity:
    """The number of the last sentence that has one, of all of it or after its last verb."""
    _, mark, marked = response.rpartition("####")
    if mark:
        return quantities.read(marked.strip().partition("\n")[0])
    sentences = re.split(r"\n+|(?<=[.!?;])\s+", response)
    for sentence in reversed(sentences[-100:]):
        try:
            return quantities.read(sentence)
        except quantities.NoNumber:
            if re.search(r"[=\\]|\banswer\b", sentence):
                raise
        except quantities.Unreadable:
            anchors = [match.end() for match in _ANCHOR.finditer(sentence)]
            if not anchors:
                raise
            return quantities.read(sentence[anchors[-1] :])
    raise quantities.NoNumber("no number")


def numeric(
    response: str, answer: str, *, require_tags: bool = False, tolerance: float = 1e-6
) -> Outcome:
    """1 if the number that the response gives equals the answer's.

    Both are read by :func:`quantities.read`: the last box, or what stands between the tags, must be
    one number, with any unit or words. Without either it is the number of the last sentence that
    has one. Of two known units both must be the same; they are not converted.

    Whole numbers must agree exactly; others to a relative `tolerance`, see
    :func:`quantities.equal`.
    """
    text, tagged = tagged_answer(response)
    if require_tags and not tagged:
        return Outcome(0.0, NO_TAGS, well_formed=False)
    try:
        gold = quantities.read(gold_text(answer))
    except ValueError:
        return Outcome(0.0, failed=True)
    boxed = last_boxed(text)
    try:
        if boxed is None and not tagged:
            given = _last_statement(text)
        else:
            given = quantities.read(text.rpartition("####")[2] if boxed is None else boxed)
    except quantities.Unreadable:
        return Outcome(0.0, NOT_ONE_NUMBER, well_formed=False)
    return Outcome(float(quantities.equal(given, gold, tolerance)))


def _numeric_gold(answer: str, row: Mapping[str, Any]) -> str:
    text = gold_text(answer)
    quantities.read(text)
    return text


# --- tools ----------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _constant(text: str) -> float:
    raise ValueError(f"{text}, which is no JSON")


def _json(text: str) -> Any:
    """JSON whose numbers are exact, and equal to another's only if they are the same number."""
    return json.loads(
        text, parse_float=Decimal, object_pairs_hook=_object, parse_constant=_constant
    )


def _input(value: Any) -> Any:
    return _json(value.strip() or "{}") if isinstance(value, str) else value


def _same(first: Any, second: Any) -> bool:
    """Equality of JSON values; for Python true is 1."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def tool_use(response: str, answer: str) -> Outcome:
    """1 if the response calls the right tools in order with the right inputs.

    Args:
      response: lines `Action: NAME` and `Action Input: JSON`, alternating.
      answer: a JSON list of `{"Action": name, "Action_Input": object or its JSON text}`.

    The reference prints the gold calls in its feedback; this one only says what is wrong.
    """
    try:
        gold = [(str(call["Action"]), _input(call["Action_Input"])) for call in _json(answer)]
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return Outcome(0.0, failed=True)
    calls: list[tuple[str, list[str]]] = []
    for line in response.splitlines():
        label, _, rest = line.strip().partition(":")
        if label == "Action":
            calls.append((rest.strip(), []))
        elif label == "Action Input" and calls:
            calls[-1][1][:] = [rest]
        elif calls and calls[-1][1]:  # an input over several lines
            calls[-1][1].append(line)
    if not calls:
        form = "The response has no line `Action: NAME` with a line `Action Input: JSON`."
        return Outcome(0.0, form, well_formed=False)
    try:
        given = [(name, _input("\n".join(lines))) for name, lines in calls]
    except (ValueError, ArithmeticError, RecursionError):
        return Outcome(0.0, "An action input is not valid JSON.", well_formed=False)
    if len(given) != len(gold):
        return Outcome(0.0, "The number of actions is not right.")
    if [name for name, _ in given] != [name for name, _ in gold]:
        return Outcome(0.0, "An action is not the right one.")
    right = all(_same(one, other) for (_, one), (_, other) in zip(given, gold, strict=True))
    return Outcome(float(right), "" if right else "An action input is not right.")


def tool_calls(answer: str) -> str:
    """The text that makes the calls of an answer of :func:`tool_use`; "" if it is not valid."""

    def written(value: Any) -> str:
        return (value.strip() or "{}") if isinstance(value, str) else json.dumps(value)

    try:
        return "\n".join(
            f"Action: {call['Action']}\nAction Input: {written(call['Action_Input'])}"
            for call in json.loads(answer)
        )
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return ""


def _tool_gold(answer: str, row: Mapping[str, Any]) -> str:
    if not tool_calls(answer):
        raise ValueError("no JSON list of objects with `Action` and `Action_Input`")
    return answer


# --- all of them ----------------------------------------------------------------------------------


def _tagged(answer: str) -> str:
    return f"<answer>\n{answer}\n</answer>"


VERIFIERS: dict[str, Verifier] = {
    "multiple_choice": Verifier(multiple_choice, _choice_gold, lambda a: _tagged(_letter(a) or a)),
    "math": Verifier(math, mathematics.read_gold, lambda a: f"\\boxed{{{a}}}"),
    "exact": Verifier(exact, _exact_gold, _tagged),
    "numeric": Verifier(numeric, _numeric_gold, _tagged),
    "tool_use": Verifier(tool_use, _tool_gold, tool_calls),
}
"""By the name that `task.verifier` gives."""
