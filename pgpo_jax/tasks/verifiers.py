"""Pure text checks: multiple choice, boxed mathematics, exact, numeric, tool use.

A check is a function ``(response, answer) -> Outcome``. It never raises, whatever the response; a
time-out or an expression that cannot be parsed is a reward of 0 with ``failed`` set. Feedback is
made of fixed sentences, so that it cannot carry the right answer to the teacher.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import math as _math
import os
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from pgpo_jax.errors import InputError

WRONG = "The final answer is not correct."
NO_TAGS = "The response does not give its answer between <answer> and </answer>."


class Outcome(NamedTuple):
    """What a verifier says about one response."""

    reward: float
    """In [0, 1]."""
    feedback: str = ""
    """What the teacher may be told; empty if there is nothing to say. Never the right answer."""
    well_formed: bool = True
    """Whether the response has the requested format, right or wrong."""
    failed: bool = False
    """The check itself failed (time-out, nothing to parse): reward 0, and counted."""


def tagged_answer(response: str) -> tuple[str, bool]:
    """The text after the last ``<answer>``, up to the next ``</answer>``, stripped.

    Returns:
        That text (of the whole response if there is no ``<answer>``) and whether both tags stand.
    """
    _, opening, rest = response.rpartition("<answer>")
    text, closing, _ = rest.partition("</answer>")
    return text.strip(), bool(opening and closing)


def multiple_choice(response: str, answer: str, *, require_tags: bool = False) -> Outcome:
    """1 if the answer given is the letter; no feedback, as in SDPO (arXiv 2601.20802).

    Args:
        response: the student's text.
        answer: the letter.
        require_tags: refuse a bare letter, which the reference accepts.
    """
    text, tagged = tagged_answer(response)
    well_formed = tagged and len(text) == 1 and "A" <= text <= "Z"
    right = text == answer.strip() and (tagged or not require_tags)
    return Outcome(float(right), well_formed=well_formed)


def exact(response: str, answer: str, *, require_tags: bool = False) -> Outcome:
    """1 if the answer given (the whole response, if there are no tags) is the answer's text."""
    text, tagged = tagged_answer(response)
    if require_tags and not tagged:
        return Outcome(0.0, NO_TAGS, well_formed=False)
    right = text == answer.strip()
    return Outcome(float(right), "" if right else WRONG, well_formed=bool(text))


_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = rf"(?:(?<![0-9.])[-+])?(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_QUOTIENT = re.compile(rf"({_NUMBER})(?:\s*/\s*({_NUMBER}))?")


def _number(text: str) -> tuple[str, float] | None:
    """The last number in a text (as written and its value), a quotient such as 3/4 included."""
    boxed = last_boxed(text)
    found = _QUOTIENT.findall((text if boxed is None else boxed).replace("\u2212", "-"))
    if not found:
        return None
    above, below = (part.replace(",", "") for part in found[-1])
    value = float(above)
    if below:
        divisor = float(below)
        value = value / divisor if divisor else _math.inf
    return (f"{above}/{below}" if below else above), value


