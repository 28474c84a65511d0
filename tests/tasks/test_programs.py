"""Programs as answers: what is found in a response, how tests are read, rewards and feedback."""

import json

import pytest

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import Outcome, TaskConfig, code, load, programs
from pgpo_jax.tasks.programs import Test, Verdict, find_program, read_tests, same_output
from pgpo_jax.tasks.rows import RowError
from pgpo_jax.tasks.sandbox import Sandbox

# ---- responses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("print(1)", "print(1)"),
        ("So:\n```python\nprint(1)\n```\nDone.", "print(1)"),
        ("```\na\n```\nbetter:\n```py\nb\n\nc\n```", "b\n\nc"),
        ("```python\nfor x in y:\n  pass", "for x in y:\n  pass"),  # cut off
        ("````\n```\ninner\n```\n````", "```\ninner\n```"),
        ("~~~\na\n~~~", "a"),
        ("```a``` is no block", "``` is no block"[:0]),
        ("```\n```", ""),
        ("", ""),
    ],
)
def test_a_program_is_the_last_block_or_the_whole_response(response, program):
    assert find_program(response) == program


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        (" 1 2 \n3", "1 2\n3\n\n", True),
        ("1\n\n2", "1\n2", False),
        ("1.0 2e0", "1 2", True),
        ("1.0 x", "1 x", False),  # words are compared as they are
        ("0.1", "0.10000000000000001", False),
        ("YES", "yes", False),
        ("nan", "NaN", False),
        ("", "", True),
        ("1e999 2", "1e999 3", False),
    ],
)
def test_outputs_are_compared_line_by_line_as_text_or_as_numbers(given, expected, same):
    assert same_output(given, expected) is same


# ---- tests ---------------------------------------------------------------------------------------

PAIR = {"input": "1\n", "output": "2"}


@pytest.mark.parametrize(
    ("row", "public", "hidden"),
    [
        ({"tests": [PAIR]}, (), (Test(None, "1\n", "2"),)),
        ({"tests": json.dumps([PAIR])}, (), (Test(None, "1\n", "2"),)),
        ({"tests": {"inputs": ["1\n"], "outputs": ["2"]}}, (), (Test(None, "1\n", "2"),)),
        ({"tests": {"input": ["1\n"], "output": ["2"]}}, (), (Test(None, "1\n", "2"),)),
        ({"tests": ["assert f(1) == 2"]}, (), (Test("assert f(1) == 2"),)),
        ({"tests": "assert f(1) == 2"}, (), (Test("assert f(1) == 2"),)),
        ({"tests": [PAIR], "public_tests": [PAIR]}, (Test(None, "1\n", "2"),), ()),
        (
            {"tests": [PAIR], "public_tests": ["assert f(1) == 2"]},
            (Test("assert f(1) == 2"),),
            (Test(None, "1\n", "2"),),
        ),
        (
            {"tests": [{"input": '[1]\n"a"', "output": "null"}], "entry_point": "f"},
            (),
            (Test("assert candidate([1], 'a') == None"),),
        ),
    ],
)
def test_tests_are_read_in_each_of_their_forms(row, public, hidden):
    assert read_tests(row)[:2] == (public, hidden)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "must have 'tests'"),
        ({"tests": []}, "got no tests; "),
        ({"tests": 3}, "got the tests 3; must be a list of"),
        ({"tests": [3]}, "got the test 3; must be code with `assert`, or"),
        ({"tests": [{"input": "1"}]}, "must be code with `assert`, or"),
        ({"tests": [{"input": [1], "output": "2"}]}, "its input and output must be text"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "must be lists of the same length"),
        ({"tests": ["f(1)"]}, "which cannot fail; must have an `assert`"),
        ({"tests": ["assert f(1"]}, "SyntaxError: .*; must be Python code"),
        ({"tests": ["assert " + "(" * 9999]}, "must be Python code"),
        ({"tests": "def check(candidate):\n  assert candidate(1)"}, "'entry_point'"),
        ({"tests": [PAIR], "entry_point": ""}, "got the entry point ''; must be"),
        ({"tests": [PAIR], "time_limit": 0}, "got the time limit '0'; must be seconds"),
        ({"tests": [PAIR], "time_limit": True}, "got the time limit 'True'"),
        ({"tests": [{"input": "x", "output": "1"}], "entry_point": "f"}, "must be JSON"),
    ],
)
def test_tests_that_no_program_can_pass_are_refused(row, said):
    with pytest.raises(RowError, match=said):
        read_tests(row)


# ---- feedback ------------------------------------------------------------------------------------

READS, CALLS = Test(None, "3\n", "6\n"), Test("assert f(3) == 6")
COMPARED = ("f(3)", "5", "6")
ERROR = Verdict("error", error="ZeroDivisionError: 3", type="ZeroDivisionError", line="line 1: 1/0")


