"""What a run says of its texts before it begins: prompt, ends, demonstration, and what is odd."""

import dataclasses
import json

import byte_level
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_level import ALPHABET
from refusal import ARCHITECTURE

from pgpo_jax import config as config_module
from pgpo_jax import data, distributions, fused, hf, losses
from pgpo_jax.errors import InputError
from pgpo_jax.fields import dump_yaml
from pgpo_jax.run import load_run
from pgpo_jax.run.preview import clip, preview
from pgpo_jax.sampler import rollout

ANSWER = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
ONE = "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|turn|>\n"
CHAT = "{% for m in messages %}" + ONE + "{% endfor %}" + ANSWER


def make_tokenizer(template=CHAT, *arguments, **named):
    return byte_level.make_tokenizer(template, *arguments, **named)


@pytest.fixture
def loaded(tmp_path):
    """`loaded(tokenizer, questions, **sections)`: a run of a tiny model with this tokenizer."""

    def load(tokenizer, questions=("1+1=?", "2+2=?"), **sections):
        rows = [{"prompt": text, "answer": "4"} for text in questions]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        size = max(tokenizer.get_vocab().values()) + 5
        section = hf.ModelSection(architecture={**ARCHITECTURE, "vocab_size": size})
        graphdef, params, *_ = hf.from_section(section, None, jax.random.key(0))
        hf.save(tmp_path / "model", graphdef, params, tokenizer)
        task = {"name": "dataset", "path": str(tmp_path / "rows.jsonl"), "verifier": "exact"}
        config = {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path / "model")},
            "task": {**task, "test_fraction": 0.0},
            "evaluation": {"every": 0},
            "mesh": {"data": 1},
            "sampling": {"max_response_length": 8},
            "reprompt": {"max_length": 400},
            "data": {"max_prompt_length": 200},
        }
        for name, fields in sections.items():
            config[name] = {**config[name], **fields}
        (tmp_path / "config.yaml").write_text(dump_yaml(config))
        return load_run(config_module.load(str(tmp_path / "config.yaml")))

    return load


def test_prompt_ends_and_demonstration_are_shown_as_the_model_has_them(loaded):
    lines, warnings = preview(loaded(make_tokenizer(), ("A question?",)))
    weights, prompt, ends, shown = lines
    assert weights.startswith("weights from model.safetensors in ")
    assert "'<|start|>user\\nA question?<|turn|>\\n<|start|>assistant\\n'" in prompt
    assert ", 30 tokens: " in prompt
    assert "'<eos>' (token 1) or '<|turn|>' (token 2, which ends a turn" in ends
    assert "'\\nCorrect solution:\\n\\n<answer>\\n4\\n</answer>" in shown
    assert shown.endswith("question.<|turn|>\\n<|start|>assistant\\n'")
    assert warnings == []


def test_a_long_text_is_shown_without_its_middle():
    text = clip("a" * 500 + "b" * 700)
    assert text == f"{'a' * 300!r} ... 600 characters left out ... {'b' * 300!r}"
    assert clip("short\n") == "'short\\n'"


SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1=?"}]
USERS = "{% for m in messages %}{% if m['role'] == 'user' %}" + ONE + "{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "questions", "said"),
    [
        (CHAT.replace(ANSWER, ""), ["1+1=?"], "has no generation prompt: a response begins right"),
        (USERS + ANSWER, [SYSTEM], "leaves out or alters the system message of question 'train"),
        ("<bos><bos>" + CHAT, ["1+1=?"], "the prompt begins with '<bos>' twice"),
        (CHAT, ["1+1=?"], "the tokenizer writes '<bos>' before a text, the chat template does not"),
        ("<bos>" + CHAT + "<eos>", ["1+1=?"], "the prompt ends with the end token '<eos>'"),
        (CHAT[:-11] + "<inner>{% endif %}", ["1+1=?"], "with '<inner>', which is not known"),
        (CHAT, ["1<|turn|>1", "2"], "1 of 2 questions hold the name of a special token"),
    ],
)
def test_what_a_user_may_not_have_meant_is_said(loaded, template, questions, said):
    _, warnings = preview(loaded(make_tokenizer(template, "<bos> $A"), questions))
    assert any(said in warning for warning in warnings), warnings


def test_a_template_that_writes_the_opening_token_gives_it_once(loaded):
    lines, warnings = preview(loaded(make_tokenizer("<bos>" + CHAT, "<bos> $A")))
    assert "'<bos><|start|>user" in lines[1]
    assert warnings == []


def test_without_a_chat_template_a_prompt_is_plain_text_and_that_is_said(loaded):
    lines, warnings = preview(loaded(make_tokenizer(None, "<bos> $A <eos>")))
    assert "'<bos>1+1=?'" in lines[1]
    assert lines[-1] == "no chat template: a prompt is the question's plain text"
    assert warnings == []
    with pytest.raises(InputError, match="has no chat template, but the prompt is a conversation"):
        loaded(make_tokenizer(None), [SYSTEM])


def test_a_system_message_that_a_template_refuses_stands_in_the_users_and_that_is_said(loaded):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    data.tokens._say_folded.cache_clear()
    with pytest.warns(UserWarning, match="the chat template refuses a system message"):
        lines, warnings = preview(loaded(make_tokenizer(refuses + CHAT), [SYSTEM]))
    assert r"Be brief.\n\n1+1=?" in lines[1]
    assert warnings == []


