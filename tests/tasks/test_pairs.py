"""Pairs of gold answer and response with their reward; golds that are refused; spellings."""

# ruff: noqa: RUF001 (the signs of formulas are meant)

import importlib.util
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpo_jax.tasks import quantities
from pgpo_jax.tasks.verifiers import VERIFIERS

# gold -> (responses that are right, responses that are wrong), inside the answer tags
NUMERIC = {
    "9.8 m/s^2": (
        ["9.8", "9.8 m/s^2", "9.8 m s^{-2}", "9.80", "9.8 meters per second squared"],
        ["2", "-9.8", "3.1 m/s^2", "9.8 m/s", "9.8 km/s^2", "9.8 to 10"],
    ),
    "1.5e-3": (
        ["0.0015", "1.5 × 10^{-3}", r"1.5 \times 10^{-3}", "1.5×10⁻³", "15e-4", "1.5 x 10^-3"],
        ["1.5", "-3", "1.5e3", "0.015", "1.5e-4"],
    ),
    "10^5": (["100000", "1e5", "100,000", "10⁵", "10 ^ {5}"], ["10", "5", "105", "50"]),
    r"\frac{3}{4}": (["0.75", "3/4", "¾", r"\dfrac34", "75%"], ["4", "3", "7/4 - 4", "34", "75"]),
    "1 1/2": (["1.5", "3/2", r"1\frac{1}{2}", "1½", "150 %"], ["1/2", "11/2", "2", "1"]),
    "1 000 000": (
        ["1000000", "1,000,000", r"1\,000\,000", "10^6", "1 million"],
        ["0", "1", "1000"],
    ),
    "$5": (
        ["5", "$5", "5 dollars", "$5.00", r"\$5"],
        ["-$5", "€5", "5 cents", "$5 million", "($5)"],
    ),
    "-5": (["−5", "-$5", "$-5", "–5", "minus 5", "(-5)", "- 5"], ["5", "(5)", "3-5", "x-5", "—5"]),
    "0": (["-0", "0.0", "0/7", "+0"], ["1e-12", "1e-300", "O"]),
    "50%": (["50 %", "0.5", "1/2", r"50\%", "50 percent"], ["50", "5%", "0.5%", "0.05"]),
    "work\n#### 72": (
        ["72", "72.", "x = 72", "about 72", "72 clips", r"\boxed{72}", "**72**", "#### 72", "$72$"],
        ["7", "2", "72!", "72x", "72-73", "1:12", "not 72", "72 or 73", "720", "7.2", "72k"],
    ),
    "72 clips": (["72", "72 clips"], ["27 clips", "clips", "72^2"]),
    "1e-12": (["0.000000000001", "1 × 10^{-12}"], ["2e-12", "0", "1e-13"]),
    "100000000000000000000": (["10^20", "1e20"], ["100000000000000000001", "1e21"]),
    "1/3": (["0.3333333", "2/6"], ["0.33", "0.333", "0.3333", "333333/1000000"]),
    "0.1234567": (["0.1234567", "1.234567e-1"], ["0.1234568", "0.1234566"]),
    "3": (
        ["３", "3 kg", "3.0", "9/3"],
        ["3:30", "1.2.3", "2024-01-03", "H2O", "x_3", "m^3", "3 + x"],
    ),
    "5 km": (["5 kilometers", "5"], ["5 m", "5 miles", "5000"]),
}
MATH = {
    "work\n#### 72": ([r"72", "72.0", r"72\text{ clips}", r"\$72"], ["24", "72x", r"72\%"]),
    "5m": (["5m", r"m \cdot 5"], ["5", "5n"]),
    "10c": (["10c"], ["10"]),
    r"1.6 \times 10^{-19}": ([r"1.60 \times 10^{-19}"], [r"6.63 \times 10^{-34}", "0"]),
    r"\frac{\pi}{10^{20}}": ([r"\pi \cdot 10^{-20}"], [r"\frac{\pi}{10^{21}}", "0"]),
    "10^{-20}x": ([r"\frac{x}{10^{20}}"], ["10^{-21}x"]),
    r"\{10^{-20}, 1\}": ([r"\{1, 10^{-20}\}"], [r"\{10^{-21}, 1\}"]),
    "10^{20}+1": (["100000000000000000001"], ["10^{20}"]),
    r"\sqrt{2}": ([r"2^{1/2}", "1.414214"], ["1.41", r"\sqrt{3}", "2"]),
    "2 3/4": (["2.75", r"\frac{11}{4}"], [r"\frac{5}{4}", r"\frac{3}{4}"]),
    "101_2": (["101_2", "101_{2}"], ["101", "101_3"]),
    "12:30": (["12:30"], ["2/5", "0.4"]),
    "x=5": (["5", "x = 5"], ["y=5", "x=6"]),
    "(1,2)": (["(1, 2)"], ["(2,1)", "(1,3)"]),
    r"\text{no solution}": (["no solution", r"\text{No solution}"], ["0", r"\text{one solution}"]),
    "1, 2": (["2, 1", "1,2"], ["1", "2", "1,3", "1.2"]),
    r"0.\overline{3}": ([r"\frac{1}{3}"], ["0.3"]),
    "3!": (["6"], ["3"]),
    "sqrt(2)": ([r"\sqrt{2}"], ["2"]),
    "yes": (["yes", r"\text{yes}"], ["no"]),
    r"3\sqrt{2}\text{ cm}": ([r"3\sqrt{2}"], [r"3\sqrt{2}\text{ m}"]),
}
CHOICE = {
    "B": (["B", " B\n", "Ｂ"], ["A", "b", "B: two", "", "AB"]),
    "(B)": (["B", "(B)"], ["A", "(A)"]),
    "B.": (["B", "B."], ["C"]),
    "b": (["b", "B"], ["a", "A"]),
    r"\text{B}": (["B"], ["D"]),
    "（B）": (["B"], ["C"]),
}
EXACT = {
    "Zu\u0308rich": (["Z\u00fcrich", "Zu\u0308rich"], ["Zurich", "z\u00fcrich"]),
    "Z\u00fcrich": (["Zu\u0308rich"], ["Zuerich"]),
    "x\u00b2": (["x\u00b2"], ["x2"]),
    "a\r\nb": (["a\nb"], ["a b", "ab"]),
    "\ufeffblue": (["blue"], ["Blue", "blue sky"]),
}
PAIRS = [
    (name, gold, form.format(response), float(right))
    for name, table, form in (
        ("numeric", NUMERIC, "<answer>{}</answer>"),
        ("math", MATH, "so \\boxed{{{}}}"),
        ("multiple_choice", CHOICE, "<answer>{}</answer>"),
        ("exact", EXACT, "<answer>{}</answer>"),
    )
    for gold, lists in table.items()
    for right, responses in zip((True, False), lists, strict=True)
    for response in responses
]
FREE = [
    ("72", "48/2 = 24.\n48+24 = <<48+24=72>>72. The answer is 72.", 1),
    ("72", "In step 3 we get 72", 1),
    ("5", "It takes 5 L of H2O", 1),
    ("5", "So r = 5. The answer is x^2.", 0),
    ("5", "So r = 5. The answer is seven.", 0),
    ("6", "With 3 apples at $2 each the total is $6.", 1),
    ("5", "The answer is not 5", 0),
    ("5", "between 3 and 5", 0),
]
JSON_CALL = '[{"Action": "f", "Action_Input": {"a": 1}}]'
TOOLS = [('{"a": 1}', 1), ('{"a": 1.0}', 1), ('{"a": true}', 0), ('{"a": 2, "a": 1}', 0), ("{}", 0)]
REFUSED = [
    *(
        ("numeric", gold)
        for gold in ("3:2", "3,14", "0,5", "1.000.000", "3-5", "3 or 5", "5k", "5!")
    ),
    *(
        ("numeric", gold)
        for gold in ("300K", "2x", "($5)", "1/0", "June 20", "seven", "x = 1, y = 2")
    ),
    *(
        ("numeric", gold)
        for gold in ("NaN", "Infinity", "at least 5", "2024-01-05", "2 345/400", "٣")
    ),
    *(("multiple_choice", gold) for gold in ("1", "y", "A, C", "yes", "A. Einstein", "")),
    *(
        ("math", gold)
        for gold in (r"\boxed{1} or \boxed{2}", "3,14", "3 + x apples", r"\frac{1}{0}")
    ),
    ("exact", " \ufeff"),
    ("tool_use", "f(1)"),
]


