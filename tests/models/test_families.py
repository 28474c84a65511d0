"""Families of models: what a config.json leaves out, what is refused, the table for people."""

import re
from pathlib import Path

import pytest

from pgpo_jax.errors import InputError
from pgpo_jax.models import ModelConfig
from pgpo_jax.models.architecture import ARCHITECTURES, NUMBERS, Kind
from pgpo_jax.models.rope import Rope

PAGE = Path(__file__).parents[2] / "docs" / "add_a_family.md"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config_of(model_type, **changes):
    return ModelConfig.from_hf({**SIZES, "model_type": model_type, **changes})


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type):
    from transformers import AutoConfig

    switch = {"use_sliding_window": True} if ARCHITECTURES[model_type].window_switch else {}
    if model_type == "smollm3":  # its window has no default
        switch["sliding_window"] = 7
    theirs = AutoConfig.for_model(model_type, **SIZES, **switch).to_dict()
    ours = config_of(model_type, **switch)
    for name in ("rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == theirs[name], name
    for name in NUMBERS:
        assert getattr(ours, name) == theirs.get(name), name
    head_dim = theirs.get("head_dim") or SIZES["hidden_size"] // SIZES["num_attention_heads"]
    assert ours.head_dim == head_dim
    ropes = theirs["rope_parameters"]
    for layer_type, rope in (
        ("full_attention", ours.rope),
        ("sliding_attention", ours.sliding_rope),
    ):
        if layer_type in ours.layer_types:
            assert rope.rope_theta == ropes.get(layer_type, ropes)["rope_theta"]
    if theirs.get("layer_types") is not None:
        assert list(ours.layer_types) == theirs["layer_types"]
    if ours.sliding_window is not None:
        assert ours.sliding_window == theirs["sliding_window"]
    if model_type == "smollm3":
        assert list(ours.no_rope_layers) == theirs["no_rope_layers"]


def test_layers_of_one_type_are_told_apart_by_what_they_compute():
    config = config_of(
        "gemma3_text", num_hidden_layers=7, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )
    near = Kind(4096, Rope("default", 10_000.0))
    far = Kind(None, Rope("linear", 1_000_000.0, factor=8.0))
    assert config.kinds == (near, near, near, near, near, far, near)
    config = config_of("smollm3")
    turned = Kind(None, Rope("default", 2_000_000.0))
    assert config.kinds == (turned, turned, turned, Kind(None, None))
    config = config_of("mistral", sliding_window=9)
    assert config.kinds == (Kind(9, Rope()),) * 4


def test_queries_are_multiplied_by_what_attention_does_not_divide_by():
    assert config_of("qwen3").query_multiplier == 1
    assert config_of("gemma3_text").query_multiplier == 1
    changed = config_of("gemma3_text", head_dim=128, query_pre_attn_scalar=168)
    assert changed.query_multiplier / 128**0.5 == pytest.approx(168**-0.5)
    changed = config_of("granite", attention_multiplier=0.015625)
    assert changed.query_multiplier / changed.head_dim**0.5 == pytest.approx(0.015625)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3", {"embedding_multiplier": 12}, "embedding_multiplier: got 12; qwen3 is supported"),
        ("llama", {"no_rope_layers": [1, 0]}, r"no_rope_layers: got \[1, 0\]; llama is supported"),
        ("olmo3", {"rope_local_base_freq": 1e4}, "rope_local_base_freq: got 10000.0"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types: got .*; mistral has"),
        ("mistral", {"sliding_window": 0}, "sliding_window: got 0 in use"),
        ("ministral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: got 30.0"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers: got \[1, 0\]; must be 0 or 1"),
        (
            "smollm3",
            {"no_rope_layers": [1, 0, 2, 1]},
            "no_rope_layers: got .* for each of 4 layers",
        ),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval: got 0"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "sliding_window: got None in use"),
        (
            "gemma3_text",
            {"hidden_activation": "gelu"},
            "hidden_activation: got 'gelu'; gemma3_text",
        ),
        ("gemma3_text", {"hidden_act": "silu"}, "hidden_act: got 'silu'; gemma3_text is supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: got"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window: got None in use"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern: got 0"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: got 0; must be"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters: got .* nested"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling: got '8'; must be a positive number"),
        ("granite", {"mlp_bias": True}, "mlp_bias: got True; granite is supported with False"),
        (
            "gemma3",
            {"text_config": {"model_type": "gemma3_text"}},
            r"model_type: got 'gemma3'; .*granite; export its text model \(gemma3_text\) alone",
        ),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(model_type, changes, message):
    with pytest.raises(InputError, match=message):
        config_of(model_type, **changes)


def test_the_page_names_every_family():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == {key: each.family for key, each in ARCHITECTURES.items()}
    assert len(rows) == len(ARCHITECTURES)