def numeric(
    response: str, answer: str, *, require_tags: bool = False, tolerance: float = 1e-6
) -> Outcome:
    """1 if the last number of the answer given equals the last number of the answer's text.

    Integers must agree in every digit; other numbers to a relative `tolerance`.
    """
    text, tagged = tagged_answer(response)
    if require_tags and not tagged:
        return Outcome(0.0, NO_TAGS, well_formed=False)
    given, gold = _number(text), _number(answer)
    if gold is None:
        return Outcome(0.0, failed=True)
    if given is None:
        return Outcome(0.0, "The response does not give a number.", well_formed=False)
    texts = [number.lstrip("+").lstrip("0") or "0" for number, _ in (given, gold)]
    if all(re.fullmatch(r"-?[0-9]+", number) for number in texts):
        right = texts[0] == texts[1]
    else:
        finite = _math.isfinite(given[1]) and _math.isfinite(gold[1])
        right = finite and _math.isclose(given[1], gold[1], rel_tol=tolerance, abs_tol=1e-12)
    return Outcome(float(right), "" if right else WRONG)


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` with balanced braces holds; None if there is none."""
    best: tuple[int, int] | None = None
    open_braces: list[tuple[int, bool]] = []
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if match[0] == "}":
            if open_braces:
                start, boxed = open_braces.pop()
                if boxed and (best is None or start > best[0]):
                    best = (start, match.start())
        elif match[0].endswith("{") and match[0] != "\\{":
            open_braces.append((match.end(), match[0] != "{"))
    return None if best is None else text[best[0] : best[1]]


def given_answer(response: str) -> str:
    """What a response gives as its answer, whatever the verifier: for majority votes.

    The last box, else the text between the last answer tags, else the whole text.
    """
    boxed = last_boxed(response)
    return (tagged_answer(response)[0] if boxed is None else boxed).strip()


def math(response: str, answer: str, *, time_limit: float = 5.0) -> Outcome:
    r"""1 if the last ``\boxed{...}`` equals the answer, literally or by math-verify.

    math-verify runs in a process of its own that is ended after `time_limit` seconds.

    Args:
        response: the student's text.
        answer: the expression, bare, between dollars or boxed.
        time_limit: seconds.
    """
    given, gold = last_boxed(response), last_boxed(answer)
    if given is None:
        return Outcome(0.0, "The response has no \\boxed{} answer.", well_formed=False)
    given = given.strip()
    gold = (answer if gold is None else gold).strip().strip("$").strip()
    if given == gold:
        return Outcome(1.0)
    if not given or len(given) > 2000:  # no answer is that long, and parsing it takes for ever
        return Outcome(0.0, WRONG, failed=True)
    verdict = _worker.compare(gold, given, time_limit)
    if verdict is None:
        return Outcome(0.0, WRONG, failed=True)
    return Outcome(float(verdict), "" if verdict else WRONG)


class _MathWorker:
    """``math_worker.py`` as a persistent process, started when needed, replaced when it ends.

    A plain child process and not multiprocessing: that would import the caller's main script again.
    """

    START_LIMIT = 120.0  # seconds; importing sympy on a busy machine

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._works = False  # whether it has ever started

    def compare(self, gold: str, given: str, seconds: float) -> bool | None:
        """The verdict, or None after a time-out, a crash or an expression that cannot be parsed."""
        with self._lock:
            if not self._running() and not self._start():
                return None
            assert self._process is not None
            assert self._process.stdin is not None
            request = json.dumps([gold, given, seconds]) + "\n"
            try:
                self._process.stdin.write(request.encode())
                answer = self._read(seconds + 2)  # the worker's own limit comes first
            except OSError:
                answer = None
            if answer is None:
                self.stop()
                return None
            return json.loads(answer)

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> bool:
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # an interrupt at the console is for the run, not for this
        )
        if self._read(self.START_LIMIT) is not None:
            self._works = True
            return True
        self.stop()
        if not self._works:  # not one response's fault, so not a reward of 0
            raise RuntimeError("the math-verify process does not start: pgpo_jax/math_worker.py")
        return False

    def _read(self, seconds: float) -> bytes | None:
        """One line of the worker's output, or None when time or the worker is over."""
        assert self._process is not None
        assert self._process.stdout is not None
        output, line, end = self._process.stdout.fileno(), b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([output], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(output, 4096) if ready else b""
            if not chunk:
                return None
            line += chunk
        return line

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None


_worker = _MathWorker()
atexit.register(_worker.stop)


def tool_use(response: str, answer: str) -> Outcome:
    """1 if the response calls the right tools in order with the right inputs.

    Args:
        response: lines ``Action: NAME`` and ``Action Input: JSON``, alternating.
        answer: a JSON list of ``{"Action": name, "Action_Input": object or its JSON text}``.

    The reference prints the gold calls in its feedback; this one only says what is wrong.
    """
    try:
        gold = [(str(call["Action"]), _input(call["Action_Input"])) for call in json.loads(answer)]
    except (ValueError, TypeError, KeyError, RecursionError):
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
    except (ValueError, RecursionError):
        return Outcome(0.0, "An action input is not valid JSON.", well_formed=False)
    if len(given) != len(gold):
        return Outcome(0.0, "The number of actions is not right.")
    if [name for name, _ in given] != [name for name, _ in gold]:
        return Outcome(0.0, "An action is not the right one.")
    right = given == gold
    return Outcome(float(right), "" if right else "An action input is not right.")


def tool_calls(answer: str) -> str:
    """The text that makes the calls of an answer of :func:`tool_use`; "" if it is not valid."""
    try:
        calls = json.loads(answer)
        return "\n".join(
            f"Action: {call['Action']}\nAction Input: {json.dumps(_input(call['Action_Input']))}"
            for call in calls
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""


def _input(value: Any) -> Any:
    return json.loads(value.strip() or "{}") if isinstance(value, str) else value


def require_math_verify() -> None:
    """Raises InputError where the extra is not installed, before a run and not in its middle."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(
            "task.verifier: got 'math', which needs math-verify: pip install 'pgpo-jax[math]'"
        )
