"""Hugging Face checkpoints in and out, and GGUF files in."""

from pgpo_jax.hf.content import content
from pgpo_jax.hf.files import describe_files
from pgpo_jax.hf.load import Model, ModelSection, from_section, load, load_config
from pgpo_jax.hf.save import save
from pgpo_jax.hf.tokenizer import end_tokens, load_tokenizer, turn_end

__all__ = [
    "Model",
    "ModelSection",
    "content",
    "describe_files",
    "end_tokens",
    "from_section",
    "load",
    "load_config",
    "load_tokenizer",
    "save",
    "turn_end",
]
