r"""Numbers as people write them: one exact reading, for gold answers and for responses.

A text is one number or it is not read: with two numbers, a range, a ratio, a date, an expression or
a form that means different numbers to different readers (`3,14`, `5k`, `5!`), :func:`read` says
which and gives none. What is read:

- signs (also U+2212, and an en dash as a minus), also before or after a currency sign: `-$5`
- digits in groups of three by commas, spaces (also thin ones) or apostrophes: `1,000,000`, `1 000`
- powers of ten and of other numbers: `1.5e-3`, `1.5 × 10^{-3}`, `1.5 \times 10⁻³`, `2^10`
- quotients and mixed numbers: `3/4`, `\frac{3}{4}`, `½`, `1 1/2`; periods: `0.\overline{3}`
- percent and permille, as factors: 50 % is 0.5 and not 50; `5 million`, `2 dozen`
- a unit (`9.8 m/s^2`, `$5`, `5 dollars`), which is kept, and any words
- brackets around it, which change nothing; `($5)` is not read, since accounts write -5 so
- `x = 72`, `48 + 24 = 72`, `about 72`, `\boxed{72}`, `$72$`, `**72**`, `72.`
"""

# ruff: noqa: RUF001 (the signs of formulas are meant)

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from pgpo_jax.tasks import units

LONGEST = 2000
"""Characters; a number or a statement about one is no longer."""


class Unreadable(ValueError):
    """A text that is not one number; says why."""


class NoNumber(Unreadable):
    """A text without any number."""


class Quantity(NamedTuple):
    """An exact number, `mantissa * 10**exponent`, and what stands beside it."""

    mantissa: Fraction
    exponent: int = 0
    place: int | None = None
    """The power of ten of the last digit written; None for what is exact as written (3/4, 10^5)."""
    unit: Mapping[str, int] = {}
    """The power of every unit beside the number; empty if there is none that is known."""

    def is_integer(self) -> bool:
        """Whether it is a whole number."""
        numerator, denominator = self.mantissa.as_integer_ratio()
        if self.exponent >= 0 or not numerator:
            return denominator == 1
        # Its digits bound how often ten divides it: no need to write out 10**-exponent.
        return -self.exponent <= len(str(abs(numerator))) and not (
            numerator % (denominator * 10**-self.exponent)
        )


def equal(first: Quantity, second: Quantity, tolerance: float = 1e-6) -> bool:
    """Whether two quantities are the same number, with no two different units.

    Whole numbers must agree exactly, however large. Others may differ by a relative `tolerance`
    (from a whole number by no more than `tolerance` itself) and by less than one unit in the last
    digit of the coarser: 0.3333333 is 1/3, but 0.1234567 is not 0.1234568.
    """
    if first.unit and second.unit and first.unit != second.unit:
        return False
    if not first.mantissa or not second.mantissa:
        return first.mantissa == second.mantissa
    if abs(_magnitude(first) - _magnitude(second)) > 2:
        return False
    # Of about the same size, so the exponents differ by no more than the digits that were written.
    shift = min(first.exponent, second.exponent)
    one, other = (q.mantissa * 10 ** (q.exponent - shift) for q in (first, second))
    if one == other:
        return True
    whole = first.is_integer(), second.is_integer()
    places = [q.place for q in (first, second) if q.place is not None]
    if all(whole) or not places:
        return False
    allowed = Fraction(tolerance) * max(abs(one), abs(other))
    if any(whole):
        allowed = min(allowed, Fraction(tolerance) * Fraction(10) ** -shift)
    gap = abs(one - other)
    return gap <= allowed and gap < Fraction(10) ** (max(places) - shift)


def _magnitude(quantity: Quantity) -> int:
    """The order of magnitude, to within one."""
    numerator, denominator = quantity.mantissa.as_integer_ratio()
    return len(str(abs(numerator))) - len(str(denominator)) + quantity.exponent


# --- one alphabet ---------------------------------------------------------------------------------

