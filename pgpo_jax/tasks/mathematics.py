r"""Boxed mathematics: `\boxed{...}` compared as numbers, as words, or by math-verify.

Numbers are compared here, exactly (:mod:`pgpo_jax.tasks.quantities`). All other mathematics goes to
math-verify, in processes of their own (`math_worker.py`): symbolic algebra can hang, and take all
the memory there is.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import quantities, units, workers
from pgpo_jax.tasks.answers import Outcome, gold_text, last_boxed

NO_BOX = "The response has no \\boxed{} answer."
LONGEST = 2000
"""Characters; no answer is longer, and parsing one takes for ever."""
_pool = workers.Pool(workers.script("math_worker.py"))


def require_math_verify() -> None:
    """Raises InputError where the extra is not installed, before a run and not in its middle."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(
            "task.verifier: got 'math', which needs math-verify: pip install 'pgpo-jax[math]'"
        )


def math(response: str, answer: str, *, time_limit: float = 5.0) -> Outcome:
    r"""1 if the last `\boxed{...}` means the answer.

    Two numbers, with units or words or without, are compared as :func:`quantities.equal` does, so
    that 50 % is 0.5 and not 50. Words are compared without case. All else is compared by
    math-verify, and the numbers in it once more, for it rounds them to a fixed number of decimals.

    Args:
      response: the student's text.
      answer: the expression, bare, between dollars or boxed, or a solution after whose `####` it
        stands.
      time_limit: seconds for one comparison by math-verify.
    """
    given = last_boxed(response)
    if given is None:
        return Outcome(0.0, NO_BOX, well_formed=False)
    try:
        gold, given = _bare(gold_text(answer)), _bare(given)
    except ValueError:
        return Outcome(0.0, failed=True)
    if not given or len(given) > LONGEST:
        return Outcome(0.0, failed=True)
    verdict = _compare(gold, given, time_limit)
    return Outcome(0.0, failed=True) if verdict is None else Outcome(float(verdict))


def read_gold(answer: str, row: Mapping[str, Any]) -> str:
    """The expression that an answer gives, if a response can match it; asks math-verify.

    Raises:
      ValueError: words beside mathematics, a form that means different things to different
        readers, or an expression that math-verify does not parse or not tell from others.
    """
    text = gold_text(answer)
    gold = _bare(text)
    if re.fullmatch(r"[-+]?(?:0,[0-9]+|[0-9]+,[0-9]{2}|[0-9]+,[0-9]{4,})", gold):
        raise ValueError("a decimal comma, or a list without a space after its comma")
    if _quantity(gold) is not None or _words(gold) is not None or _literal(gold):
        return text
    if _MISREAD.search(gold):
        raise ValueError("digits in a form that LaTeX takes for a product")
    plain = re.sub(r"\\[a-zA-Z]*(?:text|math|operatorname|begin|end)[a-z]*\s*\{[^{}]*\}", "", gold)
    # A word of three letters alone may be a product: xyz. math-verify knows `sqrt(`.
    plain = _commands(re.sub(r"(?<![a-zA-Z])sqrt\(", "(", plain))
    if re.search(r"(?<![\\a-zA-Z])(?![a-zA-Z]{3}$)[a-zA-Z]{3,}", plain) or not gold:
        raise ValueError("words beside mathematics")
    if not _pool.ask([_latex(gold), None], 30.0):
        raise ValueError("an expression that math-verify does not parse or not tell from others")
    return text


# --- readings -------------------------------------------------------------------------------------

_FONT = re.compile(r"\\(?:text|math|mbox)[a-z]{0,2}\s*\{([^{}]*)\}")
_MISREAD = re.compile(r"[0-9]\s+[0-9]|[0-9]\.[0-9]+\.|(?<![\\a-zA-Z])[0-9.]+[eE][-+]?[0-9]")
_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan sec csc cot log ln exp sqrt"
_COMMANDS = f"{_FUNCTIONS} pi theta alpha beta gamma lambda infty"
_UNIT = re.compile(
    r"(?<=\S)\s*(?:\\[,;: ]|~)*\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?$"
)


def _bare(text: str) -> str:
    """An expression without dollars, a full stop and `The answer is`."""
    text = re.sub(r"^\s*(?:the )?(?:final )?answer(?: is)?\s*:?\s+", "", text, flags=re.IGNORECASE)
    text = text.strip()
    for ends in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text.removesuffix(".").rstrip()
        if (
            len(inner) > sum(map(len, ends))
            and inner.startswith(ends[0])
            and inner.endswith(ends[1])
        ):
            text = inner[len(ends[0]) : -len(ends[1])].strip()
    return text.removesuffix(".").rstrip() if not text.endswith("..") else text


