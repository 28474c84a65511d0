"""Programs as answers: tests of a data set's row, verdicts from a sandbox, rewards and feedback.

A program is text here: it is run, and even parsed, in a sandbox only. For a program that reads a
text what it should print stays here too, and is compared with what it printed.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from pgpo_jax.tasks import workers
from pgpo_jax.tasks.answers import Outcome
from pgpo_jax.tasks.rows import RowError, column
from pgpo_jax.tasks.sandbox import Sandbox
from pgpo_jax.tasks.task import Question, TaskConfig, Verify

LONGEST = 100_000
"""Characters; a longer program is not run."""
MOST_SECONDS = 3600.0
BROKEN_SYNTAX = ("SyntaxError", "IndentationError", "TabError")
NO_PROGRAM = "The response has no program: give it as the last block between lines of ```."
TOO_LONG = f"The program has more than {LONGEST:,} characters."


class Test(NamedTuple):
    """One test of a program."""

    __test__ = False  # not one of pytest's

    code: str | None
    """Statements with `assert`, or a function `check(candidate)`; None: the program reads `input`
    and prints `output`."""
    input: str = ""
    output: str = ""


class Tests(NamedTuple):
    """The tests of a question."""

    __test__ = False

    public: tuple[Test, ...]
    """Those of which feedback may tell everything; run first."""
    hidden: tuple[Test, ...]
    """Those of which it tells no more than how a program fails."""
    entry_point: str | None = None
    """The function that `check` gets as `candidate`."""
    time_limit: float | None = None
    """Seconds for each test; None: the configuration's."""


# --- reading --------------------------------------------------------------------------------------


def read_tests(row: Mapping[str, Any]) -> Tests:
    """The tests of a row: columns `tests`, and optionally `public_tests`, `entry_point` and
    `time_limit`.

    Tests are a list of `{input, output}` or of assert statements, `{inputs, outputs}` with a list
    each, a text of code, or any of these as JSON text. With an entry point, `input` and `output`
    are arguments and result as JSON, an argument a line, as LiveCodeBench has them.

    Raises:
      RowError: No tests, tests that no program can pass, or none of these forms.
    """
    entry_point, seconds = row.get("entry_point"), row.get("time_limit")
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.strip()):
        raise RowError(f"got the entry point {str(entry_point)[:80]!r}; must be a function's name")
    if seconds is not None:
        if type(seconds) not in (int, float) or not 0 < seconds <= MOST_SECONDS:
            raise RowError(
                f"got the time limit {str(seconds)[:80]!r}; must be seconds, {MOST_SECONDS:g} at "
                "most"
            )
        seconds = float(seconds)
    public = () if row.get("public_tests") is None else _read(row["public_tests"], entry_point)
    hidden = tuple(test for test in _read(column(row, "tests"), entry_point) if test not in public)
    if not public and not hidden:
        raise RowError("got no tests; must have at least one in the column 'tests'")
    return Tests(public, hidden, entry_point, seconds)


