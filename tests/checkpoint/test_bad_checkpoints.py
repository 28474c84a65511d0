"""A checkpoint that cannot be used costs one line and exit code 2: a table, as test_bad_input.py.

Each row damages a copy of a tiny checkpoint in three files, or the questions that it is asked.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from refusal import ARCHITECTURE, table, write_config
from safetensors.numpy import load_file, save_file

from pgpo_jax import hf
from pgpo_jax.tasks import addition

INDEX = "model.safetensors.index.json"
FIRST, SECOND, LAST = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint before any damage."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    section = hf.ModelSection(architecture=ARCHITECTURE, dtype="float32")
    graphdef, params, *_ = hf.from_section(section, None, jax.random.key(0))
    hf.save(path, graphdef, params, addition.make_tokenizer(), shard_bytes=6000)
    assert sorted(file.name for file in path.glob("*.safetensors")) == [FIRST, SECOND, LAST]
    return path


def tensors(**changes):
    """Tensors of the last file replaced, added (at their full name) or, with None, left out."""

    def damage(model: Path) -> None:
        found = load_file(model / LAST) | changes
        save_file({k: v for k, v in found.items() if v is not None}, model / LAST)

    return damage


def settings(name, **changes):
    """Fields of a JSON file replaced or, with None, left out."""

    def damage(model: Path) -> None:
        found = json.loads((model / name).read_text()) | changes
        kept = {key: value for key, value in found.items() if value is not None}
        (model / name).write_text(json.dumps(kept))

    return damage


def written(name, content):
    """A file with other content; None: without the file."""

    def damage(model: Path) -> None:
        (model / name).unlink()
        if content is not None:
            (model / name).write_bytes(content)

    return damage


def shards(name):
    """The index says that every tensor is in this file."""
    return settings(INDEX, weight_map={"model.norm.weight": name})


def cut_short(model: Path) -> None:
    (model / LAST).write_bytes((model / LAST).read_bytes()[:-1])


def a_larger_header(model: Path) -> None:
    """A header that promises 64 TB."""
    header = json.dumps(
        {"model.norm.weight": {"dtype": "F32", "shape": [2**44], "data_offsets": [0, 2**46]}}
    ).encode()
    (model / LAST).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)


NORM = "model.norm.weight"
IN_CONFIG = "they must be those of qwen3 as config.json states it, in float32, bfloat16, float16"


@table(
    {
        "a missing shard": (
            written(SECOND, None),
            f"model.path: got FOLDER/model without {SECOND}, which {INDEX} names; fetch what is "
            "missing",
        ),
        "a shard in another folder": (
            shards("../model.safetensors"),
            f"model.path: got the shard '../model.safetensors' in FOLDER/model/{INDEX}; must be "
            "the name of a .safetensors file in that folder",
        ),
        "a shard anywhere": (
            shards("/etc/passwd"),
            f"model.path: got the shard '/etc/passwd' in FOLDER/model/{INDEX}; must be the name of "
            "a .safetensors file in that folder",
        ),
        "a pickle for a shard": (
            shards("pytorch_model.bin"),
            f"model.path: got the shard 'pytorch_model.bin' in FOLDER/model/{INDEX}; must be the "
            "name of a .safetensors file in that folder",
        ),
        "an index without files": (
            settings(INDEX, weight_map=None),
            f"model.path: got FOLDER/model/{INDEX} without a weight_map of file names",
        ),
        "an index that is no JSON": (
            written(INDEX, b"<html>"),
            f"model.path: got FOLDER/model/{INDEX}, which cannot be read (...); must be JSON",
        ),
        "a truncated file": (
            cut_short,
            f"model.path: got FOLDER/model/{LAST}, which cannot be read (...); fetch it again",
        ),
        "a file of another kind": (
            written(LAST, b"version https://git-lfs.github.com/spec/v1\n"),
            f"model.path: got FOLDER/model/{LAST}, which cannot be read (...); fetch it again",
        ),
        "an empty file": (
            written(LAST, b""),
            f"model.path: got FOLDER/model/{LAST}, which cannot be read (...); fetch it again",
        ),
        "a header of 64 TB": (
            a_larger_header,
            f"model.path: got FOLDER/model/{LAST}, which cannot be read (...); fetch it again",
        ),
        "a tensor of the wrong shape": (
            tensors(**{NORM: np.ones(17, np.float32)}),
            f"model.path: got FOLDER/model with tensors 1 of the wrong shape ({NORM} [17] for "
            f"[16]); {IN_CONFIG}",
        ),
        "a tensor of the wrong type": (
            tensors(**{NORM: np.ones(16, np.int32)}),
            f"model.path: got FOLDER/model with tensors 1 of an unsupported type ({NORM} I32); "
            f"{IN_CONFIG}",
        ),
        "an extra tensor": (
            tensors(**{"model.extra": np.ones(1, np.float32)}),
            f"model.path: got FOLDER/model with tensors 1 unmapped (model.extra); {IN_CONFIG}",
        ),
        "a missing tensor": (
            tensors(**{NORM: None}),
            f"model.path: got FOLDER/model with tensors 1 missing ({NORM}); {IN_CONFIG}",
        ),
        "a tensor in two files": (
            tensors(**{"model.embed_tokens.weight": np.ones((16, 16), np.float32)}),
            "model.path: got FOLDER/model with model.embed_tokens.weight in both "
            f"{FIRST} and {LAST}; remove the file that is not the model's",
        ),
        "an unknown architecture": (
            settings("config.json", model_type="gpt2"),
            "model_type: got 'gpt2'; must be one of qwen3, qwen2, llama, olmo2, olmo3, mistral, "
            "ministral, smollm3, gemma3_text, granite",
        ),
        "no config.json": (
            written("config.json", None),
            "model.path: got FOLDER/model/config.json, which cannot be read (...); must be JSON",
        ),
        "a size that is no number": (
            settings("config.json", hidden_size="16"),
            "hidden_size: got '16'; must be a positive whole number",
        ),
        "more layers than anything has": (
            settings("config.json", num_hidden_layers=10**6, layer_types=None),
            "num_hidden_layers: got 1000000; must be at most 10000",
        ),
        "another number of layers": (
            settings("config.json", num_hidden_layers=2, layer_types=None),
            "model.path: got FOLDER/model with tensors 11 missing (...); " + IN_CONFIG,
        ),
        "a vocabulary that no memory holds": (
            settings("config.json", vocab_size=10_000_000),
            "model.path: got FOLDER/model with tensors 1 of the wrong shape "
            f"(model.embed_tokens.weight [16, 16] for [10000000, 16]); {IN_CONFIG}",
        ),
        "text for true": (
            settings("config.json", tie_word_embeddings="false"),
            "tie_word_embeddings: got 'false'; must be true or false",
        ),
        "text for a token": (
            settings("generation_config.json", eos_token_id="1"),
            "eos_token_id: got '1'; must be a token's number, or null",
        ),
        "a rotation by nothing": (
            settings("config.json", rope_theta=0, rope_parameters=None),
            "rope_parameters.rope_theta: got 0; must be a positive number",
        ),
        "quantised weights": (
            settings("config.json", quantization_config={"bits": 4}),
            "quantization_config: got {'bits': 4}; qwen3 is supported with None",
        ),
        "a vocabulary smaller than the tokenizer's": (
            settings("config.json", vocab_size=12),
            "model.path: got FOLDER/model with tensors 1 of the wrong shape "
            f"(model.embed_tokens.weight [16, 16] for [12, 16]); {IN_CONFIG}",
        ),
        "no tokenizer": (
            written("tokenizer.json", None),
            "model.path: got FOLDER/model, whose tokenizer does not load: there is none of "
            "tokenizer.json, tokenizer.model, vocab.json",
        ),
        "a broken tokenizer": (
            written("tokenizer.json", b"{"),
            "model.path: got FOLDER/model, whose tokenizer does not load: ...",
        ),
        "a tokenizer with code of its own": (
            settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]}),
            "model.path: got FOLDER/model, whose tokenizer needs code of its own (auto_map), which "
            "is never run; give a model with a tokenizer.json alone",
        ),
    }
)
def test_a_damaged_checkpoint_is_refused(given, expected, refused, whole, tmp_path):
    model = shutil.copytree(whole, tmp_path / "model")
    given(model)
    refused(expected, "train", write_config(model={"architecture": None, "path": str(model)}))


OTHERS = [{"prompt": f"1+{i}", "answer": "1"} for i in range(4)]
CHAT = [{"role": "system", "content": "1"}, {"role": "user", "content": "1+2"}]


@table(
    {
        "a prompt of a megabyte": (
            {"prompt": "1" * 2**20, "answer": "1"},
            "data.max_prompt_length: question 'train/questions.jsonl:1' "
            f"('{'1' * 57}...') has 1048577 tokens, must be at most 19; raise the limit or drop it",
        ),
        "a conversation without a chat template": (
            {"prompt": CHAT, "answer": "3"},
            "model.path: the tokenizer has no chat template, but the prompt is a conversation "
            "(system, user); use an instruct model, or plain text prompts without a system message",
        ),
    }
)
def test_questions_that_the_model_cannot_take_are_refused(
    given, expected, refused, whole, tmp_path
):
    model = shutil.copytree(whole, tmp_path / "model")
    if given["prompt"] == CHAT:
        (model / "chat_template.jinja").unlink()
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join([json.dumps(row) for row in [given, *OTHERS]]))
    refused(
        expected,
        "train",
        write_config(
            model={"architecture": None, "path": str(model)},
            task={"name": "dataset", "path": "questions.jsonl", "verifier": "exact"},
            data={"over_long": "error"},
        ),
    )
