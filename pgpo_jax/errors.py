"""The exception a user causes, the one that the world causes, and how a command reports them."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class InputError(ValueError):
    """Bad input or configuration: one line with the field, what was got, and the rule or fix."""


class RunError(RuntimeError):
    """A run cannot go on for a reason outside of it, such as a full disk: one line, exit code 1."""


def command(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Runs a command's `main` and ends the process with its exit code.

    Args:
      main: Takes the arguments without the program's name; returns an exit code or None (0).
      argv: The arguments; those of this process when None.

    Raises:
      SystemExit: With the code that `main` returned, or with 2 after an `InputError` and 1 after a
        `RunError`, which become the single line `error: ...` on stderr. Every other exception
        passes through (a traceback and exit code 1).
    """
    try:
        code = main(sys.argv[1:] if argv is None else argv)
    except (InputError, RunError) as error:
        print("error: " + printable(" ".join(str(error).split())), file=sys.stderr, flush=True)
        code = 2 if isinstance(error, InputError) else 1
    raise SystemExit(code or 0)


def printable(text: str) -> str:
    """`text` for a console: what a terminal would obey or cannot show is written out, as `\\x1b`.

    A model's answer or a data set may hold escape sequences that move the cursor, rename the window
    or turn the direction of writing. Line ends stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def require(section: str, config: object, **rules: tuple[bool, str]) -> None:
    """Raises `InputError` for the first field of a config section whose rule does not hold.

    Numbers must be finite in every section: an infinite setting has no meaning that another one
    could not state, and ends as NaN parameters.

    Args:
      section: Name of the section, as in the configuration file; empty for the top level.
      config: The section's dataclass.
      **rules: Field name -> (whether the rule holds, the rule in words after "must be").
    """
    numbers = {name: value for name, value in vars(config).items() if isinstance(value, float)}
    finite = {name: (math.isfinite(value), "finite") for name, value in numbers.items()}
    for field, (holds, rule) in [*finite.items(), *rules.items()]:
        if not holds:
            name = f"{section}.{field}" if section else field
            raise InputError(f"{name}: got {getattr(config, field)!r}; must be {rule}")
