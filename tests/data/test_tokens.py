"""Prompt tokens: what a tokenizer writes around a text, and templates that read the clock."""

import pytest
from byte_level import make_tokenizer

from pgpo_jax import data, hf
from pgpo_jax.errors import InputError

QUESTION = [{"role": "user", "content": "1+1="}]
TURNS = (
    "{% for m in messages %}<|start|>{{ m['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)


@pytest.mark.parametrize("around", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_a_prompt_keeps_what_opens_it_and_never_ends_with_the_end_token(around):
    tokenizer = make_tokenizer(around=around)
    (tokens,) = data.encode(tokenizer, [QUESTION], max_length=9)
    assert tokenizer.decode(tokens) == ("<bos>" if "<bos>" in around else "") + "1+1="


def test_an_opening_token_that_stands_in_the_text_is_not_written_twice():
    tokenizer = make_tokenizer(around="<bos> $A")
    assert data.tokenize(tokenizer, ["<bos>x"]) == data.tokenize(tokenizer, ["x"])


def test_the_end_of_an_assistants_turn_is_found():
    assert hf.turn_end(make_tokenizer(template=TURNS)) == 2
    assert hf.turn_end(make_tokenizer()) is None
    plain = "{% for m in messages %}{{ m['content'] }}. {% endfor %}"
    assert hf.turn_end(make_tokenizer(template=plain)) is None


def test_a_templates_clock_stands_at_the_stated_date():
    tokenizer = make_tokenizer(template="Today: {{ strftime_now('%d %b %Y') }}. " + TURNS)
    text = data.render(tokenizer, QUESTION, {"strftime_now": "2026-01-31"})
    assert text.startswith("Today: 31 Jan 2026. ")


def test_a_date_that_is_none_and_a_clock_that_cannot_be_stopped_are_refused():
    tokenizer = make_tokenizer(template="{{ strftime_now('%Y') }}")
    with pytest.raises(InputError, match="must be a date"):
        data.render(tokenizer, QUESTION, {"strftime_now": "yesterday"})
    for template in (
        "{% set form = '%Y' %}{{ strftime_now(form) }}",
        "{{ strftime_now(format='%Y') }}",
        "{% set now = strftime_now %}{{ now('%Y') }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match="cannot be stopped"):
            data.render(tokenizer, QUESTION, {"strftime_now": "2026-01-31"})


@pytest.mark.parametrize(
    "template",
    [
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}",
        '{{ strftime_now ( "%d %b %Y" ) }}{# not strftime_now() #}',
        "{% set day = strftime_now('%d %b %Y') %}{{ day }}",
    ],
)
def test_every_usual_look_at_the_clock_is_stopped(template):
    tokenizer = make_tokenizer(template=template)
    assert data.render(tokenizer, QUESTION, {"strftime_now": "2026-01-31"}) == "31 Jan 2026"


def test_another_clock_than_the_templates_is_refused():
    tokenizer = make_tokenizer(template="{{ datetime.now() }}")
    with pytest.raises(InputError, match="'datetime' is undefined"):
        data.render(tokenizer, QUESTION)


def test_several_templates_without_a_default_are_refused_by_name():
    tokenizer = make_tokenizer(template={"tool_use": "{{ strftime_now('%Y') }}"})
    with pytest.raises(InputError, match="got no chat template"):
        data.render(tokenizer, QUESTION, {"strftime_now": "2026-01-31"})


def test_a_template_that_writes_no_answer_ends_none():
    drops = "{% for m in messages %}{% if m.role == 'user' %}<|turn|>{{ m.content }}{% endif %}"
    assert hf.turn_end(make_tokenizer(template=drops + "{% endfor %}")) is None


def test_the_name_of_a_special_token_is_letters_where_it_was_marked():
    tokenizer = make_tokenizer(template=TURNS)
    for text in ("a<|turn|>b", "<|start|><|turn|>", "<|turn|>" * 3, "<|tur<|turn|>n|>", "plain"):
        marked = data.letters(tokenizer, text)
        (tokens,) = data.tokenize(tokenizer, ["<|start|>" + marked])
        assert tokens[0] == 3
        assert not set(tokens[1:]) & {0, 1, 2, 3}
        assert tokenizer.decode(tokens[1:]) == text == data.unmarked(marked)


REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)


def test_a_system_message_that_a_template_refuses_begins_the_users_and_that_is_said_once():
    tokenizer = make_tokenizer(template=REFUSES + TURNS)
    system = [{"role": "system", "content": "Add."}]
    data.tokens._say_folded.cache_clear()
    with pytest.warns(UserWarning, match=r"refuses a system message \(.*no system role\)") as said:
        texts = [data.render(tokenizer, [*system, *QUESTION, *QUESTION]) for _ in range(2)]
    folded = [{"role": "user", "content": "Add.\n\n1+1="}, *QUESTION]
    assert texts == [data.render(tokenizer, folded)] * 2
    assert len(said) == 1


def test_what_a_template_refuses_for_another_reason_is_refused():
    system = [{"role": "system", "content": "Add."}]
    for template, messages in (
        (REFUSES + TURNS, system),
        ("{{ raise_exception('never') }}", [*system, *QUESTION]),
        ("{{ raise_exception('never') }}", QUESTION),
    ):
        with pytest.raises(
            InputError, match=r"chat template refuses the conversation '.*'.*: n(o|e)"
        ):
            data.render(make_tokenizer(template=template), messages)
