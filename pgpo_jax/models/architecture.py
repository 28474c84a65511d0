"""What a Hugging Face `config.json` says about a model, and which models there are."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pgpo_jax.errors import InputError
from pgpo_jax.models.rope import LAYER_TYPES, Rope
from pgpo_jax.models.rope import read as read_rope

Settings = Mapping[str, Any]
"""A parsed `config.json`."""


class Norms(NamedTuple):
    """The names of a layer's norms, None where there is none."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


BEFORE = Norms("input_layernorm", None, "post_attention_layernorm", None)
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND = Norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


# Which layers slide where config.json has no `layer_types`, for each layer.
def _none(config: Settings, layers: int) -> list[bool]:
    return [False] * layers


def _all(config: Settings, layers: int) -> list[bool]:
    return [True] * layers


def _late(config: Settings, layers: int) -> list[bool]:
    return [i >= config.get("max_window_layers", 28) for i in range(layers)]


def _but_every_fourth(config: Settings, layers: int) -> list[bool]:
    return [(i + 1) % 4 != 0 for i in range(layers)]


def _but_the_last_of_a_pattern(config: Settings, layers: int) -> list[bool]:
    pattern = config.get("sliding_window_pattern", 6)
    if type(pattern) is not int or pattern < 1:
        raise InputError(f"sliding_window_pattern: got {pattern!r}; must be a number of layers")
    return [(i + 1) % pattern != 0 for i in range(layers)]


def _without_rope(config: Settings, layers: int) -> list[bool]:
    return [not turns for turns in _no_rope_layers(config, layers)]


class Architecture(NamedTuple):
    """What a `model_type` means beyond the numbers in its configuration."""

    family: str  # as people know it, in a comma-separated list
    name: str  # of the class in transformers, which ends in ForCausalLM
    norms: Norms = BEFORE
    norm_offset: float = 0.0  # added to the weights of norms
    qk_norm: Literal["none", "head", "full"] = "none"  # over one head, or over all heads together
    qkv_bias: bool = False
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    root_scaled_embedding: bool = False  # times sqrt(hidden_size), in the type of the computation
    slides: Callable[[Settings, int], list[bool]] = _none
    mixed_layers: bool = True  # `layer_types` is read; else all layers are of one type
    window_switch: bool = False  # `sliding_window` counts with `use_sliding_window` only
    nested_rope: bool = False  # `rope_parameters` are written by type of layer
    scale_sliding: bool = True  # RoPE scaling that is not nested also holds for sliding layers
    reads: tuple[str, ...] = ()  # settings in `FIXED` that are computed, or mean nothing here
    # The defaults of transformers, where config.json leaves them out; None of a number in `NUMBERS`
    # and of `rope_local_base_freq`: it is not read.
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_local_base_freq: float | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    embedding_multiplier: float | None = None
    attention_multiplier: float | None = None
    residual_multiplier: float | None = None
    logits_scaling: float | None = None