@pytest.mark.parametrize(
    ("test", "verdict", "public", "told"),
    [
        (
            READS,
            Verdict("wrong", "5\n"),
            True,
            "The program fails for this input:\n3\nExpected output:\n6\nIts output:\n5",
        ),
        (
            READS,
            ERROR,
            True,
            "The program fails for this input:\n3\nZeroDivisionError: 3\nline 1: 1/0",
        ),
        (
            READS,
            Verdict("time"),
            True,
            "The program fails for this input:\n3\nIt ended so: it takes more than 2 seconds.",
        ),
        (
            CALLS,
            Verdict("wrong", compared=COMPARED),
            True,
            "The program fails a test: f(3) gives 5; expected 6",
        ),
        (CALLS, Verdict("wrong"), True, "The program fails this test:\nassert f(3) == 6"),
        # A hidden test: how, and nothing of what.
        (READS, Verdict("wrong", "5\n"), False, ""),
        (CALLS, Verdict("wrong", compared=COMPARED), False, ""),
        (READS, ERROR, False, "The program fails a hidden test: ZeroDivisionError."),
        (
            READS,
            ERROR._replace(type="Secret3"),
            False,
            "The program fails a hidden test: an error.",
        ),
        (
            CALLS,
            Verdict("time"),
            False,
            "The program fails a hidden test: it takes more than 2 seconds.",
        ),
        (
            CALLS,
            ERROR._replace(loading=True),
            False,
            "The program does not run.\nZeroDivisionError: 3\nline 1: 1/0",
        ),
    ],
)
def test_feedback_teaches_of_public_tests_and_gives_no_hidden_one_away(test, verdict, public, told):
    assert programs.feedback(test, verdict, public=public, seconds=2.0) == told


def test_feedback_is_cut_in_its_middle():
    assert programs.shorten("x" * 9, 9) == "x" * 9
    assert programs.shorten("a" * 50 + "b" * 50, 25) == "a" * 10 + " ... " + "b" * 10
    for limit in range(1, 40):
        assert len(programs.shorten("y" * 99, limit)) == limit


# ---- judging -------------------------------------------------------------------------------------


class Box(Sandbox):
    """A sandbox in which a program is the list of what becomes of its tests."""

    def __init__(self):
        self.asked = []

    def run(self, program, text, seconds):
        self.asked.append((text, seconds))
        found = json.loads(program)[int(text)]
        if isinstance(found, str):
            return None if found == "broken" else self._end(why=found)
        if isinstance(found, int):
            return self._end(code=found)
        return self._end(code=1, said=found)

    def _end(self, **changes):
        return {"why": None, "code": 0, "output": "", "full": False, "said": {}} | changes


def judged(ends, **changes):
    config = TaskConfig(name="code", **changes)
    pairs = [{"input": str(place), "output": ""} for place in range(len(ends))]
    tests, box = read_tests({"tests": pairs, "time_limit": 3}), Box()
    return programs.judge_program(box, tests, json.dumps(ends), config), box.asked


@pytest.mark.parametrize(
    ("ends", "all_tests", "part", "asked"),
    [
        ([0, 0, 0, 0], 1, 1, 4),
        ([0, 1, 0, 0], 0, 0.75, 4),
        ([0, "time", 0, 0], 0, 0.25, 2),  # time is not spent again
        ([0, "threads", 0, 1], 0, 0.5, 4),
    ],
)
def test_the_reward_is_for_all_tests_or_the_part_of_them(ends, all_tests, part, asked):
    assert judged(ends)[0].reward == all_tests
    outcome, calls = judged(ends, partial_credit=True)
    assert (outcome.reward, len(calls)) == (part, asked)
    assert {seconds for _, seconds in calls} == {3}, "the row's own limit"


def test_a_program_that_does_not_parse_is_run_once_and_one_that_breaks_the_sandbox_is_counted():
    error = {"error": "SyntaxError: invalid syntax", "type": "SyntaxError", "line": "line 1: x y"}
    outcome, calls = judged([error, error], partial_credit=True)
    assert (outcome.reward, outcome.well_formed, len(calls)) == (0, False, 1)
    assert judged(["broken"])[0] == Outcome(0.0, failed=True)
    config = TaskConfig(name="code")
    empty = programs.judge_program(Box(), read_tests({"tests": [PAIR]}), " \n", config)
    assert empty == Outcome(0.0, programs.NO_PROGRAM, well_formed=False)
    long = programs.judge_program(Box(), read_tests({"tests": [PAIR]}), "x" * 10**6, config)
    assert long == Outcome(0.0, programs.TOO_LONG)


# ---- the built-in task ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    try:
        return load(TaskConfig(name="code", train_questions=20, test_questions=10, workers=2))
    except InputError as error:
        pytest.skip(str(error))


def test_its_questions_come_in_the_seeds_order_and_none_twice():
    assert len({tuple(code.steps_of(i, 7)) for i in range(code.COUNT)}) == code.COUNT
    assert code.steps_of(0, 0) != code.steps_of(0, 1)


def test_its_solutions_take_the_steps_and_forgotten_brackets_give_something_else():
    for index in range(0, code.COUNT, 397):
        steps = code.steps_of(index, 3)
        for x in code.POINTS:
            assert eval(code.worked(steps).removeprefix(code.HEAD)) == code.value(steps, x)
        for forgotten in ([True], [False, True], [True, True]):
            wrong = code.worked(steps, forgotten).removeprefix(code.HEAD)
            assert any(eval(wrong) != code.value(steps, x) for x in code.POINTS)


