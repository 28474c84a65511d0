"""GGUF files (llama.cpp's format) of the Llama family as Hugging Face config, tensors, tokenizer.

The `gguf` package (extra `gguf`) reads and dequantises the format, in numpy. What it does not know
is written here: which metadata key is which config field, which tensor is which parameter, and how
the tokenizer cuts text.

Left out: sentencepiece vocabularies (Llama 2), mixtures of experts, YaRN, files in shards.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pgpo_jax.errors import InputError
from pgpo_jax.models import ModelConfig, rope


class Family(NamedTuple):
    """What tells one supported `general.architecture` from another."""

    class_name: str
    """The transformers class; the architecture's own name is the `model_type`."""
    permuted: bool
    """Whether llama.cpp permutes the rows of q and k (its Llama rotates neighbours, not halves)."""
    attention: tuple[str, ...] = ()
    """Tensors of the attention beyond the four matrices."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", permuted=True),
    "qwen2": Family("Qwen2ForCausalLM", False, ("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    "qwen3": Family("Qwen3ForCausalLM", False, ("attn_q_norm.weight", "attn_k_norm.weight")),
}

# GGUF name -> (Hugging Face name, shape). Sizes: v vocabulary, d hidden, f feed-forward, h head,
# q all query heads, k all key heads.
OUTER = {
    "token_embd.weight": ("model.embed_tokens.weight", "vd"),
    "output_norm.weight": ("model.norm.weight", "d"),
    "output.weight": ("lm_head.weight", "vd"),
}
LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", "d"),
    "attn_q.weight": ("self_attn.q_proj.weight", "qd"),
    "attn_k.weight": ("self_attn.k_proj.weight", "kd"),
    "attn_v.weight": ("self_attn.v_proj.weight", "kd"),
    "attn_output.weight": ("self_attn.o_proj.weight", "dq"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "d"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "fd"),
    "ffn_up.weight": ("mlp.up_proj.weight", "fd"),
    "ffn_down.weight": ("mlp.down_proj.weight", "df"),
}
ATTENTION = {
    "attn_q.bias": ("self_attn.q_proj.bias", "q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "k"),
    "attn_v.bias": ("self_attn.v_proj.bias", "k"),
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "h"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "h"),
}

# Every `<architecture>.` key we read or may safely ignore; any other one with a value is an error.
KNOWN_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}

# Llama 3.1's and 3.2's constants; the file holds only the factors that follow from them.
LLAMA3_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Control tokens that end a turn or a document, recognised by their text as in llama.cpp.
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of the format's token types

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class Splitting(NamedTuple):
    """How a vocabulary's merges were learned: `tokenizer.ggml.pre`."""

    pattern: str | None = None
    """Regular expression of the pieces; None is GPT-2's, built into `tokenizers`."""
    digits: bool = False
    """Every digit is a piece of its own, cut before anything else."""
    nfc: bool = False
    """Text is normalised to NFC first."""
    whole_words: bool = False
    """A piece that is itself a token stays whole, whatever the merges say."""


SPLITTINGS = {
    "gpt-2": Splitting(),
    "smollm": Splitting(digits=True),
    "qwen2": Splitting(_QWEN2, nfc=True),
    "deepseek-r1-qwen": Splitting(_QWEN2, nfc=True),
    "llama-bpe": Splitting(_LLAMA3, whole_words=True),
    "llama3": Splitting(_LLAMA3, whole_words=True),
    "llama-v3": Splitting(_LLAMA3, whole_words=True),
}


class File(NamedTuple):
    """An open GGUF file: metadata in memory, tensors mapped."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, Any]
    """Name -> `gguf.gguf_reader.ReaderTensor`."""


class Tensor(NamedTuple):
    """One tensor under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]
    """Dequantises it: float32 `[*shape]`."""