ARCHITECTURES = {
    "qwen3": Architecture(
        "Qwen3",
        "Qwen3",
        qk_norm="head",
        slides=_late,
        window_switch=True,
        head_dim=128,
        sliding_window=4096,
    ),
    "qwen2": Architecture(
        "Qwen2, Qwen2.5",
        "Qwen2",
        qkv_bias=True,
        slides=_late,
        window_switch=True,
        reads=("attention_bias",),
        sliding_window=4096,
    ),
    "llama": Architecture("Llama 3, SmolLM2", "Llama", mixed_layers=False),
    "olmo2": Architecture(
        "OLMo 2", "Olmo2", norms=AFTER, qk_norm="full", mixed_layers=False, rms_norm_eps=1e-5
    ),
    "olmo3": Architecture(
        "OLMo 3",
        "Olmo3",
        norms=AFTER,
        qk_norm="full",
        slides=_but_every_fourth,
        nested_rope=True,
        scale_sliding=False,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        sliding_window=4096,
    ),
    "mistral": Architecture(
        "Mistral", "Mistral", slides=_all, mixed_layers=False, sliding_window=4096
    ),
    "ministral": Architecture("Ministral", "Ministral", slides=_all, sliding_window=4096),
    "smollm3": Architecture(
        "SmolLM3",
        "SmolLM3",
        slides=_without_rope,
        window_switch=True,
        # The last splits a product into slices that are summed, in the code of others.
        reads=("no_rope_layers", "no_rope_layer_interval", "pretraining_tp"),
        rope_theta=2_000_000.0,
        tie_word_embeddings=True,
    ),
    "gemma3_text": Architecture(
        "Gemma 3 (text)",
        "Gemma3",
        norms=AROUND,
        norm_offset=1.0,
        qk_norm="head",
        activation="gelu_pytorch_tanh",
        root_scaled_embedding=True,
        slides=_but_the_last_of_a_pattern,
        nested_rope=True,
        reads=(
            "hidden_activation",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "sliding_window_pattern",
        ),
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
        head_dim=256,
        sliding_window=4096,
        tie_word_embeddings=True,
        query_pre_attn_scalar=256.0,
    ),
    "granite": Architecture(
        "Granite 3",
        "Granite",
        mixed_layers=False,
        reads=(
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
        embedding_multiplier=1.0,
        attention_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    ),
}
NUMBERS = (
    "query_pre_attn_scalar",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
# Settings that change what is computed, with the values for which that is no matter: the families
# that read them say so.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "clip_qkv": (None,),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "sliding_window_pattern": (None,),
    "rope_local_base_freq": (None,),
    "no_rope_layers": (None,),
    "no_rope_layer_interval": (None,),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (1, None),
    "attention_multiplier": (None,),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
}
MOST = 10_000_000
"""No size is larger; a config.json that says otherwise must not cost the time to count so far."""
MOST_LAYERS = 10_000
OTHER_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"} | {
    "use_sliding_window",
    "max_window_layers",
    "hidden_act",
    "hidden_activation",
}


class Kind(NamedTuple):
    """What tells the layers of a model apart."""

    window: int | None
    """A token sees itself and `window - 1` tokens before it; None: all before it."""
    rope: Rope | None
    """None: positions are not told (NoPE)."""


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
    no_rope_layers: tuple[int, ...] | None = None
    """For each layer 1 where positions rotate it and 0 where they do not; None: they rotate all."""
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by its root; None: by that of `head_dim`."""
    embedding_multiplier: float | None = None
    attention_multiplier: float | None = None
    """What attention scores are multiplied by instead."""
    residual_multiplier: float | None = None
    """What attention and feed-forward are multiplied by before they are added to their input."""
    logits_scaling: float | None = None
    """What logits are divided by."""

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model_type]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of every layer."""
        of_type = {
            "full_attention": Kind(None, self.rope),
            "sliding_attention": Kind(self.sliding_window, self.sliding_rope),
        }
        kinds = [of_type[layer_type] for layer_type in self.layer_types]
        turned = self.no_rope_layers or (1,) * len(kinds)
        return tuple(
            kind if turns else kind._replace(rope=None)
            for kind, turns in zip(kinds, turned, strict=True)
        )

    @property
    def query_multiplier(self) -> float:
        """What queries are multiplied by before attention divides scores by sqrt(`head_dim`)."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier * self.head_dim**0.5
        return (self.head_dim / (self.query_pre_attn_scalar or self.head_dim)) ** 0.5

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
        model_type = _model_type(config)
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
        ropes = read_rope(
            config, defaults.rope_theta, defaults.scale_sliding, defaults.rope_local_base_freq
        )
        ends, eps = config.get("eos_token_id"), config.get("rms_norm_eps", defaults.rms_norm_eps)
        if type(eps) not in (int, float) or not 0 < eps < 1:
            raise InputError(f"rms_norm_eps: got {eps!r}; must be a small positive number")
        stated = config.get("tie_word_embeddings")
        tied = defaults.tie_word_embeddings if stated is None else stated
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
            no_rope_layers=_no_rope_layers(config, layers)
            if "no_rope_layers" in defaults.reads
            else None,
            **{name: _number(config, name) for name in NUMBERS},
        )

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that `transformers` and `from_hf` read."""
        config, arch = dataclasses.asdict(self), self.architecture
        del config["rope"], config["sliding_rope"]
        for name in ("no_rope_layers", *NUMBERS):
            if config[name] is None:
                del config[name]
            elif isinstance(config[name], float) and config[name].is_integer():
                config[name] = int(config[name])  # transformers takes no 256.0 for some of them
        config["architectures"] = [f"{arch.name}ForCausalLM"]
        own_name = "hidden_activation" in arch.reads
        config["hidden_activation" if own_name else "hidden_act"] = arch.activation
        for name in ("layer_types", "no_rope_layers", "eos_token_id"):
            if isinstance(config.get(name), tuple):
                config[name] = list(config[name])
        if arch.window_switch:
            config["use_sliding_window"] = self.sliding_window is not None
        if not arch.mixed_layers:
            del config["layer_types"]
        if arch.slides is _none:
            del config["sliding_window"]
        if arch.nested_rope:
            config["rope_parameters"] = {
                "full_attention": self.rope.to_hf(),
                "sliding_attention": self.sliding_rope.to_hf(),
            }
        else:
            config["rope_parameters"] = self.rope.to_hf()
            config["rope_theta"] = self.rope.rope_theta  # where transformers 4 looks
        return config


