"""What the benchmarks run on: shapes of models, random batches."""

from typing import Any

import numpy as np

from pgpo_jax import sharding
from pgpo_jax.data import Batch, DataConfig, Examples, pack


def qwen3(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, width: int
) -> dict[str, Any]:
    """The `config.json` of a Qwen3 with tied embeddings."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
    }


TINY = qwen3(512, 64, 192, 2, 4, 2, 16)
QWEN3_135M = qwen3(49_152, 576, 1536, 30, 9, 3, 64)  # 134.5M parameters
QWEN3_06B = qwen3(151_936, 1024, 3072, 28, 16, 8, 128)
QWEN3_17B = qwen3(151_936, 2048, 6144, 28, 16, 8, 128)
SMOLLM2_135M = {
    **QWEN3_135M,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rope_theta": 100_000.0,
}


def make_examples(
    rows: int, prompt: int, teacher_prompt: int, response: int, vocab: int
) -> Examples:
    """Random tokens; the prompts of every other row are a little shorter."""
    rng = np.random.default_rng(0)

    def tokens(*shape):
        return rng.integers(0, vocab, shape, np.int32)

    def left_padded(width):
        padding = np.where(np.arange(rows) % 2, width // 8, 0)
        return tokens(rows, width), np.arange(width)[None, :] >= padding[:, None]

    return Examples(
        prompts={"student": left_padded(prompt), "teacher": left_padded(teacher_prompt)},
        responses=tokens(rows, response),
        response_mask=np.ones((rows, response), bool),
        sampler_log_probs=np.full((rows, response), -np.log(vocab), np.float32),
        has_context=np.ones(rows, bool),
    )


def place(examples: Examples, mesh: Any, packing: Any = "never") -> Batch:
    """The examples laid out on a mesh."""
    return sharding.to_global(pack(examples, DataConfig(packing=packing), mesh), mesh)
