"""Hugging Face checkpoints in and out, and GGUF files in."""

from pgpo_jax.hf.folder import (
    ModelSection,
    end_tokens,
    from_section,
    load,
    load_config,
    load_tokenizer,
    save,
)

__all__ = [
    "ModelSection",
    "end_tokens",
    "from_section",
    "load",
    "load_config",
    "load_tokenizer",
    "save",
]
