"""Writes the checkpoints and logits of `transformers` that test_parity.py compares with.

Run where torch is installed: `python tests/support/make_goldens.py`, or with the names of some.
Every folder under goldens/ holds a tiny random model as `transformers` saves it, in 16 bits, and
its float32 logits. The folder adapters/ holds adapters of one of them as `peft` saves them, and the
logits with them.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
ADAPTERS = Path(__file__).parent / "adapters"
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
# Name -> config.json as a checkpoint may have it (every layout of RoPE's settings occurs).
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {
        **TINY,
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_theta": 1e6,
        "rope_scaling": None,
    },
    "qwen3_tied_yarn": {
        **TINY,
        "model_type": "qwen3",
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 5e4, **YARN, "attention_factor": 1.3},
    },
    "qwen2": {
        **TINY,
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2_sliding": {
        **TINY,
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_theta": 1e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "llama3": {
        **TINY,
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3,
        "eos_token_id": [2, 3],
    },
    "smollm2": {
        **TINY,
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 24,
        "tie_word_embeddings": True,
        "rope_theta": 1e5,
        "rope_interleaved": False,
    },
    "olmo2": {
        **TINY,
        "model_type": "olmo2",
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
    },
    "olmo2_grouped": {**TINY, "model_type": "olmo2", "rope_parameters": {"rope_theta": 2e4}},
    "olmo3": {
        **TINY,
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "rope_theta": 5e5,
        "rope_scaling": YARN,
    },
    "olmo3_nested": {
        **TINY,
        "model_type": "olmo3",
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e5, **YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "mistral": {
        **TINY,
        "model_type": "mistral",
        "head_dim": 12,
        "sliding_window": 5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 3e4,
    },
    "ministral": {
        **TINY,
        "model_type": "ministral",
        "num_hidden_layers": 3,
        "head_dim": 10,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 2e5,
    },
    "smollm3": {
        **TINY,
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
        "no_rope_layers": [1, 0, 1, 1],
        "no_rope_layer_interval": 2,
        "rope_theta": 5e4,
        "pretraining_tp": 2,
    },
    "smollm3_sliding": {
        **TINY,
        "model_type": "smollm3",
        "num_hidden_layers": 3,
        "head_dim": 12,
        "use_sliding_window": True,
        "sliding_window": 5,
        "no_rope_layer_interval": 3,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "gemma3": {
        **TINY,
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "head_dim": 12,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 2e5,
        "rope_local_base_freq": 3e3,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "tie_word_embeddings": True,
    },
    "gemma3_nested": {
        **{key: value for key, value in TINY.items() if key != "tie_word_embeddings"},
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 8,
        "query_pre_attn_scalar": 24,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e5, **YARN},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0},
        },
    },
    "granite": {
        **TINY,
        "model_type": "granite",
        "embedding_multiplier": 7.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "logits_scaling": 3.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 4e4,
    },
}
ROWS, TIME = 2, 40


def tokens() -> tuple[np.ndarray, np.ndarray]:
    """Two rows; the second begins with padding."""
    rng = np.random.default_rng(0)
    mask = np.arange(TIME)[None, :] >= np.array([0, 7])[:, None]
    return np.where(mask, rng.integers(4, TINY["vocab_size"], (ROWS, TIME)), 0), mask


def random_model(config: dict[str, Any], folder: Path) -> Any:
    """A `transformers` model of this configuration with weights that 16 bits hold exactly."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that a mistake shows; norms and biases away from their initial values.
            around = 1.0 if "norm" in name and config["model_type"] != "gemma3_text" else 0.0
            value = around + 0.25 * torch.randn(parameter.shape)
            parameter.copy_(value.to(torch.bfloat16).float())
    return model.float().eval()


def logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Float32 logits of `transformers`; positions count tokens only."""
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            torch.tensor(tokens), torch.tensor(mask).long(), position_ids=torch.tensor(positions)
        )
    return out.logits.float().numpy()


def adapted(model: Any, base: str) -> Any:
    """The model with random adapters of `peft`."""
    import peft
    import torch

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)
    model.peft_config["default"].base_model_name_or_path = base
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def write_adapters() -> None:
    """Those of the model `qwen3`, whose golden must be there."""
    shutil.rmtree(ADAPTERS, ignore_errors=True)
    model = adapted(random_model(CONFIGS["qwen3"], ADAPTERS / "base"), "qwen3")
    shutil.rmtree(ADAPTERS / "base")
    model.save_pretrained(ADAPTERS)
    (ADAPTERS / "README.md").unlink()
    expected = logits(model, *tokens())
    np.savez_compressed(ADAPTERS / "expected.npz", logits=expected)
    print("adapters", float(np.abs(expected).max()))


def main() -> None:
    import torch

    names = sys.argv[1:]
    for name, config in CONFIGS.items():
        folder = GOLDENS / name
        if names and name not in names:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        model = random_model(config, folder)
        expected = logits(model, *tokens())
        model.to(torch.bfloat16).save_pretrained(folder)
        # The layouts under test are those of CONFIGS, not the one that transformers writes.
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "generation_config.json").unlink()
        np.savez_compressed(folder / "expected.npz", logits=expected)
        print(name, float(np.abs(expected).max()))
    if not names:
        write_adapters()


if __name__ == "__main__":
    main()
