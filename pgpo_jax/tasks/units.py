"""Units of measurement and currencies: recognised beside a number, never converted."""

# ruff: noqa: RUF001 (the signs of formulas are meant)

from __future__ import annotations

import re

_WHOLE = frozenset(
    [
        "min",
        "h",
        "s",
        "d",
        "yr",
        "ft",
        "mi",
        "yd",
        "lb",
        "oz",
        "gal",
        "mph",
        "rpm",
        "°C",
        "°F",
        "°",
        "rad",
        "sr",
        "atm",
        "mmHg",
        "torr",
        "ha",
        "ppm",
        "ppb",
        "mol",
        "cd",
        "Da",
        "dB",
        "$",
        "€",
        "£",
        "¥",
        "₹",
        "₩",
        "₽",
        "¢",
    ]
)
"""Symbols that take no prefix, and those that a prefix and another symbol would also spell."""
_PREFIXED = re.compile(
    r"(?:da|[TGMkhdcmμnpf])?(?:m|g|s|A|K|mol|Hz|N|J|W|Pa|C|V|F|Ω|S|T|H|Bq|Gy|Sv|L|l|M|eV|bar|cal|"
    r"Wh|t|lm|lx|Å|B|bit)"
)
_PREFIXES = dict(
    zip(
        [
            "kilo",
            "centi",
            "milli",
            "micro",
            "nano",
            "pico",
            "mega",
            "giga",
            "tera",
            "deci",
            "hecto",
            "femto",
        ],
        ["k", "c", "m", "μ", "n", "p", "M", "G", "T", "d", "h", "f"],
        strict=True,
    )
)
_NAMES = {
    **{"meter": "m", "metre": "m", "gram": "g", "gramme": "g", "second": "s", "sec": "s"},
    **{"ampere": "A", "amp": "A", "kelvin": "K", "mole": "mol", "hertz": "Hz", "newton": "N"},
    **{"joule": "J", "watt": "W", "pascal": "Pa", "coulomb": "C", "volt": "V", "farad": "F"},
    **{"ohm": "Ω", "siemens": "S", "tesla": "T", "henry": "H", "liter": "L", "litre": "L"},
    **{"electronvolt": "eV", "calorie": "cal", "byte": "B", "tonne": "t", "angstrom": "Å"},
    **{"hour": "h", "hr": "h", "minute": "min", "day": "d", "year": "yr", "week": "wk"},
    **{"month": "month", "degree": "°", "deg": "°", "celsius": "°C", "fahrenheit": "°F"},
    **{"radian": "rad", "foot": "ft", "feet": "ft", "inch": "in", "mile": "mi", "yard": "yd"},
    **{"pound": "lb", "ounce": "oz", "gallon": "gal", "dollar": "$", "usd": "$", "cent": "¢"},
    **{"euro": "€", "eur": "€", "gbp": "£", "yen": "¥", "jpy": "¥", "rupee": "₹", "inr": "₹"},
    **{"molar": "M", "atmosphere": "atm", "becquerel": "Bq", "gray": "Gy", "sievert": "Sv"},
    **{"lumen": "lm", "lux": "lx", "hectare": "ha", "acre": "acre", "bit": "bit"},
}
_POWERS = {"square": 2, "cubic": 3, "squared": 2, "cubed": 3}
_TERM = re.compile(
    r"\s*(?:(?P<operator>[·×*/]|per\b)|(?P<bracket>[()])|"
    r"(?P<word>[$€£¥₹₩₽¢°]|°?[^\W\d_]+)"
    r"(?:\s?\^\s*[{(]?\s*(?P<power>[-+]?[0-9]{1,3})\s*[)}]?|(?P<attached>[-+]?[0-9]{1,3}))?)"
)


def symbol(word: str) -> str | None:
    """A unit's one symbol, from its symbol or English name; None for any other word."""
    word = word.replace("\u00b5", "μ").replace("\u2126", "Ω")
    if word in _WHOLE or _PREFIXED.fullmatch(word):
        return re.sub("^([cdmμ]?)l$", r"\1L", word)
    if re.fullmatch("[u][msgLlAVFJWN]", word):
        return symbol("μ" + word[1:])
    name = word.lower()
    for singular in (name, name.removesuffix("s"), name.removesuffix("es")):
        if singular in _NAMES:
            return _NAMES[singular]
        for prefix, letter in _PREFIXES.items():
            rest = _NAMES.get(singular.removeprefix(prefix), "")
            if singular.startswith(prefix) and _PREFIXED.fullmatch(rest):
                return letter + rest
    return None


def leading(text: str) -> tuple[dict[str, int], int]:
    """The unit that a text begins with.

    Args:
      text: what stands after a number, such as `m/s^2 upwards`.

    Returns:
      The power of every symbol (empty if there is no unit) and where the unit ends.
    """
    unit: dict[str, int] = {}
    end, position, sign, factor, depth, last = 0, 0, 1, 1, 0, ""
    while match := _TERM.match(text, position):
        word = match["word"]
        if match["operator"]:
            if match["operator"] in ("/", "per"):
                sign = -1
        elif match["bracket"] == "(":
            if not (unit or sign < 0):
                break
            depth += 1
        elif match["bracket"]:
            if not depth:
                break
            depth, sign, end = depth - 1, 1, match.end()
        elif word.lower() in _POWERS:
            power = _POWERS[word.lower()]
            if word.lower() in ("squared", "cubed"):
                if not last:
                    break
                unit[last] *= power
                end = match.end()
            else:
                factor = power
        elif (found := symbol(word)) is None:
            break
        else:
            if found in ("C", "F") and last == "°":
                del unit["°"]
                found = "°" + found
            if found in ("°C", "°F"):
                unit.pop("°", None)
            unit[found] = unit.get(found, 0) + sign * factor * int(
                match["power"] or match["attached"] or 1
            )
            last, factor, end = found, 1, match.end()
            sign = sign if depth else 1
        position = match.end()
    return {name: power for name, power in unit.items() if power}, end
