"""One decoder driven by a checkpoint's config.json; the only floor that knows Flax."""

from pgpo_jax.models.decoder import Decoder, Leaf, ModelConfig, Options

__all__ = ["Decoder", "Leaf", "ModelConfig", "Options"]