def needs(name):
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        pytest.skip("the extra `math` is absent")


@pytest.mark.parametrize(("name", "gold", "response", "reward"), PAIRS)
def test_a_response_gets_its_reward(name, gold, response, reward):
    needs(name)
    verifier = VERIFIERS[name]
    outcome = verifier.check(response, verifier.read_gold(gold, {}))
    assert outcome.reward == reward


def test_the_table_of_pairs_is_long():
    assert len(PAIRS) + len(FREE) + len(TOOLS) >= 150


@pytest.mark.parametrize(("gold", "response", "reward"), FREE)
def test_without_tags_the_last_statement_counts(gold, response, reward):
    assert VERIFIERS["numeric"].check(response, gold).reward == reward


@pytest.mark.parametrize(("given", "reward"), TOOLS)
def test_inputs_of_tools_are_equal_as_json(given, reward):
    response = f"Action: f\nAction Input: {given}"
    assert VERIFIERS["tool_use"].check(response, JSON_CALL).reward == reward


@pytest.mark.parametrize(("name", "gold"), REFUSED)
def test_a_gold_that_is_not_one_answer_is_refused(name, gold):
    needs(name)
    with pytest.raises(ValueError, match=r"\w"):
        VERIFIERS[name].read_gold(gold, {})


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("y", ["x", "y"], "B"),
        ("B", ["x", "y"], "B"),
        ("y", {"label": ["A", "B"], "text": ["x", "y"]}, "B"),
        ("C", ["x", "y"], None),
        ("A", ["B", "A"], None),
        (1, ["x", "y"], None),
        ("y", ["y", "y"], None),
    ],
)
def test_an_option_is_named_by_its_letter_or_its_text(answer, options, letter):
    row = {"answer": answer, "choices": options}
    if letter is None:
        with pytest.raises(ValueError, match=r"option|of"):
            VERIFIERS["multiple_choice"].read_gold(str(answer), row)
    else:
        assert VERIFIERS["multiple_choice"].read_gold(answer, row) == letter


