"""What does the multiplier cost?

The same update is compiled with the multiplier, with alpha = 0, and with a plain AdamW chain that
has none (the information is measured in all three; benchmarks/fused_pass.py says what that costs).
The multiplier is one multiplication per parameter, a step about 8 operations per parameter and
token, so the share falls with the number of tokens. Layers are unrolled: XLA counts a loop's body
once.

    python benchmarks/step_overhead.py [--preset small] [--repeats 20] [--save]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support import cases, measure

from pgpo_jax import fused, sharding
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.models import decoder
from pgpo_jax.optimizer import (
    OptimizerConfig,
    ScaleByInformationState,
    learning_rate,
    make_optimizer,
)
from pgpo_jax.state import init_train_state, train_state_shardings
from pgpo_jax.step import make_train_step

PRESETS = {
    # The quickstart's model and batch.
    "tiny": (
        {
            "model_type": "qwen3",
            "tie_word_embeddings": True,
            "vocab_size": 16,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
        },
        {"rows": 128, "prompt": 16, "teacher_prompt": 24, "response": 8},
    ),
    "small": (
        {
            "model_type": "qwen3",
            "tie_word_embeddings": True,
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        {"rows": 4, "prompt": 64, "teacher_prompt": 128, "response": 64},
    ),
}


def plain_adamw(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """The chain without the multiplier; a state of the same form keeps the step's report alike."""
    base = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(learning_rate(config), weight_decay=config.weight_decay),
    )

    def init(params):
        return base.init(params), ScaleByInformationState(jnp.zeros([], jnp.int32), jnp.ones([]))

    def update(updates, state, params=None, *, information, **_):
        del information
        updates, inner = base.update(updates, state[0], params)
        return updates, (inner, state[1])

    return optax.GradientTransformationExtraArgs(init, update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="keep the result under results/")
    args = parser.parse_args()
    architecture, sizes = PRESETS[args.preset]
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1))
    config = decoder.ModelConfig.from_hf(architecture)
    options = decoder.Options(dtype=jnp.float32, unroll=True)
    batch = cases.place(cases.make_examples(**sizes, vocab=config.vocab_size), mesh)

    def build(name, optimizer):
        graphdef, params = decoder.init(config, options, jax.random.key(0), mesh)
        where = train_state_shardings(params, optimizer)
        step = make_train_step(graphdef, optimizer, fused.Options(DistillationConfig()), where)
        state = init_train_state(params, optimizer)
        compiled = step.lower(state, batch).compile()
        states[name] = state

        def call():
            states[name], measured = compiled(states[name], batch)
            return measured

        return compiled, call

    states = {}
    settings = OptimizerConfig(alpha=1.0)
    variants = {
        "plain AdamW": plain_adamw(settings),
        "alpha 0": make_optimizer(OptimizerConfig(alpha=0.0)),
        "alpha 1": make_optimizer(settings),
    }
    built = {name: build(name, optimizer) for name, optimizer in variants.items()}
    costs = {name: measure.cost(compiled) for name, (compiled, _) in built.items()}
    seconds = measure.paired({name: call for name, (_, call) in built.items()}, args.repeats)
    rows = [
        {
            "step": name,
            "flops": costs[name]["flops"],
            "flops ratio": costs[name]["flops"] / costs["plain AdamW"]["flops"],
            "bytes ratio": costs[name]["bytes"] / costs["plain AdamW"]["bytes"],
            "median s": float(np.median(seconds[name])),
            "time ratio": measure.ratio(seconds, name, "plain AdamW"),
        }
        for name in variants
    ]
    measure.table(rows)
    result = {
        "preset": args.preset,
        **sizes,
        "flops_ratio": rows[2]["flops ratio"],
        "bytes_ratio": rows[2]["bytes ratio"],
        "time_ratio": rows[2]["time ratio"],
        "time_ratio_over_alpha_0": measure.ratio(seconds, "alpha 1", "alpha 0"),
        "seconds_per_step": rows[2]["median s"],
        "repeats": args.repeats,
    }
    measure.finish(f"step_overhead_{args.preset}_{jax.default_backend()}", result, args.save)
    if result["flops_ratio"] >= 1.005:
        raise SystemExit(f"the multiplier adds {result['flops_ratio'] - 1:.3%} FLOPs, above 0.5 %")


if __name__ == "__main__":
    main()
