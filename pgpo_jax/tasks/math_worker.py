"""Compares mathematical expressions in a process of its own; started by `mathematics.py`.

Run as a file, so that it imports neither jax nor the package. One JSON request `[gold, given,
seconds]` a line in (`given` null: is the gold one that can be matched?), one JSON answer a line
out: true, false, or null if an expression cannot be parsed. The process ends when its input closes,
and is ended by the system when a comparison takes too long: symbolic algebra can hang in C code,
where no exception gets through. Memory beyond its limit is refused by the system too. The libraries
hide that and call it "not equal", so a comparison that made the process large and found nothing
equal is an answer of null; after it the process ends, for its heap may stay full. No file is
written.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMITS = {
    resource.RLIMIT_AS: 2**30,  # bytes; sympy needs 70 MB, a tower of powers takes all there is
    resource.RLIMIT_FSIZE: 0,  # no file is written
    resource.RLIMIT_CORE: 0,  # nor is a crash
}
GROWTH = 2**27
"""Bytes by which a process may grow until it is large."""
MARGIN = 2**26
"""Bytes below the limit from which on it is large."""
TOLERANCE = 1e-6
"""Relative; for decimal numbers in expressions (for numbers alone see `quantities.py`)."""
POINTS = ("17/13", "-5/7", "29/11")
"""Where expressions with variables are compared once more."""


def parse(text: str) -> list[Any]:
    """The expressions in a LaTeX text, at most one; empty if it cannot be parsed."""
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    # As LaTeX only: plain expressions would go through sympy's parse_expr, which uses eval. Units
    # stay, for `10c` is a product. The clock is main's; pyright: math-verify states int, but
    # documents None for "no clock".
    normal = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    return math_verify.parse(
        f"\\boxed{{{text}}}",
        [math_verify.LatexExtractionConfig(normalization_config=normal)],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )


def compare(gold: str, given: str) -> bool | None:
    """Whether two LaTeX expressions are equal; None if one of them cannot be parsed."""
    from math_verify import verify

    one, other = parse(gold), parse(given)
    if not one or not other:
        return None
    return bool(verify(one, other, timeout_seconds=None)) and agree(one[0], other[0])


def matchable(gold: str) -> bool | None:
    """Whether an expression equals itself, and a number not its successor; None: not parsed."""
    import sympy
    from math_verify import verify

    found = parse(gold)
    if not found:
        return None
    if not verify(found, found, timeout_seconds=None):
        return False
    number = isinstance(found[0], sympy.Expr) and found[0].is_number and found[0].is_finite
    if not number:
        return True
    return not (
        verify(found, [found[0] + 1], timeout_seconds=None) and agree(found[0], found[0] + 1)
    )


def agree(gold: Any, given: Any) -> bool:
    """Whether what math-verify calls equal has the same numbers.

    It rounds decimals to six places and takes what is below 1e-15 for 0, so that all small numbers
    are equal to it. Here numbers must be equal exactly, those with decimals to a relative
    `TOLERANCE`; expressions with variables at some points, and of lists every part.
    """
    import sympy

    gold, given = _value(gold, given), _value(given, gold)
    if isinstance(gold, sympy.MatrixBase) and isinstance(given, sympy.MatrixBase):
        return all(map(agree, gold.flat(), given.flat()))
    parts = _parts(gold), _parts(given)
    if parts[0] is not None and parts[1] is not None:
        return len(parts[0]) == len(parts[1]) and _matched(parts[0], parts[1])
    if not isinstance(gold, sympy.Expr) or not isinstance(given, sympy.Expr):
        return True  # sets without a list of elements, relations: as math-verify has it
    symbols = sorted(gold.free_symbols | given.free_symbols, key=str)
    if not symbols:
        return equal(gold, given)
    for shift in range(len(POINTS)):
        point: Any = {
            symbol: sympy.Rational(POINTS[(index + shift) % 3]) + index
            for index, symbol in enumerate(symbols)
        }
        try:
            if not equal(gold.subs(point), given.subs(point)):
                return False
        except (TypeError, ValueError):  # no number there
            continue
    return True


def _value(expression: Any, other: Any) -> Any:
    """The right side of an equation, where the other is none or both are of one symbol."""
    import sympy

    if not isinstance(expression, sympy.Eq):
        return expression
    if isinstance(other, sympy.Eq) and expression.lhs != other.lhs:
        return expression
    return expression.rhs


def _parts(expression: Any) -> Sequence[Any] | None:
    import sympy

    if isinstance(expression, sympy.Interval):
        return expression.args[:2]
    if isinstance(expression, sympy.FiniteSet | sympy.Tuple | sympy.And | sympy.Union):
        return expression.args
    return None


def _matched(gold: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether every part of the one has a part of the other; math-verify looked at their order."""
    rest = list(given)
    for part in gold:
        index = next((i for i, other in enumerate(rest) if agree(part, other)), None)
        if index is None:
            return False
        del rest[index]
    return True


def equal(gold: Any, given: Any) -> bool:
    """Equality of two numbers, exact or, where one has decimals, to a relative `TOLERANCE`."""
    import sympy

    gold, given = gold.doit(), given.doit()
    if gold == given or gold.is_infinite or given.is_infinite:
        return bool(gold == given)
    if gold.is_Rational and given.is_Rational:
        return False
    size = max(abs(gold.evalf(30)), abs(given.evalf(30)))
    # Evaluated until there are digits, at most 400: so many agree only in equal numbers.
    gap = abs((gold - given).evalf(30, maxn=400))
    decimals = gold.has(sympy.Float) or given.has(sympy.Float)
    return bool(gap <= size * (TOLERANCE if decimals else sympy.Float("1e-300")))


def limit_resources() -> None:
    """Puts `LIMITS` on this process; the system enforces them, and they cannot be raised again."""
    for limit, value in LIMITS.items():
        resource.setrlimit(limit, (value, value))


def peak() -> int:
    """The most bytes of address space that this process has had; elsewhere than on Linux 0."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.split("VmPeak:")[1].split()[0])


def main() -> None:
    """Serves requests from stdin until it closes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # whatever a library prints is not an answer
    limit_resources()
    compare("x+1", "1+x")  # imports sympy before the clock runs
    start = peak()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        gold, given, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # the default action ends the process
        full = False
        try:
            verdict = matchable(gold) if given is None else compare(gold, given)
        except MemoryError:
            verdict, full = None, True
        except Exception:  # a response must not end the worker
            verdict = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        full = full or peak() > min(start + GROWTH, limit - MARGIN)
        said = json.dumps(verdict or (None if full else verdict))
        print(f"!{said}" if full else said, file=answers, flush=True)
        if full:
            break


if __name__ == "__main__":
    main()