_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "₀₁₂₃₄₅₆₇₈₉"
_PLAIN = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, "0123456789+-0123456789")
_CODES = {"EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹", "Rs": "₹", "Rs.": "₹"}
_COMMAND_END = r"(?![a-zA-Z])"
_ALPHABET: list[tuple[str, str]] = [
    (r"[\u2010-\u2013\u2212]", "-"),
    (r"[\u2044\u2215]", "/"),
    (rf"[✕⨯]|\\times{_COMMAND_END}", "×"),
    (rf"[⋅∙•∗]|\\(?:cdot|ast){_COMMAND_END}", "·"),
    (r"\\(?:text|math|mbox|operatorname)[a-z]{0,2}\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 "),
    (rf"\\(?:left|right|displaystyle|[bB]igg?[lr]?){_COMMAND_END}|\\!|`|<<[^<>]*>>", ""),
    (rf"\\[dtc]frac{_COMMAND_END}", r"\\frac"),
    (r"\\([%#&])", r"\1"),
    (rf"\^\s*(?:\\circ|\{{\s*\\circ\s*\}})|\\(?:circ|degree){_COMMAND_END}", "°"),
    (r"\{,\}", ","),
    (r"\s+\^", "^"),
    (rf"\\[()\[\],;: ]|\\q?quad{_COMMAND_END}|(?<=[0-9}}])~(?=\S)", " "),
    (rf"\\(?:approx|simeq|sim|implies|to|[rR]ightarrow){_COMMAND_END}|[≈≃≅→⇒]|[-=]>", "="),
    *((rf"(?<![\w)}}*])\*{{{n}}}(?![\s*])([^*]+)\*{{{n}}}(?![\w({{*])", r"\1") for n in (2, 1)),
]
_REPLACEMENTS = [(re.compile(pattern), replacement) for pattern, replacement in _ALPHABET]


def _one_alphabet(text: str) -> str:
    """The text with one sign for each thing; LaTeX's spaces, fonts and sizes are gone."""
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda run: f"^{{{run[0].translate(_PLAIN)}}}", text)
    text = re.sub(f"[{_SUBSCRIPTS}]+", lambda run: f"_{{{run[0].translate(_PLAIN)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda one: f" {unicodedata.normalize('NFKC', one[0])} ", text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    # An even number of dollars encloses formulas; an odd one, or an escaped one, is money.
    text = re.sub(r"\\\$|\b(?:US\$|USD\b\s?)", "\0", text)
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")
    text = text.replace("\0", "$")
    codes = r"\b(EUR|GBP|JPY|INR|Rs\.?)\s?(?=[-+]?[0-9])"
    return re.sub(codes, lambda code: _CODES[code[1]], text)


# --- parts of a text ------------------------------------------------------------------------------

_GROUPS = [rf"[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+(?![0-9])" for mark in (",", "[ ]", "['’]")]
_DECIMAL = rf"(?:(?:{'|'.join(_GROUPS)}|[0-9]+)(?:\.(?:[0-9]+|(?=\\overline)))?|\.[0-9]+)"
_POWER = r"(?:\^|\*\*)\s*(?:\{\s*[-+]?\s?[0-9]+\s*\}|\(\s*[-+]?[0-9]+\s*\)|[-+]?[0-9]+)"
_VALUE = re.compile(
    rf"""(?P<decimal>{_DECIMAL})
    (?: \\overline\s*\{{(?P<period>[0-9]+)\}} | [eE](?P<exponent>[-+]?[0-9]+)
      | \s*[×·*xX]\s*10\s*(?P<ten>{_POWER}) | \s*(?P<power>{_POWER}) )?""",
    re.VERBOSE,
)
_BRACED = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|([0-9]))"
_FRACTION = re.compile(rf"\\frac{_BRACED}{_BRACED}")
_WORD = re.compile(
    r"[^\W\d_](?:[^\W_]|['’](?=[^\W\d_])|[\^_][{(]?[-+]?[^\W_]*[-+]?[})]?|-(?=[0-9]))*"
)
_TOKEN = re.compile(rf"(?P<word>{_WORD.pattern})|(?P<number>\.?[0-9]|\\frac(?![a-zA-Z]))")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MONEY = "$€£¥₹₩₽¢"
_MONTH = (
    "(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.?)"
)
_FUNCTION = r"(?:sqrt|root|log|ln|sin|cos|tan|exp|pi)"
_PART = (
    r"(?:hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths)"
)
_LEAD = [
    (r"(?:^|\s)[^\W\d_]\s*[,;]\s*$", "a list"),
    (r"[<>≤≥≠]|\bnot\b|n['’]t\b", "no number but a bound on one"),
    (
        r"\b(?:at (?:least|most)|(?:more|less|fewer|greater|other|rather) than|up to|under|over|"
        r"above|below|exceeds?)\s*$",
        "no number but a bound on one",
    ),
    (
        rf"[+*^|√±∓\\×·÷]|/\s*$|\b(?:{_FUNCTION}|{_PART}|twice|double|triple|per)\s*$",
        "an expression",
    ),
    (rf"\b{_MONTH}\s*$", "a date"),
]
_REST = [
    (r"[,;]\s*(?![aAI]\b)[^\W\d_](?![\w’'])", "a list"),
    (
        r"^!|[+*^|√±∓\\×·÷]|^\s*[-/]?\s*(?![aAI]\b)[^\W\d_](?![\w’'])|^\s*[-/]\s*(?:$|[^\w\s])",
        "an expression",
    ),
    (
        rf"^\s*(?:{_FUNCTION}|{_PART}|squared|cubed|factorial)\b|\band an? {_PART}\b",
        "an expression",
    ),
    (
        r"[<>≤≥≠]|\bor (?:more|less|fewer|higher|lower|greater)\b|\bbelow zero\b",
        "no number but a bound on one",
    ),
    (rf"^\s*(?:st|nd|rd|th)?\s*(?:of\s+)?{_MONTH}(?![a-z])", "a date"),
]


