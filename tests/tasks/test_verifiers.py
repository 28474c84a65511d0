"""Checks: what counts as right, and that no text breaks them."""

import json
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import (
    Outcome,
    exact,
    last_boxed,
    mathematics,
    multiple_choice,
    numeric,
    rewards,
    tool_use,
    user_code,
    verifiers,
)

needs_math = pytest.mark.skipif(
    mathematics.importlib.util.find_spec("math_verify") is None, reason="the extra `math` is absent"
)

PIECES = st.sampled_from(
    (
        *("<answer>", "</answer>", "\\boxed{", "{", "}", "\\", "A", "1", "1,000", "/", "-", "."),
        *("Action: f\n", "Action Input: ", "[", '{"a": 1}', "\n", "\x00", "\ud800", "٣", "\u2212"),
        *("e9", "9" * 50),
    )
)
TEXTS = st.text(max_size=60) | st.lists(PIECES, max_size=20).map("".join)
GOLD = json.dumps([{"Action": "f", "Action_Input": {"a": 1}}])


@given(TEXTS, TEXTS)
@example("[" * 100_000, "1")
@example("1" * 100_000 + "/0", "0")
@example("Action: f\nAction Input: " + "[" * 100_000, GOLD)
@settings(max_examples=300)
def test_no_text_breaks_a_check(response, answer):
    for check in (multiple_choice, exact, numeric, tool_use):
        for gold in (answer, GOLD):
            outcome = check(response, gold)
            assert outcome.reward in (0.0, 1.0)
            assert not (outcome.failed and outcome.reward)
            assert not (outcome.feedback and outcome.reward)
    last_boxed(response)


def test_hostile_lengths_take_linear_time():
    start = time.perf_counter()
    for piece in (
        "<answer>",
        "\\boxed{",
        "1,111",
        "1 ",
        "Action: f\n",
        "Action Input: x\ny\n",
        "{",
    ):
        for check in (multiple_choice, exact, numeric, tool_use):
            check(piece * 50_000, GOLD)
        last_boxed(piece * 50_000)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("response", "reward", "strict", "well_formed"),
    [
        ("<answer>B</answer>", 1, 1, True),
        ("<reasoning>x</reasoning>\n<answer>\nB\n</answer>\n", 1, 1, True),
        ("<answer>A</answer> no, <answer>B</answer>", 1, 1, True),
        ("<answer>B</answer> no, <answer>A</answer>", 0, 0, True),
        ("<answer>B", 1, 0, False),
        (" B\n", 1, 0, False),
        ("B</answer>C", 1, 0, False),
        ("The answer is B", 0, 0, False),
        ("<answer>b</answer>", 0, 0, False),
        ("<answer>B: two</answer>", 0, 0, False),
        ("", 0, 0, False),
    ],
)
def test_multiple_choice_reads_the_last_answer(response, reward, strict, well_formed):
    outcome = multiple_choice(response, "B")
    assert (outcome.reward, outcome.well_formed) == (reward, well_formed)
    assert multiple_choice(response, "B", require_tags=True).reward == strict
    assert outcome.feedback == ""


def test_exact_compares_the_whole_text_or_what_stands_between_the_tags():
    assert exact(" blue \n", "blue").reward == 1
    assert exact("It is <answer>blue</answer>", "blue").reward == 1
    assert exact("It is blue", "blue") == Outcome(0.0, "", True, False)
    strict = exact("blue", "blue", require_tags=True)
    assert (strict.reward, strict.well_formed) == (0, False)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("so 1,234 apples", "1234", 1),
        ("#### 42", "work\n#### 42", 1),
        ("\\boxed{0.5}", "1/2", 1),
        ("x = -3.", "-3", 1),
        ("3-5", "5", 0),
        ("\u22127", "-7", 1),
        ("1e3", "1000.0", 1),
        ("0.3333333", "1/3", 1),
        ("0.33", "1/3", 0),
        ("12345678", "12345679", 0),
        ("007", "7", 1),
        ("1/0", "1", 0),
        ("1" + "0" * 400, "1" + "0" * 400, 1),
        ("1e999", "1e999", 1),
        ("1e999", "1e998", 0),
        ("inf", "inf", 0),
        ("nan", "nan", 0),
    ],
)
def test_numeric_compares_the_last_number(response, answer, reward):
    assert numeric(response, answer).reward == reward


def test_a_response_without_a_number_is_not_well_formed():
    assert not numeric("none", "3").well_formed
    assert numeric("3", "none").failed


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed {x}", "x"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"{ \boxed{a}", "a"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_counts(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("response", "reward", "well_formed"),
    [
        ('Action: f\nAction Input: {"a": 1}', 1, True),
        ('Thought\nAction: f\nAction Input: {\n "a": 1\n}\n', 1, True),
        ('Action: g\nAction Input: {"a": 1}', 0, True),
        ('Action: f\nAction Input: {"a": 2}', 0, True),
        ('Action: f\nAction Input: {"a": 1}\nAction: f\nAction Input: {}', 0, True),
        ("Action: f\nAction Input: {a: 1}", 0, False),
        ("f(a=1)", 0, False),
    ],
)
def test_tool_use_compares_actions_and_inputs(response, reward, well_formed):
    outcome = tool_use(response, GOLD)
    assert (outcome.reward, outcome.well_formed) == (reward, well_formed)
    assert (outcome.feedback == "") == bool(reward)