def _read(value: Any, entry_point: str | None) -> tuple[Test, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip()[:1] in ("[", "{") else [value]
        except ValueError:
            value = [value]
    names = ("inputs", "outputs")
    if isinstance(value, Mapping) and not value.keys() & set(names):
        names = ("input", "output")  # as the `datasets` library has a list of `{input, output}`
    if isinstance(value, Mapping) and set(names) <= value.keys():
        pairs = [value[name] for name in names]
        if not all(isinstance(part, list) for part in pairs) or len(pairs[0]) != len(pairs[1]):
            raise RowError(f"got {' and '.join(names)}; must be lists of the same length")
        value = [{"input": one, "output": other} for one, other in zip(*pairs, strict=True)]
    if not isinstance(value, list):
        raise RowError(
            f"got the tests {str(value)[:80]}; must be a list of {{input, output}} or of assert "
            "statements, or code"
        )
    return tuple(_read_one(test, entry_point) for test in value)


def _read_one(test: Any, entry_point: str | None) -> Test:
    if isinstance(test, str):
        return Test(_checked(test, entry_point))
    if not isinstance(test, Mapping) or not {"input", "output"} <= test.keys():
        raise RowError(
            f"got the test {str(test)[:80]}; must be code with `assert`, or {{input, output}}"
        )
    given, expected = test["input"], test["output"]
    if entry_point is not None:
        return Test(_call(given, expected))
    if not isinstance(given, str) or not isinstance(expected, str):
        raise RowError(
            f"got the test {str(test)[:80]}; its input and output must be text (or give the "
            "function's name in the column 'entry_point')"
        )
    return Test(None, given, expected)


def _checked(code: str, entry_point: str | None) -> str:
    """Code of a test, which must be able to fail."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RowError(
            f"got the test {code[:80]!r}, {type(error).__name__}: {error}; must be Python code"
        ) from error
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if "check" in functions and entry_point is None:
        raise RowError(
            "got a test with check(candidate); must have the function's name in 'entry_point'"
        )
    able = (ast.Assert, ast.Raise)
    names = re.findall(r"\bassert|\bcheck\b", code)  # unittest has methods
    if not names and not any(isinstance(node, able) for node in ast.walk(tree)):
        raise RowError(f"got the test {code[:80]!r}, which cannot fail; must have an `assert`")
    return code


def _call(given: Any, expected: Any) -> str:
    """The test that a function gives a result for arguments."""
    try:
        lines = given.splitlines() if isinstance(given, str) else None
        arguments = given if lines is None else [json.loads(line) for line in lines if line.strip()]
        result = json.loads(expected) if isinstance(expected, str) else expected
        return f"assert candidate({', '.join(map(repr, list(arguments)))}) == {result!r}"
    except (TypeError, ValueError) as error:
        raise RowError(
            f"got the input {str(given)[:80]!r} and the output {str(expected)[:80]!r} of a "
            "function; must be JSON, one argument a line"
        ) from error


def find_program(response: str) -> str:
    """The program of a response: its last fenced block, or all of it where there is none.

    A block that is not closed ends with the response.
    """
    found, block, fence = None, [], ""
    for line in response.splitlines():
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if not fence and mark:
            fence, block = mark[1], []
        elif fence and mark and mark[1].startswith(fence) and not line.strip(" `~"):
            found, fence = block, ""
        elif fence:
            block.append(line)
    if fence:
        found = block
    return response if found is None else "\n".join(found)


# --- judging --------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """How a program does in a test."""

    kind: str
    """`passed`, `wrong`, `time`, `threads`, `output` (too much of it), `error`, `ended` (the
    process did, in the middle of its work) or `broken` (the sandbox or the test)."""
    output: str = ""
    """What it printed."""
    compared: tuple[str, str, str] | None = None
    """The expression of an assert, its value, and the value that was expected."""
    error: str = ""
    """The last line of its traceback."""
    type: str = ""
    """The built-in type of that error."""
    line: str = ""
    """Where it was raised: `line 3: return 1 / 0`."""
    loading: bool = False
    """It failed before anything of the test was run."""


def verify_programs(config: TaskConfig) -> Verify:
    """The check of programs as a task's `verify`.

    Equal programs for the same question are run once in a call. A test after which a program has
    run out of time is its last.

    Raises:
      InputError: There is no sandbox.
    """
    sandbox = Sandbox(config.sandbox)

    def judge(tests: Tests, program: str) -> Outcome:
        return judge_program(sandbox, tests, program, config)

    def verify(questions: Sequence[Question], responses: Sequence[str]) -> list[Outcome]:
        if len(questions) != len(responses):
            raise ValueError(f"{len(questions)} questions and {len(responses)} responses")
        programs = map(find_program, responses)
        keys = [question.key for question in questions]
        pairs = list(zip(keys, programs, strict=True))
        asked = list(dict.fromkeys(pairs))
        columns = {question.key: question.columns for question in questions}
        tests = {key: read_tests(row) for key, row in columns.items()}
        each = [(tests[key], program) for key, program in asked]
        found = workers.spread(judge, *zip(*each, strict=True), workers=config.workers)
        outcomes = dict(zip(asked, found, strict=True))
        return [outcomes[pair] for pair in pairs]

    return verify


def judge_program(sandbox: Sandbox, tests: Tests, program: str, config: TaskConfig) -> Outcome:
    """Runs a program's tests: the reward, and the feedback of the first that it fails."""
    if not program.strip():
        return Outcome(0.0, NO_PROGRAM, well_formed=False)
    if len(program) > LONGEST:
        return Outcome(0.0, TOO_LONG)
    seconds = config.time_limit if tests.time_limit is None else tests.time_limit
    total, passed = len(tests.public) + len(tests.hidden), 0
    failed: tuple[Test, Verdict] | None = None
    for test in (*tests.public, *tests.hidden):
        verdict = _run(sandbox, tests, test, program, seconds)
        if verdict.kind == "broken":
            return Outcome(0.0, failed=True)
        if verdict.kind == "passed":
            passed += 1
            continue
        failed = failed or (test, verdict)
        if not config.partial_credit or verdict.kind == "time" or verdict.loading:
            break
    if failed is None:
        return Outcome(1.0)
    told = feedback(*failed, public=failed[0] in tests.public, seconds=seconds)
    reward = passed / total if config.partial_credit else 0.0
    formed = failed[1].type not in BROKEN_SYNTAX
    return Outcome(reward, shorten(told, config.feedback_limit), formed)


def _run(sandbox: Sandbox, tests: Tests, test: Test, program: str, seconds: float) -> Verdict:
    if test.code is None:
        found = sandbox.run(program, test.input, seconds)
    else:
        found = sandbox.test(program, test.code, tests.entry_point, seconds)
    if found is None:
        return Verdict("broken")
    if found["why"] is not None:
        return Verdict(found["why"])
    said = found["said"]
    error, type_, line = (_text(said.get(name)) for name in ("error", "type", "line"))
    end = Verdict("error", error=error, type=type_, line=line)
    dead = Verdict("ended", error=_ending(found["code"]))
    if test.code is not None:
        kind, loading = said.get("kind", "ended"), bool(said.get("loading"))
        if kind == "ended":
            return dead._replace(loading=loading)
        compared = said.get("compared", ())
        if len(compared) == 3:
            called, given, expected = map(_text, compared)
            end = end._replace(compared=(called, given, expected))
        return end._replace(kind=kind, loading=loading)
    output = _text(found["output"])
    if found["full"]:
        return Verdict("output")
    if found["code"] == 0:
        return Verdict("passed" if same_output(output, test.output) else "wrong", output)
    if not error:
        return dead
    return end._replace(output=output, loading=type_ in BROKEN_SYNTAX)


def _ending(code: int) -> str:
    return f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def _text(value: Any) -> str:
    """What a program wrote, as text that a tokenizer takes."""
    text = value if isinstance(value, str) else ""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


_NUMBER = re.compile(r"[-+]?[0-9]{1,400}(?:\.[0-9]{0,400})?(?:[eE][-+]?[0-9]{1,3})?")


def same_output(given: str, expected: str) -> bool:
    """Whether a program printed what it should, as LiveCodeBench has it.

    Lines are equal but for white space around them, or else all their words are numbers of equal
    values (`1.0` is `1`).
    """
    pairs = [[line.strip() for line in text.strip().splitlines()] for text in (given, expected)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(map(_same_line, *pairs))


def _same_line(one: str, other: str) -> bool:
    if one == other:
        return True
    words = one.split(), other.split()
    return len(words[0]) == len(words[1]) and all(
        bool(_NUMBER.fullmatch(a) and _NUMBER.fullmatch(b)) and Decimal(a) == Decimal(b)
        for a, b in zip(*words, strict=True)
    )


# --- feedback -------------------------------------------------------------------------------------


def feedback(test: Test, verdict: Verdict, *, public: bool, seconds: float) -> str:
    """What the teacher is told of the first test that a program fails.

    Of a public test its input, what was expected and what came, or the error and its line of code;
    of a hidden one how the program failed, and nothing where its answer is just wrong. An error
    from before the test began is no secret of the test, so it is always told.
    """
    if verdict.loading:
        return "\n".join(filter(None, ["The program does not run.", *_error(verdict)]))
    if not public:
        known = getattr(builtins, verdict.type, None)
        name = verdict.type if isinstance(known, type) else ""
        told = {"error": name or "an error", **_failures(seconds)}.get(verdict.kind)
        return f"The program fails a hidden test: {told}." if told else ""
    if test.code is None:
        parts = ["The program fails for this input:", _part(test.input)]
        if verdict.kind == "wrong":
            parts += ["Expected output:", _part(test.output), "Its output:", _part(verdict.output)]
            return "\n".join(parts)
    elif verdict.compared is not None:
        called, given, expected = map(_part, verdict.compared)
        return f"The program fails a test: {called} gives {given}; expected {expected}"
    else:
        parts = ["The program fails this test:", _part(test.code)]
    told = _failures(seconds).get(verdict.kind)
    return "\n".join([*parts, *([f"It ended so: {told}."] if told else _error(verdict))])


def _error(verdict: Verdict) -> list[str]:
    return [part for part in (verdict.error, verdict.line) if part]


def _failures(seconds: float) -> dict[str, str]:
    return {
        "time": f"it takes more than {seconds:g} seconds",
        "output": "it prints too much",
        "threads": "it starts too many threads",
        "ended": "its process ended before the test did",
    }


def _part(text: str) -> str:
    return shorten(text.rstrip("\n"), 500)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters of a text: its beginning and its end."""
    if len(text) <= limit:
        return text
    mark = " ... " if limit > 20 else ""
    tail = (limit - len(mark)) // 2
    return text[: limit - len(mark) - tail] + mark + (text[-tail:] if tail else "")