SPELLINGS = [
    lambda d: f"{d:f}",
    lambda d: f"{d:e}",
    lambda d: f"{d:,f}",
    lambda d: f"{d:,f}".replace(",", "\u2009"),
    lambda d: "{} \\times 10^{{{}}}".format(*f"{d:e}".split("e")).replace("{+", "{"),
    lambda d: "\\frac{{{}}}{{{}}}".format(*d.as_integer_ratio()),
    lambda d: f"{d:f} m/s^2",
    lambda d: f"x = {d:f}.",
    lambda d: f"{d * 100:f}%",
    lambda d: f"\\boxed{{{d:f}}}",
    lambda d: f"{d:f}".replace("-", "\u2212"),
]
DECIMALS = st.decimals(-(10**9), 10**9, places=4)


@given(DECIMALS, DECIMALS, st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS))
@settings(max_examples=400)
def test_a_number_is_equal_to_itself_in_every_spelling_and_to_no_other(
    one, other, spell, spell_too
):
    check = VERIFIERS["numeric"].check
    gold = spell(one)
    assert check(f"<answer>{spell_too(one)}</answer>", gold).reward == 1
    for different in {other, one + Decimal("0.0001"), -one, one * 10} - {one}:
        if "frac" in gold and "frac" not in spell_too(different):
            continue  # a decimal number may be a rounded quotient
        assert check(f"<answer>{spell_too(different)}</answer>", gold).reward == 0


@given(st.integers(-(10**30), 10**30), st.integers(1, 3))
def test_whole_numbers_are_compared_in_every_digit(number, step):
    assert not quantities.equal(quantities.read(f"{number}"), quantities.read(f"{number + step}"))
    assert quantities.equal(quantities.read(f"{number}"), quantities.read(f"{number:,}"))