def test_its_tokenizer_writes_prompts_and_programs_as_they_are(task):
    tokenizer, question = task.tokenizer, task.test[0]
    text = question.messages[0]["content"] + code.RIGHT + task.solution(question) + code.AGAIN
    told = programs.feedback(CALLS, Verdict("wrong", compared=COMPARED), public=True, seconds=1.0)
    for written, most in ((text, 36), (told, 60)):
        tokens = tokenizer(written)["input_ids"]
        assert tokenizer.decode(tokens) == written
        assert len(tokens) <= most and tokenizer.unk_token_id not in tokens


def test_its_examples_are_right_where_they_show_a_demonstration(task):
    import numpy as np

    examples = task.examples(np.random.default_rng(0), 16)
    outcomes = task.verify(*zip(*[(e.question, e.response) for e in examples], strict=True))
    shown = [outcome.reward for outcome in outcomes[1::2]]
    plain = [outcome.reward for outcome in outcomes[::2]]
    assert shown == [1.0] * 8
    assert 0 < sum(plain) < 8  # a quarter, in the long run
    told = [outcome.feedback for outcome in outcomes if outcome.reward == 0]
    assert all(text.startswith("The program fails a test: f(1) gives") for text in told)


# ---- data sets -----------------------------------------------------------------------------------

HUMAN_EVAL = {
    "prompt": "def double(x):\n    ...",
    "tests": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n"
    "    assert abs(candidate(0.5) - 1.0) < 1e-6\n",
    "entry_point": "double",
    "solution": "def double(x):\n    return 2 * x",
}
MBPP = {"prompt": "double", "tests": ["assert double(2) == 4", "assert double(3) == 6"]}
LIVE = {
    "prompt": "Double it.",
    "tests": [{"input": "2\n", "output": "4\n"}, {"input": "3\n", "output": "6\n"}],
    "public_tests": [{"input": "1\n", "output": "2\n"}],
}


def test_data_sets_of_each_form_are_judged(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (HUMAN_EVAL, MBPP, LIVE)))
    config = TaskConfig(
        name="dataset", path=str(path), verifier="code", test_fraction=0.0, workers=2
    )
    try:
        task = load(config)
    except InputError as error:
        pytest.skip(str(error))
    human_eval, mbpp, live = task.train
    assert task.demonstration is None, "two of three have no solution"
    assert task.solution is not None and task.solution(human_eval) == HUMAN_EVAL["solution"]
    double, reads = "def double(x): return x + x", "print(2 * int(input()))"
    pairs = [
        (human_eval, f"Here:\n```python\n{double}\n```", Outcome(1.0)),
        (human_eval, "def double(x): return 4", Outcome(0.0)),
        (mbpp, double, Outcome(1.0)),
        (mbpp, "def double(x): return 1 / 0", None),
        (live, reads, Outcome(1.0)),
        (live, reads, Outcome(1.0)),
        (live, "print(2)", Outcome(0.0)),
        (live, "print(3)", None),
        (live, "print(", None),
    ]
    outcomes = task.verify(*zip(*[pair[:2] for pair in pairs], strict=True))
    for outcome, (_, _, expected) in zip(outcomes, pairs, strict=True):
        assert expected is None or outcome == expected
    told = [outcomes[place].feedback for place in (3, 7, 8)]
    assert told[0] == "The program fails a hidden test: ZeroDivisionError."
    assert told[1].endswith("for this input:\n1\nExpected output:\n2\nIts output:\n3")
    assert told[2] == "The program does not run.\nSyntaxError: '(' was never closed\nline 1: print("
    assert [outcome.well_formed for outcome in outcomes] == [True] * 8 + [False]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": 0}, "task.workers: got 0; must be at least 1, or null"),
        ({"sandbox": "docker"}, "task.sandbox: got 'docker'; must be bubblewrap or none"),
        ({"feedback_limit": 0}, "task.feedback_limit: got 0; must be at least 1"),
        ({"require_tags": True}, "task.require_tags: got True; task.name = code does not read it"),
        ({"name": "addition", "workers": 2}, "task.workers: got 2; task.name = addition does not"),
        (
            {"name": "dataset", "path": "x", "verifier": "math", "partial_credit": True},
            "task.partial_credit: got True; no program of the model is run, so leave it out",
        ),
        (
            {"name": "dataset", "path": "x", "verifier": "exact", "workers": 3},
            "task.workers: got 3; it is for the verifiers math and code",
        ),
        (
            {"name": "dataset", "path": "x", "verifier": "exact", "columns": {"tests": "t"}},
            "task.columns: got .*; tests, public_tests, entry_point, time_limit are for the",
        ),
        ({"train_questions": 16384}, "task.train_questions: got 16384 and 256 held out; code has"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_fields_that_make_no_sense_are_refused_by_name(changes, said, monkeypatch):
    monkeypatch.setattr(programs, "Sandbox", lambda _: None)
    with pytest.raises(InputError, match=said):
        load(TaskConfig(**({"name": "code"} | changes)))
