"""Hugging Face checkpoints in and out, and GGUF files in."""

from pgpo_jax.hf.adapters import TENSORS, adapter_notes, load_adapters, save_adapters
from pgpo_jax.hf.content import content
from pgpo_jax.hf.files import ADAPTER, describe_files
from pgpo_jax.hf.load import Model, ModelSection, from_section, load, load_config
from pgpo_jax.hf.save import save
from pgpo_jax.hf.tokenizer import end_tokens, load_tokenizer, turn_end

__all__ = [
    "ADAPTER",
    "TENSORS",
    "Model",
    "ModelSection",
    "adapter_notes",
    "content",
    "describe_files",
    "end_tokens",
    "from_section",
    "load",
    "load_adapters",
    "load_config",
    "load_tokenizer",
    "save",
    "save_adapters",
    "turn_end",
]
