"""Text of responses: what was drawn, without the tokens that bound it."""

import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pgpo_jax import hf
from pgpo_jax.sampler.rollout import _texts

SPECIAL = ("<bos>", "<end>", "<pad>", "<tool_call>", "<think>")


def make_tokenizer():
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({text: i for i, text in enumerate(vocabulary)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=["<tool_call>", "<think>"],
    )


def read(tokenizer, drawn, ends=(1,)):
    tokens = np.array(tokenizer(drawn, add_special_tokens=False)["input_ids"])[None, None]
    return _texts(tokenizer, tokens, np.ones_like(tokens, bool), ends)[0][0]


def test_what_only_bounds_a_response_is_no_text_and_every_other_token_is():
    tokenizer = make_tokenizer()
    drawn = "<bos><think>a<tool_call>b<end><pad>"
    assert read(tokenizer, drawn) == "<think>a<tool_call>b"
    assert read(tokenizer, drawn, ends=(1, 3)) == "<think>ab"


def test_spaces_before_punctuation_stay_whatever_the_tokenizer_says(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    }
    path.write_text(json.dumps(settings))
    drawn = "if x != y , stop ."
    assert read(hf.load_tokenizer(tmp_path), drawn) == drawn