def test_a_template_that_is_not_the_same_twice_is_refused(loaded):
    random = "{{ range(99999) | random }}" * 4
    with pytest.raises(InputError, match=r"the chat template writes question .* in two ways"):
        loaded(make_tokenizer(random + CHAT))


def test_end_tokens_without_the_turns_end_are_said(loaded):
    _, warnings = preview(loaded(make_tokenizer(), sampling={"end_tokens": [1]}))
    assert "sampling.end_tokens lacks '<|turn|>' (token 2)" in warnings[0]


def test_a_run_keeps_the_date_of_its_first_day(loaded, tmp_path):
    template = "{{ strftime_now('%d %b %Y') }}\n" + CHAT
    first = loaded(make_tokenizer(template)).config.data.template_options
    assert set(first) == {"strftime_now"}
    (tmp_path / "run").mkdir()
    begun = {"data": {"template_options": {"strftime_now": "2020-01-31"}}}
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(begun))
    run = loaded(make_tokenizer(template))
    assert "31 Jan 2020" in preview(run).lines[1]


SPARSE = {text: i for i, text in enumerate(ALPHABET)}
SPARSE |= {"<bos>": 290, "<eos>": 300, "<|turn|>": 310, "<|start|>": 311}
GAPS = sorted({*range(312)} - {*SPARSE.values()})


def sparse_tokenizer():
    """Ids with gaps, and the token that ends a turn is the one that pads."""
    tokenizer = make_tokenizer(vocabulary=SPARSE)
    tokenizer.pad_token = "<|turn|>"
    assert len(tokenizer) == 260
    return tokenizer


@pytest.fixture
def sparse(loaded):
    """A run whose model finds all of its 316 rows equally probable."""
    run = loaded(
        sparse_tokenizer(), sampling={"num_samples": 16, "max_response_length": 64, "chunk": 16}
    )
    return run._replace(params=jax.tree.map(jnp.zeros_like, run.params))


def test_ids_between_the_tokenizers_are_never_drawn_and_end_tokens_above_them_are(sparse):
    sampling = sparse.policy.sampling
    assert (sampling.vocab_size, sampling.end_tokens) == (312, (300, 310))
    assert list(sampling.unknown_tokens) == GAPS
    asked = [question.messages for question in sparse.task.train]
    drawn = rollout(sparse.policy, sparse.params, asked, jax.random.key(0))
    tokens = drawn.responses[drawn.response_mask]
    assert np.isin(tokens, [*SPARSE.values()]).all()
    # The log-probabilities are those of what was drawn from: 260 tokens alike.
    np.testing.assert_allclose(
        drawn.log_probs[drawn.response_mask], -np.log(260), rtol=0, atol=1e-5
    )


def test_an_end_token_that_also_pads_ends_a_response_and_counts_in_it_once(sparse):
    asked = [question.messages for question in sparse.task.train]
    sampling = dataclasses.replace(sparse.policy.sampling, end_tokens=(310,))
    drawn = rollout(
        sparse.policy._replace(sampling=sampling), sparse.params, asked, jax.random.key(1)
    )
    ends = (drawn.responses == 310) & drawn.response_mask
    lengths = drawn.response_mask.sum(-1)
    ended = lengths < 64
    assert ended.any()
    assert (ends.sum(-1) == 1)[ended].all()
    last = np.take_along_axis(drawn.responses, lengths[..., None] - 1, axis=-1)[..., 0]
    assert (last[ended] == 310).all()
    assert not any("<|turn|>" in text for group in drawn.texts for text in group)


def test_the_loss_has_the_distribution_that_was_drawn_from(sparse):
    vocabulary = sparse.policy.sampling.vocabulary()
    logits = jax.random.normal(jax.random.key(0), (3, 316))
    masked = distributions.log_probs(distributions.mask_padding(logits, vocabulary))
    known = np.zeros(316, bool)
    known[[*SPARSE.values()]] = True
    expected = jax.nn.log_softmax(jnp.where(known, logits, -jnp.inf))
    np.testing.assert_allclose(masked[:, known], expected[:, known], atol=1e-5)
    np.testing.assert_allclose(jnp.exp(masked).sum(-1, where=~known), 0, atol=0)


def test_a_policy_that_has_not_moved_has_importance_weights_of_one(sparse):
    tokens = jnp.asarray([5, 300, 250])
    side = fused.Side(jnp.zeros((3, 16)), jnp.zeros((316, 16)))
    drawn = fused.Tokens(tokens, jnp.ones(3), jnp.full(3, -np.log(260), jnp.float32))
    vocabulary = sparse.policy.sampling.vocabulary()
    options = fused.Options(losses.DistillationConfig(), vocab_size=vocabulary)
    _, terms = fused.distill(side, side, drawn, options)
    np.testing.assert_allclose(terms.token_log_probs, -np.log(260), rtol=0, atol=1e-5)


@pytest.mark.parametrize("token", [GAPS[0], 299, 313])
def test_an_end_token_that_the_tokenizer_does_not_have_is_refused(loaded, token):
    with pytest.raises(InputError, match=rf"sampling.end_tokens: got \[{token}\], which the token"):
        loaded(sparse_tokenizer(), sampling={"end_tokens": [token]})


def test_end_tokens_of_another_tokenizer_in_a_checkpoint_are_left_out(loaded, tmp_path):
    loaded(sparse_tokenizer())
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [299, 300]}))
    config = config_module.load(str(tmp_path / "config.yaml"))
    assert load_run(config).policy.sampling.end_tokens == (300, 310)
