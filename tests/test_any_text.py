"""Any text through every verifier, the teacher's prompt and the data loaders: nothing raises but
`InputError` for data, and nothing is altered silently. With PGPO_JAX_LONG=1 ten thousand examples.
"""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reprompt import contexts, decoded, question

from pgpo_jax import tasks
from pgpo_jax.errors import InputError, printable
from pgpo_jax.tasks import formats, verifiers

# What checks, templates, JSON and terminals give a meaning to.
PIECES = st.sampled_from(
    (
        *("<answer>", "</answer>", "\\boxed{", "{", "}", "\\", "A", "1", "1,000", "/", "-", "e9"),
        *("Action: f\n", "Action Input: ", "[", '{"a": 1}', "\n", "\r", "\x00", "\x1b[31m", "\x85"),
        *("\ud800", "\udfff", "\u2028", "\u202e", "\ufeff", "٣", "\u2212", "9" * 50, '"', "%s"),
        *("{prompt}", "{solution}", "{demonstration}", "{feedback}", "{{ 7 * 7 }}", "{% raw %}"),
        *("{0.__class__}", "<think>", "</think>", "[user]", "\\frac", "^", "_", "$", "&", "!"),
    )
)
ANY = st.text(max_size=60) | st.lists(PIECES, max_size=20).map("".join)
UNICODE = ANY.map(lambda text: text.encode("utf-8", "replace").decode())  # no half surrogate pairs
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3),
    max_leaves=5,
)
GOLD = json.dumps([{"Action": "f", "Action_Input": {"a": 1}}])


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """So many examples in every run, and so many in a long one: minutes, before a release."""
    counts = [few, many] if os.environ.get("PGPO_JAX_LONG") else [few]
    return pytest.mark.parametrize("count", counts)


@examples(100, 4000)
def test_no_text_breaks_a_check(count):
    checks = [
        verifiers.multiple_choice,
        verifiers.exact,
        verifiers.numeric,
        verifiers.tool_use,
    ]

    @settings(max_examples=count)
    @given(ANY, ANY)
    def holds(response, answer):
        for check in checks:
            for gold in (answer, GOLD):
                outcome = check(response, gold)
                assert outcome.reward in (0.0, 1.0)
                assert not (outcome.failed and outcome.reward)
                assert not (outcome.feedback and outcome.reward)
        assert tasks.given_answer(response) in response
        verifiers.tool_calls(answer)

    holds()


@examples(20, 500)
def test_no_text_breaks_the_check_of_mathematics(count):
    pytest.importorskip("math_verify")

    @settings(max_examples=count)
    @given(ANY, ANY)
    def holds(response, answer):
        outcome = verifiers.math("\\boxed{" + response + "}", answer, time_limit=1.0)
        assert outcome.reward in (0.0, 1.0)
        assert not (outcome.failed and outcome.reward)

    holds()


@examples(100, 3000)
def test_question_demonstration_and_feedback_stand_in_the_teachers_prompt_as_they_are(count):
    @settings(max_examples=count)
    @given(UNICODE, UNICODE, UNICODE)
    def holds(prompt, success, feedback):
        result = contexts(
            [question(prompt, system="S", key="q")],
            [[success, "wrong"]],
            [[1.0, 0.0]],
            [["", feedback]],
            use_feedback="always",
            remove_thinking=False,
            max_length=100_000,
        )
        solution = f"\nCorrect solution:\n\n{success}"
        remark = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
        assert result.texts[1] == (
            f"[system]S[user]{prompt}{solution}{remark + feedback if feedback else ''}"
            "\n\nCorrectly solve the original question.[assistant]"
        )
        assert result.shortened == 0
        assert decoded(result) == result.texts

    holds()


@examples(100, 2000)
def test_a_row_is_read_as_it_is_or_refused(count, tmp_path):
    path = tmp_path / "questions.jsonl"
    config = tasks.TaskConfig(
        name="dataset", path=str(path), verifier="exact", test_fraction=0.0, require_tags=True
    )

    @settings(max_examples=count)
    @given(prompt=ANY | JSON, answer=ANY | JSON, system=st.none() | ANY, escape=st.booleans())
    def holds(prompt, answer, system, escape):
        row = {"prompt": prompt, "answer": answer, "system": system}
        line = json.dumps(row, ensure_ascii=escape)
        row = json.loads(line)  # two escapes that stand side by side may be one character of JSON
        prompt, answer, system = row.values()
        path.write_bytes(line.encode("utf-8", "surrogatepass"))
        try:
            (read,) = tasks.load(config).train
        except InputError:
            return
        messages = [] if system is None else [{"role": "system", "content": system}]
        assert [*read.messages] == [*messages, {"role": "user", "content": prompt}]
        assert read.answer == (answer if isinstance(answer, str) else json.dumps(answer))
        assert read.columns == row

    holds()


@examples(100, 2000)
def test_no_bytes_break_the_reader(count, tmp_path):
    path = tmp_path / "questions.jsonl"

    @settings(max_examples=count)
    @given(st.binary(max_size=40) | st.lists(st.sampled_from(b'{}[]":,\n\r\\ua0'), max_size=9))
    def holds(content):
        path.write_bytes(bytes(content))
        try:
            found = formats.read_file(Path(path))
        except InputError:
            return
        assert all(isinstance(row, dict) for _, row in found)

    holds()


@examples(100, 1000)
def test_a_line_for_the_console_is_the_text_without_what_a_terminal_obeys(count):
    @settings(max_examples=count)
    @given(ANY)
    def holds(text):
        shown = printable(text)
        assert all(character.isprintable() or character == "\n" for character in shown)
        shown.encode()
        if text.isprintable():
            assert shown == text

    holds()
