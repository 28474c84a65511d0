"""Compares mathematical expressions in a process of its own; started by ``verifiers.math``.

Run as a file, so that it imports neither jax nor the package. One JSON request ``[gold, given,
seconds]`` a line in, one JSON answer a line out: true, false, or null if an expression cannot be
parsed. The process ends when its input closes, and is ended by the system when a comparison takes
too long: symbolic algebra can hang in C code, where no exception gets through. Memory beyond its
limit is refused by the system too, which is an answer of null and the process's end, for its heap
may stay full. No file is written.
"""

import ast
import importlib.machinery
import json
import os
import resource
import signal
import sys
from typing import Any

LIMITS = {
    resource.RLIMIT_AS: 2**30,  # bytes; sympy needs 70 MB, a tower of powers takes all there is
    resource.RLIMIT_FSIZE: 0,  # no file is written
    resource.RLIMIT_CORE: 0,  # nor is a crash
}


class _LetMemoryErrorsPass(ast.NodeTransformer):
    """Puts `except MemoryError: raise` before the other handlers of every `try`."""

    def visit_Try(self, node: ast.Try) -> ast.Try:
        self.generic_visit(node)
        if node.handlers:
            kind = ast.Name("MemoryError", ast.Load())
            node.handlers.insert(0, ast.ExceptHandler(kind, None, [ast.Raise()]))
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        tree = _LetMemoryErrorsPass().visit(ast.parse(data))
        return super().source_to_code(ast.fix_missing_locations(tree), path)

    def get_code(self, fullname: str) -> Any:
        # Not by way of the bytecode on disk, which is that of the module as it was.
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder(importlib.machinery.PathFinder):
    """Imports math-verify so that it does not hide that memory ran out.

    It catches every exception, and takes what it catches for "not equal": a response that needs
    too much memory would be a wrong answer and not a failed check.
    """

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in ("math_verify.grader", "math_verify.parser"):
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def compare(gold: str, given: str) -> bool | None:
    """Whether two LaTeX expressions are equal; None if one of them cannot be parsed."""
    from math_verify import LatexExtractionConfig, parse, verify

    # As LaTeX only: plain expressions would go through sympy's parse_expr, which uses eval. The
    # clock is main's; pyright: math-verify states int, but documents None for "no clock".
    parsed = [
        parse(
            f"\\boxed{{{text}}}",
            [LatexExtractionConfig()],
            parsing_timeout=None,  # pyright: ignore[reportArgumentType]
        )
        for text in (gold, given)
    ]
    if not all(parsed):
        return None
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None))


def limit_resources() -> None:
    """Puts `LIMITS` on this process; the system enforces them, and they cannot be raised again."""
    for limit, value in LIMITS.items():
        resource.setrlimit(limit, (value, value))


def main() -> None:
    """Serves requests from stdin until it closes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # whatever a library prints is not an answer
    limit_resources()
    sys.meta_path.insert(0, _Finder)
    compare("1", "1")  # imports sympy before the clock runs
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        gold, given, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # the default action ends the process
        full = False
        try:
            verdict = compare(gold, given)
        except MemoryError:
            verdict, full = None, True
        except Exception:  # a response must not end the worker
            verdict = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=answers, flush=True)
        if full:
            break


if __name__ == "__main__":
    main()