@given(TEXTS)
def test_feedback_never_tells_the_right_answer(response):
    secret = "ZQX73915"
    gold = json.dumps([{"Action": secret, "Action_Input": {secret: secret}}])
    for check, answer in ((exact, secret), (numeric, "73915"), (tool_use, gold)):
        assert "73915" not in check(response, answer).feedback


def test_the_text_of_the_right_calls_is_right():
    assert tool_use(verifiers.tool_calls(GOLD), GOLD).reward == 1
    assert verifiers.tool_calls("not json") == ""


@needs_math
def test_math_accepts_equal_expressions_and_survives_a_hang():
    check = verifiers.math
    assert check(r"so \boxed{\frac{1}{2}}", "0.5").reward == 1
    assert check(r"\boxed{x+1}", "$1+x$").reward == 1
    assert check(r"\boxed{3}", r"the answer is \boxed{3}").reward == 1
    wrong = check(r"\boxed{4}", "3")
    assert wrong == Outcome(0.0, "", True, False)
    missing = check("4", "4")
    assert (missing.reward, missing.well_formed, missing.failed) == (0, False, False)
    assert check(r"\boxed{}", "3").failed
    assert check(r"\boxed{" + "1+" * 2000 + "1}", "3").failed
    start = time.perf_counter()
    hanging = check(r"\boxed{\left(\sum_{k=1}^{10^{9}} \sqrt{k+1}\right)}", "1", time_limit=0.5)
    assert hanging.failed
    assert time.perf_counter() - start < 5
    assert check(r"\boxed{2+2}", "4").reward == 1  # the process is replaced


@needs_math
@given(TEXTS)
@settings(max_examples=10)
def test_no_boxed_text_breaks_the_math_check(text):
    assert verifiers.math("\\boxed{" + text + "}", "1/2").reward in (0.0, 1.0)


def rewarded(function, count=2, **columns):
    keys = [f"q{row}" for row in range(count)]
    asked = rewards.Asked(["p"] * count, ["c"] * count, columns, keys)
    (given,) = rewards.call_rewards({"m:f": function}, asked)
    return given


@pytest.mark.parametrize(
    "returned",
    [
        [0.5, 1],
        [(0.5, "hint"), (1.0, None)],
        [{"reward": 0.5, "feedback": "hint"}, {"reward": 1}],
        {"reward": [0.5, 1.0], "feedback": ["hint", ""]},
        (0.5, True),
    ],
)
def test_rewards_may_come_with_feedback(returned):
    outcomes = rewarded(lambda prompts, completions, **columns: returned)
    assert [outcome.reward for outcome in outcomes] == [0.5, 1.0]
    assert outcomes[0].feedback in ("hint", "")
    assert outcomes[1].feedback == ""


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        ([1.0] * 3, "returned 3 rewards for 2 completions"),
        ([1.0, float("nan")], r"returned nan for completion 1 \(q1\); must return a finite number"),
        ([1.0, float("inf")], r"returned inf for completion 1 \(q1\)"),
        ([1.0, "1"], r"returned '1' for completion 1 \(q1\)"),
        ([1.0, (1.0, 2)], r"returned \(1.0, 2\) for completion 1 \(q1\)"),
        ([1.0, {"score": 1}], r"returned {'score': 1} for completion 1 \(q1\)"),
        ({"score": [1, 2]}, "returned {'score'"),
        ({"reward": [1, 2], "feedback": ["x"]}, "returned {'reward'"),
        (1.0, "returned 1.0;"),
        (None, "returned None;"),
        ("ab", "returned 'ab';"),
    ],
)
def test_what_a_reward_function_may_not_return_is_one_clear_error(returned, message):
    with pytest.raises(InputError, match=f"task.reward: m:f {message}"):
        rewarded(lambda prompts, completions, **columns: returned)


def test_a_raising_reward_function_is_one_clear_error():
    with pytest.raises(InputError, match=r"task.reward: m:f raised KeyError: 'answer'"):
        rewarded(lambda prompts, completions, **columns: columns["answer"])
    with pytest.raises(InputError, match=r"task.reward: m:f raised TypeError: .*answer"):
        rewarded(lambda prompts, completions: [1, 1], answer=["a", "b"])


def test_a_function_of_the_current_folder_can_be_imported(tmp_path, monkeypatch):
    (tmp_path / "own_rewards_of_a_test.py").write_text("def f(**_):\n    return [1]\n")
    (tmp_path / "broken_rewards_of_a_test.py").write_text("1/0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert user_code.import_function("own_rewards_of_a_test:f", "task.reward")() == [1]
    with pytest.raises(InputError, match="has no function 'g'"):
        user_code.import_function("own_rewards_of_a_test:g", "task.reward")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        user_code.import_function("broken_rewards_of_a_test:f", "task.reward")
    with pytest.raises(InputError, match=r"task.reward: got 'no_such_module:f'"):
        user_code.import_function("no_such_module:f", "task.reward")