def _integer(power: str) -> int:
    """The exponent in `^{-3}` and its other spellings."""
    return int(re.sub(r"[^-0-9]", "", power))


def _value(text: str, start: int) -> tuple[Quantity, int] | None:
    """The decimal number, with its power, that begins at a position; and where it ends."""
    match = _VALUE.match(text, start)
    if match is None:
        return None
    whole, _, decimals = re.sub("[, '’]", "", match["decimal"]).partition(".")
    mantissa, place = Fraction(int(whole + decimals)), -len(decimals)
    exponent = _integer(match["ten"] or "0") + int(match["exponent"] or 0)
    if match["period"]:
        period = Fraction(int(match["period"]), 10 ** len(match["period"]) - 1)
        return Quantity(mantissa + period, place), match.end()
    if not match["power"]:
        return Quantity(mantissa, place + exponent, place + exponent), match.end()
    power = _integer(match["power"])
    if mantissa == 10 and not place:
        return Quantity(Fraction(1), power), match.end()
    if abs(power) * len(match["decimal"]) > 3 * LONGEST or (power < 0 and not mantissa):
        raise Unreadable("a power that is too large")
    return Quantity(mantissa**power, place * power), match.end()


def _part(text: str) -> Quantity:
    """What stands above or below the line of a fraction."""
    sign, digits = re.fullmatch(r"\s*([-+]?)\s*(.*?)\s*", text, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    found = _value(digits, 0)
    if found is None or found[1] < len(digits):
        raise Unreadable("an expression")
    return found[0]._replace(mantissa=found[0].mantissa * (-1 if sign == "-" else 1))


def _over(above: Quantity, below: Quantity) -> Quantity:
    if not below.mantissa:
        raise Unreadable("a division by zero")
    return Quantity(above.mantissa / below.mantissa, above.exponent - below.exponent)


def _fraction(text: str, start: int) -> tuple[Quantity, int] | None:
    r"""The quotient `\frac{3}{4}` or `3/4` that begins at a position; and where it ends."""
    if match := _FRACTION.match(text, start):
        above, below = (_part(match[i] or match[i + 1] or "") for i in (1, 3))
        return _over(above, below), match.end()
    above = _value(text, start)
    slash = above and re.compile(r"\s*/\s*(?=\.?[0-9])").match(text, above[1])
    below = _value(text, slash.end()) if slash else None
    if above is None or below is None:
        return None
    if " " in text[start : above[1]].strip() or " " in text[slash.end() : below[1]].strip():  # pyright: ignore[reportOptionalMemberAccess]
        raise Unreadable("a mixed number or a quotient of digits in groups")
    return _over(above[0], below[0]), below[1]


def _number(text: str, start: int) -> tuple[Quantity, int]:
    """The number without sign that begins at a position: mixed, a quotient or decimal."""
    if found := _fraction(text, start):
        return found
    found = _value(text, start)
    if found is None:
        raise Unreadable("an expression")
    quantity, end = found
    follows = re.compile(r"\s*(?=\\frac)|\s+(?=[0-9])").match(text, end)
    part = _fraction(text, follows.end()) if follows and text[start:end].isdigit() else None
    if part is None:
        return found
    if not 0 < part[0].mantissa < 1 or part[0].exponent:
        raise Unreadable("no mixed number: its fraction is not between 0 and 1")
    return Quantity(quantity.mantissa + part[0].mantissa), part[1]


def _numbers(text: str) -> list[tuple[Quantity, int, int]]:
    """All numbers of a text that are not part of a word (H2O, x_1, m^2), with start and end."""
    found, position = [], 0
    while token := _TOKEN.search(text, position):
        position = token.end()
        if token["number"]:
            quantity, position = _number(text, token.start())
            found.append((quantity, token.start(), position))
            if len(found) > 2:
                break
        elif token["word"][1:2] == "^" and units.symbol(token["word"][0]) is None:
            raise Unreadable("an expression")
    return found


def _last_side(text: str) -> str:
    """What stands right of the last equals sign."""
    sides = re.split(r"(?<![<>!])=+(?![<>])", text)
    for side in sides[:-1]:
        # `x = 3, y = 5` and `m = 72 kg where g = 9.8` say more than one thing.
        after = re.search(r"[0-9](.*)", side, re.DOTALL)
        variable = re.search(r"[0-9]([a-z])(?!\w)", side)
        if variable and units.symbol(variable[1]) is None:
            raise Unreadable("an equation")
        words = _WORD.findall(after[1]) if after and side is not sides[0] else []
        if (after and re.search(r"[,;]\s|\n|\b(?:and|or)\b", after[1])) or any(
            len(word) > 1 and units.symbol(word) is None for word in words
        ):
            raise Unreadable("several equations")
    return sides[-1]


# --- one number -----------------------------------------------------------------------------------


def _several(between: str) -> Unreadable:
    """Why two numbers with this text between them are not one."""
    forms = {
        r"\s*:\s*": "a ratio or a time",
        r"\s*(?:-|to|\.\.+|…)\s*": "a range or a difference",
        ",": "several numbers or a decimal comma",
        "|[.]": "digits with several points",
    }
    found = (name for form, name in forms.items() if re.fullmatch(form, between))
    return Unreadable(next(found, "several numbers"))


def _sign(lead: str) -> tuple[str, int, str]:
    """Takes brackets, currency and sign off the end of what stands before a number.

    Returns:
      What is left, the sign and the currency.
    """
    sign, money, brackets = "", "", 0
    while lead.rstrip()[-1:] and lead.rstrip()[-1] in "([{+-" + _MONEY:
        spaced, lead = lead[-1].isspace(), lead.rstrip()
        last, lead = lead[-1], lead[:-1]
        if last in _MONEY:
            money += last
        elif last in "+-":
            sign += last
            before = lead.rstrip()
            if before and before[-1] not in ":=,;([{\"'" + _MONEY:
                said = re.search(r"\b(?:is|are|about|equals)$", before)
                if before == lead or (spaced and not said):
                    raise Unreadable("an expression, or a dash and no minus")
        else:
            brackets += 1
            if (last == "(" and lead[-1:].isalnum()) or brackets > 9:
                raise Unreadable("an expression")
    word = re.search(r"\b(?:minus|negative)\s*$", lead, re.IGNORECASE)
    if word:
        sign, lead = sign + "-", lead[: word.start()]
    if len(sign) > 1 or len(money) > 1 or lead.endswith("—"):
        raise Unreadable("several signs before one number")
    if brackets and money and not sign:
        raise Unreadable("an amount in brackets, which accounts write for a negative one")
    return lead, -1 if sign == "-" else 1, money


def _beside(rest: str, quantity: Quantity, money: str, variables: bool) -> tuple[Quantity, str]:
    """Takes percent, scale words and unit off the start of what stands after a number."""
    closed = re.match(r"[)\]}]*", rest)
    rest = rest[closed.end() :] if closed else rest
    while match := re.match(r"\s*(hundred|thousand|[mbtr]+illion|dozen)s?\b", rest, re.IGNORECASE):
        size = _SCALES.get(match[1].lower())
        if match[1].lower() == "dozen":
            quantity = Quantity(quantity.mantissa * 12, quantity.exponent)
        elif size is None:
            break
        else:
            quantity = _shifted(quantity, size)
        rest = rest[match.end() :]
    if match := re.match(r"\s*(?:(%|percent\b|per cent\b|pct\b)|‰)", rest, re.IGNORECASE):
        quantity, rest = _shifted(quantity, -2 if match[1] else -3), rest[match.end() :]
    attached = re.match(r"[^\W\d_]+", rest)
    if attached and attached[0] not in ("st", "nd", "rd", "th"):
        word = attached[0]
        scale = re.fullmatch("[kKMGBb]|[mb]n", word) or (money and len(word) == 1)
        if scale:
            raise Unreadable(f"a number with `{word}`, a unit or a power of ten")
        if units.symbol(word) is None or (variables and len(word) == 1):
            raise Unreadable("an expression")
    if re.match(r"[\^_(\\{√|]", rest):
        raise Unreadable("an expression")
    unit, end = units.leading(rest)
    if money:
        unit = {**unit, money: 1}
    return quantity._replace(unit=unit), rest[end:]


def _shifted(quantity: Quantity, size: int) -> Quantity:
    place = None if quantity.place is None else quantity.place + size
    return Quantity(quantity.mantissa, quantity.exponent + size, place)


@lru_cache(maxsize=4096)
def read(text: str, *, variables: bool = False) -> Quantity:
    """The one number that a text gives.

    Args:
      text: an answer, not a whole response: words may stand around the number, another number may
        not.
      variables: a single letter that follows a number at once is a variable and no unit (`5m`).

    Raises:
      Unreadable: a text that does not give one number, or in a form that is ambiguous.
      NoNumber: there is none at all.
    """
    if len(text) > LONGEST:
        raise Unreadable(f"a text of more than {LONGEST} characters")
    whole = _one_alphabet(text)
    if any(one.isdigit() and not one.isascii() for one in whole):
        raise Unreadable("digits other than 0 to 9")
    side = _last_side(whole)
    found = _numbers(side)
    if not found:
        raise NoNumber("no number")
    if len(found) > 1:
        raise _several(side[found[0][2] : found[1][1]])
    ((quantity, start, end),) = found
    lead, sign, money = _sign(side[:start])
    quantity, rest = _beside(side[end:], quantity, money, variables)
    for patterns, part in ((_LEAD, _WORD.sub(_blank, lead)), (_REST, _WORD.sub(_blank, rest))):
        for pattern, reason in patterns:
            if re.search(pattern, part):
                raise Unreadable(reason)
    return quantity._replace(mantissa=sign * quantity.mantissa)


def _blank(word: re.Match[str]) -> str:
    """The letters of a word: its powers and indices are no operators."""
    return re.sub(r"[\^_].*|[0-9].*", "", word[0])
