"""What a Hugging Face `config.json` says about a model, and which models there are."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pgpo_jax.errors import InputError
from pgpo_jax.models.rope import LAYER_TYPES, Rope
from pgpo_jax.models.rope import read as read_rope


class Architecture(NamedTuple):
    """What a `model_type` means beyond the numbers in its configuration."""

    post_norm: bool = False  # norms after attention and feed-forward, none before
    qk_norm: Literal["none", "head", "full"] = "none"  # over one head, or over all heads together
    qkv_bias: bool = False
    scale_sliding: bool = True  # RoPE scaling that is not nested also holds for sliding layers
    rms_norm_eps: float = 1e-6  # the defaults of transformers, where config.json leaves them out
    rope_theta: float = 10_000.0
    head_dim: int | None = None


ARCHITECTURES = {
    "qwen3": Architecture(qk_norm="head", head_dim=128),
    "qwen2": Architecture(qkv_bias=True),
    "llama": Architecture(),
    "olmo2": Architecture(post_norm=True, qk_norm="full", rms_norm_eps=1e-5),
    "olmo3": Architecture(
        post_norm=True, qk_norm="full", scale_sliding=False, rms_norm_eps=1e-5, rope_theta=500_000.0
    ),
}
# Settings that this decoder does not compute, with the values for which that is no matter.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "clip_qkv": (None,),
    "quantization_config": (None,),
}
MOST = 10_000_000
"""No size is larger; a config.json that says otherwise must not cost the time to count so far."""
MOST_LAYERS = 10_000
OTHER_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"} | {
    "use_sliding_window",
    "max_window_layers",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture, under the names of Hugging Face's `config.json`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    sliding_window: int | None
    rope: Rope
    """Of full attention layers."""
    sliding_rope: Rope
    """Of sliding layers."""
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model_type]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, strict: bool = False) -> "ModelConfig":
        """Reads a parsed `config.json`.

        Args:
          config: The dictionary.
          strict: Refuse keys that are not read here (a checkpoint's may hold many).

        Raises:
          InputError: An unknown architecture, a missing size, or a setting that this decoder does
            not compute.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise InputError(
                f"model_type: got {model_type!r}; must be one of {', '.join(ARCHITECTURES)}"
            )
        defaults = ARCHITECTURES[model_type]
        _check_settings(config, model_type, strict)

        def size(name: str, default: int | None = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if type(value) is not int or not 0 < value <= MOST:
                raise InputError(f"{name}: got {value!r}; must be a positive whole number")
            return value

        layers, heads, hidden = (
            size("num_hidden_layers"),
            size("num_attention_heads"),
            size("hidden_size"),
        )
        if layers > MOST_LAYERS:
            raise InputError(f"num_hidden_layers: got {layers}; must be at most {MOST_LAYERS}")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError(
                f"num_key_value_heads: got {kv_heads}; must divide num_attention_heads = {heads}"
            )
        absent = None if "head_dim" in config else defaults.head_dim
        head_dim = size("head_dim", absent or hidden // heads)
        if head_dim % 2:
            raise InputError(f"head_dim: got {head_dim}; must be even to be rotated in pairs")
        window = _sliding_window(config)
        types = _layer_types(config, layers, window)
        ropes = read_rope(config, defaults.rope_theta, defaults.scale_sliding)
        ends, eps = config.get("eos_token_id"), config.get("rms_norm_eps", defaults.rms_norm_eps)
        if type(eps) not in (int, float) or not 0 < eps < 1:
            raise InputError(f"rms_norm_eps: got {eps!r}; must be a small positive number")
        tied = False if (stated := config.get("tie_word_embeddings")) is None else stated
        if type(tied) is not bool:
            raise InputError(f"tie_word_embeddings: got {tied!r}; must be true or false")
        if isinstance(ends, list | tuple):
            ends = tuple(_token("eos_token_id", end) for end in ends)
        else:
            ends = _token("eos_token_id", ends)
        return cls(
            model_type=model_type,
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=eps,
            tie_word_embeddings=tied,
            max_position_embeddings=size("max_position_embeddings", 32_768),
            layer_types=types,
            sliding_window=window if "sliding_attention" in types else None,
            rope=ropes["full_attention"],
            sliding_rope=ropes["sliding_attention"]
            if "sliding_attention" in types
            else ropes["full_attention"],
            bos_token_id=_token("bos_token_id", config.get("bos_token_id")),
            eos_token_id=ends,
            pad_token_id=_token("pad_token_id", config.get("pad_token_id")),
        )

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that `transformers` and `from_hf` read."""
        config = dataclasses.asdict(self)
        del config["rope"], config["sliding_rope"]
        names = {
            "qwen3": "Qwen3",
            "qwen2": "Qwen2",
            "llama": "Llama",
            "olmo2": "Olmo2",
            "olmo3": "Olmo3",
        }
        config["architectures"] = [f"{names[self.model_type]}ForCausalLM"]
        config["hidden_act"] = "silu"
        config["layer_types"] = list(self.layer_types)
        if isinstance(self.eos_token_id, tuple):
            config["eos_token_id"] = list(self.eos_token_id)
        if self.model_type in ("qwen2", "qwen3"):
            config["use_sliding_window"] = self.sliding_window is not None
        if self.model_type == "olmo3":
            config["rope_parameters"] = {
                "full_attention": self.rope.to_hf(),
                "sliding_attention": self.sliding_rope.to_hf(),
            }
        else:
            config["rope_parameters"] = self.rope.to_hf()
            config["rope_theta"] = self.rope.rope_theta  # where transformers 4 looks
            if self.model_type in ("llama", "olmo2"):
                del config["layer_types"], config["sliding_window"]
        return config


def _check_settings(config: Mapping[str, Any], model_type: str, strict: bool) -> None:
    """Refuses settings that this decoder does not compute; unknown ones too if `strict`."""
    defaults = ARCHITECTURES[model_type]
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"rope", "sliding_rope"}
    known |= FIXED.keys() | OTHER_KEYS
    if strict and (unknown := config.keys() - known):
        raise InputError(
            f"architecture: got {sorted(unknown)}; must be among {', '.join(sorted(known))}"
        )
    for name, allowed in FIXED.items():
        if config.get(name) not in allowed and not (name == "attention_bias" and defaults.qkv_bias):
            raise InputError(
                f"{name}: got {config[name]!r}; {model_type} is supported with {allowed[0]!r}"
            )


def _token(name: str, value: Any) -> Any:
    if value is not None and (type(value) is not int or value < 0):
        raise InputError(f"{name}: got {value!r}; must be a token's number, or null")
    return value


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    if config["model_type"] == "olmo3":
        return config.get("sliding_window", 4096)
    if config["model_type"] in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        return config.get("sliding_window", 4096)
    return None


def _layer_types(config: Mapping[str, Any], layers: int, window: int | None) -> tuple[str, ...]:
    model_type, types = config["model_type"], config.get("layer_types")
    if model_type in ("llama", "olmo2"):
        sliding = [False] * layers
    elif model_type == "olmo3":
        sliding = [(i + 1) % 4 != 0 for i in range(layers)]
    else:
        sliding = [
            window is not None and i >= config.get("max_window_layers", 28) for i in range(layers)
        ]
    if types is None:
        types = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    if len(types) != layers or set(types) - set(LAYER_TYPES):
        raise InputError(
            f"layer_types: got {types}; must name one of {LAYER_TYPES} for each of {layers} layers"
        )
    if "sliding_attention" in types and (not isinstance(window, int) or window < 1):
        raise InputError(
            f"sliding_window: got {window!r} in use; sliding_attention layers need a positive width"
        )
    return tuple(types)