def _quantity(text: str) -> quantities.Quantity | None:
    """The number that an expression is; None for a list, an equation and other mathematics."""
    if re.search(r",(?![0-9]{3})|;|\\[{}]|\b(?:and|or|if)\b", text):
        return None
    left, equals, _ = text.rpartition("=")
    if equals and not re.fullmatch(r"\s*\\?[a-zA-Z]+(?:_\{?\w+\}?)?\s*", left):
        return None
    try:
        return quantities.read(text, variables=True)
    except quantities.Unreadable:
        return None


def _words(text: str) -> str | None:
    """Words that are no product of variables, in one spelling; None for mathematics."""
    plain = " ".join(_FONT.sub(r" \1 ", text).split()).casefold()
    wrapped = not _FONT.sub("", text).strip() and " " in plain
    if re.search(r"[\d\\=<>^_+*/{}|]", plain) or not (wrapped or re.search(r"[^\W\d_]{4}", plain)):
        return None
    if plain in _COMMANDS.split():
        return None
    return unicodedata.normalize("NFC", plain).strip(" .!'\"")


def _literal(text: str) -> bool:
    """Whether an expression means nothing but itself: a number in a base, a time of day."""
    return bool(re.fullmatch(r"\s*\w+_\{?[0-9]+\}?\s*|\s*[0-9]{1,2}:[0-9]{2}\s*", text)) and (
        not re.match(r"\s*[a-zA-Z]_", text)
    )


def _commands(text: str) -> str:
    """The text with the backslashes of functions and Greek letters that were left out."""
    pattern = rf"(?<![\\a-zA-Z])({_COMMANDS.replace(' ', '|')})(?![a-zA-Z])(?!\s*\()"
    return re.sub(pattern, r"\\\1", text.replace("infinity", "\\infty"))


def _latex(text: str, *, equation: bool = False) -> str:
    """What math-verify gets: numbers as LaTeX has them, no unit at the end, full commands."""
    quantity = None if equation else _quantity(text)
    if quantity is None:
        unit = _UNIT.search(text)
        held = _FONT.search(unit[0]) if unit else None
        if unit and held and not re.search(r"\b(?:and|or|if)\b|[0-9]", held[1]):
            text = text[: unit.start()]
        return _commands(text)
    mantissa, exponent = quantity.mantissa, quantity.exponent
    if quantity.place is not None and -60 < exponent < 60:
        digits = f"{abs(mantissa) * 10 ** max(exponent, 0)}"
        if exponent < 0:
            digits = digits.rjust(1 - exponent, "0")
            digits = f"{digits[:exponent]}.{digits[exponent:]}"
        return f"-{digits}" if mantissa < 0 else digits
    number = f"{mantissa.numerator}"
    if mantissa.denominator != 1:
        number = f"\\frac{{{mantissa.numerator}}}{{{mantissa.denominator}}}"
    return f"{number} \\cdot 10^{{{exponent}}}" if exponent else number


def _unit_at_end(text: str) -> Mapping[str, int]:
    r"""The unit in the `\text{...}` at the end of an expression; empty if there is none."""
    unit = _UNIT.search(text)
    held = _FONT.search(unit[0]) if unit else None
    return units.leading(held[1])[0] if held else {}


def _compare(gold: str, given: str, seconds: float) -> bool | None:
    """Whether two expressions mean the same; None if that could not be found out."""
    plain = [re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip() for text in (gold, given)]
    if plain[0] == plain[1]:
        return True
    equations = "=" in gold and "=" in given  # x = 5 is not y = 5
    if not equations:
        one, other = _quantity(gold), _quantity(given)
        if one is not None and other is not None:
            return quantities.equal(one, other)
    one, other = _words(gold), _words(given)
    if one is not None and other is not None:
        return one == other
    if _literal(gold) or _literal(given):
        return re.sub(r"[\s{}]", "", gold) == re.sub(r"[\s{}]", "", given)
    if one is not None or (_MISREAD.search(given) and _quantity(given) is None):
        return False
    beside = [_unit_at_end(text) for text in (gold, given)]
    if all(beside) and beside[0] != beside[1]:
        return False
    return _pool.ask([_latex(text, equation=equations) for text in (gold, given)], seconds)
