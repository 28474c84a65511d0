"""Records, encoding, padding, buckets and the order of questions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgpo_jax import data
from pgpo_jax.errors import InputError
from pgpo_jax.tasks import addition

TOKENIZER = addition.make_tokenizer()


def user(text):
    return [{"role": "user", "content": text}]


@given(length=st.integers(0, 5000), maximum=st.integers(1, 5000))
def test_buckets_hold_the_length_within_the_maximum_and_waste_at_most_half(length, maximum):
    if length > maximum:
        with pytest.raises(ValueError, match="at most"):
            data.bucket(length, maximum)
        return
    size = data.bucket(length, maximum)
    assert length <= size <= maximum
    assert size <= max(16, 1.5 * length)


def test_buckets_are_few():
    sizes = {data.bucket(length, 8192) for length in range(8193)}
    assert len(sizes) == 19
    assert {16, 24, 32, 48, 64, 6144, 8192} <= sizes


def test_left_padding_ends_with_the_row_and_right_padding_begins_with_it():
    tokens, mask = data.left_pad([[5, 6], [7], []], 3)
    assert tokens.tolist() == [[0, 5, 6], [0, 0, 7], [0, 0, 0]]
    assert mask.tolist() == [[False, True, True], [False, False, True], [False] * 3]
    tokens, mask = data.right_pad([[5, 6], [7]], 3, pad=9)
    assert tokens.tolist() == [[5, 6, 9], [7, 9, 9]]
    assert mask.tolist() == [[True, True, False], [True, False, False]]
    assert tokens.dtype == np.int32
    with pytest.raises(ValueError, match="width"):
        data.left_pad([[1, 2, 3]], 2)


def test_every_epoch_asks_each_question_once_in_another_order():
    epochs = [
        np.concatenate([data.batch_indices(3, 4 * epoch + step, 12, 3) for step in range(4)])
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_last_partial_batch_is_dropped():
    seen = np.concatenate([data.batch_indices(0, step, 11, 4) for step in range(2)])
    assert len(set(seen.tolist())) == 8


def test_a_step_can_be_replayed_and_seeds_differ():
    first = data.batch_indices(1, 57, 100, 8)
    data.batch_indices(1, 0, 100, 8)
    assert data.batch_indices(1, 57, 100, 8).tolist() == first.tolist()
    assert data.batch_indices(2, 57, 100, 8).tolist() != first.tolist()


def test_fewer_questions_than_a_step_needs_is_an_error():
    with pytest.raises(InputError, match=r"data.questions_per_step: got 32.*10"):
        data.batch_indices(0, 0, 10, 32)


def test_prompts_end_where_the_response_begins():
    (row,) = data.encode(TOKENIZER, [user("12345+67890")], max_length=12)
    assert TOKENIZER.decode(row) == "12345+67890="


def test_an_over_long_prompt_is_an_error_that_names_the_question():
    with pytest.raises(
        InputError, match=r"data.max_prompt_length: question 'q7'.*12345.* 12 tokens.* at most 11"
    ):
        data.encode(TOKENIZER, [user("12345+67890")], max_length=11, names=["q7"])


def test_without_a_chat_template_plain_text_is_encoded_as_it_is():
    tokenizer = addition.make_tokenizer()
    tokenizer.chat_template = None
    (row,) = data.encode(tokenizer, [user("1+2")], max_length=8)
    assert tokenizer.decode(row) == "1+2"
    conversation = [{"role": "system", "content": "1"}, *user("1+2")]
    with pytest.raises(InputError, match="no chat template"):
        data.encode(tokenizer, [conversation], max_length=8)


def test_a_refusing_chat_template_is_an_input_error():
    tokenizer = addition.make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        data.encode(tokenizer, [user("1+2")], max_length=8)


def test_template_options_reach_the_chat_template():
    tokenizer = addition.make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ '' if enable_thinking else '#' }}"
    texts = [
        data.render(tokenizer, user("1"), {"enable_thinking": thinking})
        for thinking in (True, False)
    ]
    assert texts == ["1", "1#"]


def test_a_batch_has_one_row_per_response_in_question_order():
    prompts, prompt_mask = data.left_pad([[1], [2]], 2)
    responses = np.arange(2 * 3 * 4, dtype=np.int32).reshape(2, 3, 4)
    mask = responses % 2 == 0
    rollouts = data.Rollouts(
        prompts, prompt_mask, responses, mask, responses.astype(np.float32), [["x"] * 3] * 2
    )
    teacher, teacher_mask = data.left_pad([[row] for row in range(6)], 5)
    shown = data.TeacherPrompts(teacher, teacher_mask, np.arange(6) < 3, ["t"] * 6, 0)
    batch = data.make_examples(rollouts, shown)
    assert batch.prompts["student"][0][:, -1].tolist() == [1, 1, 1, 2, 2, 2]
    assert batch.prompts["teacher"][0][:, -1].tolist() == list(range(6))
    assert batch.responses.tolist() == responses.reshape(6, 4).tolist()
    assert batch.response_mask.tolist() == mask.reshape(6, 4).tolist()
    assert batch.sampler_log_probs.shape == (6, 4)
    with pytest.raises(ValueError, match="2 questions x 3 samples"):
        data.make_examples(rollouts, shown._replace(has_context=np.ones(5, bool)))


@pytest.mark.parametrize("name", ["questions_per_step", "max_prompt_length"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"data.{name}: got 0"):
        data.DataConfig(**{name: 0})