def read(path: str | os.PathLike) -> File:
    """Opens a GGUF file; tensors stay on disk until they are loaded.

    Raises:
      InputError: The `gguf` package is missing, or this is no GGUF file that it can read.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            "convert gguf: the package gguf is not installed; pip install 'pgpo_jax[gguf]'"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"SOURCE: {path} is no readable GGUF file ({error})") from error
    if reader.byte_order != "I":
        raise InputError(f"SOURCE: {path} has another byte order than this machine")
    if metadata.get("split.count", 0) > 1:
        raise InputError(f"SOURCE: {path} is one of several shards; merge them with gguf-split")
    return File(str(path), metadata, {tensor.name: tensor for tensor in reader.tensors})


def _bad(file: File, problem: str) -> InputError:
    return InputError(f"SOURCE: {file.path} {problem}")


def config(file: File) -> dict[str, Any]:
    """The Hugging Face `config.json` of the model in `file`.

    Raises:
      InputError: An architecture, setting or value that we would get wrong.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise _bad(file, f"has the architecture {architecture!r}; supported: {', '.join(FAMILIES)}")
    settings = {
        name.removeprefix(f"{architecture}."): value
        for name, value in file.metadata.items()
        if name.startswith(f"{architecture}.")
    }
    unknown = sorted(name for name in settings if settings[name] and name not in KNOWN_KEYS)
    if unknown:
        found = ", ".join(f"{architecture}.{name} = {settings[name]!r}" for name in unknown)
        raise _bad(file, f"has settings that are not supported: {found}")
    required = [
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
    ]
    missing = [f"{architecture}.{name}" for name in required if name not in settings]
    if "token_embd.weight" not in file.tensors:
        missing.append("token_embd.weight")
    if missing:
        raise _bad(file, f"lacks {', '.join(missing)}")

    heads = settings["attention.head_count"]
    kv_heads = settings.get("attention.head_count_kv", heads)  # the format's default
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and heads > 0 < kv_heads):
        raise _bad(file, f"has {heads} heads and {kv_heads} key heads; one positive number each")
    hidden = settings["embedding_length"]
    head_dim = settings.get("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if settings.get(name, head_dim) != head_dim:
            raise _bad(
                file,
                f"has {architecture}.{name} = {settings[name]}; it must be the head"
                f" dimension, {head_dim}",
            )
    theta = _shortest(settings.get("rope.freq_base", 10000.0))  # the format's default
    tokenizer = {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    result = {
        "architectures": [FAMILIES[architecture].class_name],
        "model_type": architecture,
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": settings["feed_forward_length"],
        "num_hidden_layers": settings["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": settings["context_length"],
        "rms_norm_eps": _shortest(settings["attention.layer_norm_rms_epsilon"]),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, settings, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
        **tokenizer,
    }
    ModelConfig.from_hf(result)  # what our model cannot compute is better refused here
    return result


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    file: File, settings: dict[str, Any], theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Linear scaling as the file states it, or Llama 3's from the factors that follow from it."""
    kind = settings.get("rope.scaling.type", "none")
    tensor = file.tensors.get("rope_freqs.weight")
    if kind == "linear" and tensor is None:
        return {
            "rope_type": "linear",
            "factor": _shortest(settings.get("rope.scaling.factor", 1.0)),
        }
    if kind != "none":
        raise _bad(
            file,
            f"has rope.scaling.type = {kind!r}; supported are none, linear, and"
            " Llama 3's (the tensor rope_freqs.weight)",
        )
    if tensor is None:
        return None
    factors = np.asarray(tensor.data, np.float32).reshape(-1)
    scaling: dict[str, Any] = LLAMA3_SCALING | {"factor": float(factors.max(initial=1.0))}
    plain, _ = rope.frequencies(rope.Rope(rope_theta=theta), head_dim)
    scaled, _ = rope.frequencies(rope.Rope(rope_theta=theta, **scaling), head_dim)
    if factors.shape != plain.shape or not np.allclose(factors, plain / scaled, rtol=1e-4):
        raise _bad(
            file,
            "has frequency factors (rope_freqs.weight) other than Llama 3's; not supported",
        )
    return scaling


def tensors(file: File, hf_config: dict[str, Any]) -> Iterator[Tensor]:
    """The model's tensors in Hugging Face names and layout, in a fixed order, none loaded yet.

    Args:
      file: The open file.
      hf_config: Its `config`.

    Raises:
      InputError: Missing or unmapped tensors (all in one line), a shape against the config, or,
        when loaded, a quantisation that the `gguf` package cannot undo.
    """
    family = FAMILIES[hf_config["model_type"]]
    layer = LAYER | {name: ATTENTION[name] for name in family.attention}
    table = {name: entry for name, entry in OUTER.items() if name != "output.weight"}
    if not hf_config["tie_word_embeddings"]:
        table["output.weight"] = OUTER["output.weight"]
    for index in range(hf_config["num_hidden_layers"]):
        for name, (hf_name, shape) in layer.items():
            table[f"blk.{index}.{name}"] = (f"model.layers.{index}.{hf_name}", shape)

    missing = sorted(table.keys() - file.tensors.keys())
    unmapped = sorted(file.tensors.keys() - table.keys() - {"rope_freqs.weight"})
    if missing or unmapped:
        parts = [
            f"{what} {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if names[8:] else "")
            for what, names in (("lacks", missing), ("has unmapped", unmapped))
            if names
        ]
        raise _bad(file, f"{'; '.join(parts)} for {hf_config['model_type']}")

    head_dim, kv_heads = hf_config["head_dim"], hf_config["num_key_value_heads"]
    sizes = {
        "v": hf_config["vocab_size"],
        "d": hf_config["hidden_size"],
        "f": hf_config["intermediate_size"],
        "h": head_dim,
        "q": hf_config["num_attention_heads"] * head_dim,
        "k": kv_heads * head_dim,
    }
    for name, (hf_name, letters) in table.items():
        shape = tuple(sizes[letter] for letter in letters)
        found = tuple(int(size) for size in reversed(file.tensors[name].shape))
        if found != shape:
            raise _bad(file, f"has {name} {found}; its metadata means {shape}")
        permuted = family.permuted and (".attn_q." in name or ".attn_k." in name)
        yield Tensor(hf_name, shape, _loader(file, name, shape, head_dim if permuted else None))


def _loader(
    file: File, name: str, shape: tuple[int, ...], head_dim: int | None
) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        import gguf

        tensor = file.tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise _bad(
                file, f"has {name} in {tensor.tensor_type.name}, which cannot be dequantised"
            ) from error
        values = np.asarray(values, np.float32).reshape(shape)
        return values if head_dim is None else unpermute(values, head_dim)

    return load


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of a q or k matrix.

    Within each head the file has rows 0, h/2, 1, h/2+1, ... (RoPE turns neighbours), Hugging Face
    0, 1, ..., h-1 (RoPE turns halves). Source: `LlamaModel.permute` in llama.cpp's
    convert_hf_to_gguf.py.

    Args:
      rows: `[heads * head_dim, ...]`.
      head_dim: Size of a head.
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def end_tokens(file: File) -> list[int]:
    """Ids of all tokens at which a response ends; the file's own end token comes first."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    stated = [file.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    known = [
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and token in END_TOKENS
    ]
    return list(dict.fromkeys([index for index in stated if index is not None] + known))


def tokenizer(file: File) -> Any:
    """The tokenizer in `file`, with special tokens and chat template.

    transformers can read GGUF tokenizers, but takes a `tokenizer.ggml.pre` that it does not know
    for GPT-2's: it would cut SmolLM2's text differently around ² and ½. Here that is an error.

    Returns:
      A `transformers.PreTrainedTokenizerFast` (byte-level BPE).

    Raises:
      InputError: No tokenizer in the file, or a kind that we do not know.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    ggml = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in file.metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    missing = [name for name in ("model", "tokens", "token_type", "merges") if name not in ggml]
    if ggml.get("model", "gpt2") != "gpt2" or missing:
        raise _bad(
            file,
            f"has the tokenizer {ggml.get('model')!r}"
            + (f" without {', '.join(missing)}" if missing else "")
            + "; only gpt2 (byte-level BPE) is supported",
        )
    if ggml.get("pre") not in SPLITTINGS:
        raise _bad(
            file,
            f"has tokenizer.ggml.pre = {ggml.get('pre')!r}; supported: {', '.join(SPLITTINGS)}",
        )
    splitting = SPLITTINGS[ggml["pre"]]
    tokens, types = ggml["tokens"], ggml["token_type"]
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise _bad(file, "has repeated tokens or tokens without a type")
    count = len(tokens)
    while count and types[count - 1] == _UNUSED:  # llama.cpp's names for padded embedding rows
        count -= 1
    vocabulary = {token: index for index, token in enumerate(tokens[:count])}
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words)
    except Exception as error:  # tokenizers raises bare Exception
        raise _bad(file, f"has a broken tokenizer ({error})") from error
    backend = Tokenizer(model)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    steps = []
    if splitting.digits:
        steps.append(pre.Digits(individual_digits=True))
    if splitting.pattern is not None:
        steps.append(pre.Split(Regex(splitting.pattern), "isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    backend.pre_tokenizer = pre.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):  # found in text as they are, before any cut
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            backend.add_tokens([AddedToken(token, normalized=False, special=special)])

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{name}_token": tokens[ggml[f"{key}_token_id"]]
        for name, key in names.items()
        if ggml.get(f"{key}_token_id") is not None
    }
    # llama.cpp's rule: Llama 3 texts begin with the bos token even where the file does not say so.
    if ggml.get("add_bos_token", splitting.pattern == _LLAMA3) and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, vocabulary[bos])]
        )
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=file.metadata[f"{file.metadata['general.architecture']}.context_length"],
        **special,
    )
    result.chat_template = file.metadata.get("tokenizer.chat_template")
    return result