def _model_type(config: Settings) -> str:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return model_type
    inner = config.get("text_config")
    inside = inner.get("model_type") if isinstance(inner, Mapping) else None
    hint = f"; export its text model ({inside}) alone" if inside in ARCHITECTURES else ""
    raise InputError(
        f"model_type: got {model_type!r}; must be one of {', '.join(ARCHITECTURES)}{hint}"
    )


def _check_settings(config: Settings, model_type: str, strict: bool) -> None:
    """Refuses settings that this decoder does not compute; unknown ones too if `strict`."""
    defaults = ARCHITECTURES[model_type]
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"rope", "sliding_rope"}
    known |= FIXED.keys() | OTHER_KEYS
    if strict and (unknown := config.keys() - known):
        raise InputError(
            f"architecture: got {sorted(unknown)}; must be among {', '.join(sorted(known))}"
        )
    for name, allowed in FIXED.items():
        if config.get(name) not in allowed and name not in defaults.reads:
            raise InputError(
                f"{name}: got {config[name]!r}; {model_type} is supported with {allowed[0]!r}"
            )
    for name in ("hidden_act", "hidden_activation"):
        if config.get(name) not in (defaults.activation, None):
            raise InputError(
                f"{name}: got {config[name]!r}; {model_type} is supported with "
                f"{defaults.activation!r}"
            )


def _token(name: str, value: Any) -> Any:
    if value is not None and (type(value) is not int or value < 0):
        raise InputError(f"{name}: got {value!r}; must be a token's number, or null")
    return value


def _number(config: Settings, name: str) -> float | None:
    """A multiplier or its like; None where the family has none."""
    default = getattr(ARCHITECTURES[config["model_type"]], name)
    value = default if config.get(name) is None else config[name]
    if default is None:
        return None
    if type(value) not in (int, float) or not 0 < value < MOST:
        raise InputError(f"{name}: got {value!r}; must be a positive number")
    return float(value)


def _no_rope_layers(config: Settings, layers: int) -> tuple[int, ...]:
    """For each layer 1 where positions rotate it and 0 where they do not."""
    turns, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if turns is None:
        if type(interval) is not int or interval < 1:
            raise InputError(
                f"no_rope_layer_interval: got {interval!r}; must be a number of layers"
            )
        turns = [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(turns, list | tuple) or len(turns) != layers or {*turns} - {0, 1}:
        raise InputError(
            f"no_rope_layers: got {turns!r}; must be 0 or 1 for each of {layers} layers"
        )
    return tuple(map(int, turns))


def _sliding_window(config: Settings) -> int | None:
    arch = ARCHITECTURES[config["model_type"]]
    if arch.slides is _none or (arch.window_switch and not config.get("use_sliding_window")):
        return None
    return config.get("sliding_window", arch.sliding_window)


def _layer_types(config: Settings, layers: int, window: int | None) -> tuple[str, ...]:
    arch, types = ARCHITECTURES[config["model_type"]], config.get("layer_types")
    # OLMo 3 and Gemma 3 have no switch: a window that is missing is missed below.
    optional = arch.window_switch or arch.slides is _all
    slides = [False] * layers if optional and window is None else arch.slides(config, layers)
    usual = ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    types = usual if types is None else types
    if len(types) != layers or set(types) - set(LAYER_TYPES):
        raise InputError(
            f"layer_types: got {types}; must name one of {LAYER_TYPES} for each of {layers} layers"
        )
    if "sliding_attention" in types and (not isinstance(window, int) or window < 1):
        raise InputError(
            f"sliding_window: got {window!r} in use; sliding_attention layers need a positive width"
        )
    if not arch.mixed_layers and list(types) != usual:
        raise InputError(
            f"layer_types: got {types}; {config['model_type']} has {usual[0]} layers alone here"
        )
    return tuple(types)
