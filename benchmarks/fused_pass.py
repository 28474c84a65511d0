"""What does the vocabulary pass cost, in memory, products and time, and the information in it?

Three ways to the same loss and gradients, all on the functions of `losses` and `information`:

- fused: chunks of tokens, gradients taken in the forward pass and scaled later (`fused.distill`);
- recompute: the same chunks, their logits computed again in the backward pass (`jax.checkpoint`);
- straightforward: the logits of all tokens at once.

The physics: one product of `tokens x vocab x embed` is a unit. Straightforward and fused need four
(two forward, two gradients), recompute six. Straightforward keeps several arrays `[tokens, vocab]`
in float32; the others arrays `[chunk, vocab]` and the head's gradient, which every chunk updates.
Memory and operations are those of the compiled modules, loops counted as often as they run; nothing
of the size of `--tokens` is allocated. Time is taken at `--time-tokens`, in pairs. The information
is related to the compiled update of a model of the preset's size with as many response tokens.

    python benchmarks/fused_pass.py [--preset qwen3_0.6b] [--repeats 5] [--save]
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
from support import cases, measure

from pgpo_jax import fused, sharding
from pgpo_jax.information import Estimator
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.models import decoder
from pgpo_jax.optimizer import OptimizerConfig, make_optimizer
from pgpo_jax.plan import hlo, hlo_cost
from pgpo_jax.state import abstract_train_state, train_state_shardings
from pgpo_jax.step import make_train_step

ESTIMATORS: tuple[Estimator, ...] = (
    "entropy_gap",
    "conditional_kl",
    "jensen_shannon",
    "pointwise",
)
# Sizes of the model, response tokens for memory and operations, and for time.
PRESETS = {
    "tiny": (
        {
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        {"rows": 4, "prompt": 32, "response": 128, "time_tokens": 512, "chunk_size": 32},
    ),
    "qwen3_0.6b": (
        {
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        {"rows": 4, "prompt": 256, "response": 1024, "time_tokens": 512, "chunk_size": 256},
    ),
}


def straightforward(hidden, head, rows, *, config, estimators=()):
    """The logits of all tokens at once."""
    teacher_hidden, teacher_head, tokens, weights, sampler_log_probs = rows
    terms = fused.token_terms(
        fused.logits(hidden, head.astype(hidden.dtype)),
        fused.logits(teacher_hidden, teacher_head.astype(teacher_hidden.dtype)),
        fused.Tokens(tokens, weights, sampler_log_probs),
        fused.Options(config, estimators),
    )
    return jnp.sum(weights * terms.weight * terms.divergence), terms


def recompute(hidden, head, rows, *, config, estimators=()):
    """Chunk by chunk; the backward pass computes a chunk's logits again."""
    teacher_hidden, teacher_head, *per_token = rows
    head, teacher_head = head.astype(hidden.dtype), teacher_head.astype(hidden.dtype)

    def split(x):
        return x.reshape(-1, min(config.chunk_size, x.shape[0]), *x.shape[1:])

    @jax.checkpoint
    def step(loss, chunk):
        hidden, teacher_hidden, *per_token = chunk
        partial, terms = straightforward(
            hidden,
            head,
            (teacher_hidden, teacher_head, *per_token),
            config=config,
            estimators=estimators,
        )
        return loss + partial, jax.lax.stop_gradient(terms)

    chunks = jax.tree.map(split, (hidden, teacher_hidden, *per_token))
    loss, terms = jax.lax.scan(step, jnp.zeros(()), chunks)
    return loss, jax.tree.map(lambda x: x.reshape(-1), terms)


def distill(hidden, head, rows, *, config, estimators=()):
    teacher_hidden, teacher_head, *per_token = rows
    return fused.distill(
        fused.Side(hidden, head),
        fused.Side(teacher_hidden, teacher_head),
        fused.Tokens(*per_token),
        fused.Options(config, estimators),
    )


WAYS = {"fused": distill, "recompute": recompute, "straightforward": straightforward}


def value_and_gradients(way, config, estimators=(), wanted=lambda terms: terms):
    """Jitted; `wanted` picks from the terms, so that the compiler drops what nobody reads."""

    def loss(hidden, head, rows):
        value, terms = way(hidden, head, rows, config=config, estimators=estimators)
        return value, wanted(terms)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def shapes(tokens, vocab, embed, hidden_dtype, head_dtype):
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    hidden, head = array(tokens, embed, dtype=hidden_dtype), array(vocab, embed, dtype=head_dtype)
    per_token = array(tokens, dtype=jnp.int32), array(tokens), array(tokens)
    return hidden, head, (hidden, head, *per_token)


def make_inputs(tokens, vocab, embed, hidden_dtype, head_dtype):
    """Logits of a standard deviation near 3, a teacher not far from the student."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (tokens, embed))
    near = hidden + 0.3 * jax.random.normal(keys[1], hidden.shape)
    head = jax.random.normal(keys[2], (vocab, embed)) * 3 / embed**0.5
    sampled = jax.random.randint(keys[3], (tokens,), 0, vocab)
    weights, old = jnp.full(tokens, 1 / tokens), jnp.full(tokens, -12.0)
    per_token = sampled, weights, old + jax.random.normal(keys[4], (tokens,))
    hidden, near = hidden.astype(hidden_dtype), near.astype(hidden_dtype)
    head = head.astype(head_dtype)
    return hidden, head, (near, jnp.array(head), *per_token)


def compiled_costs(function, arguments):
    """Operations, bytes and memory of a compiled module, loops counted as often as they run."""
    compiled = function.lower(*arguments).compile()
    cost = hlo_cost.total(hlo_cost.operations(hlo.parse(compiled.as_text())))
    memory = compiled.memory_analysis()
    return {
        "products": cost.matrix_flops,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }


def step_costs(architecture, config, rows, prompt, response):
    """The whole update of a model of that size, compiled from shapes alone."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
    model_config = decoder.ModelConfig.from_hf(
        {"model_type": "qwen3", "tie_word_embeddings": True, **architecture}
    )
    options = decoder.Options(dtype=jnp.bfloat16, remat="dots", mesh=mesh)
    graphdef = decoder.make_graphdef(model_config, options)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    params = jax.tree.map(place, decoder.param_shapes(model_config))
    optimizer = make_optimizer(OptimizerConfig())
    where = train_state_shardings(params, optimizer)
    state = abstract_train_state(params, optimizer)
    examples = cases.make_examples(rows, prompt, prompt, response, model_config.vocab_size)
    batch = cases.place(examples, mesh)
    step = make_train_step(graphdef, optimizer, fused.Options(config), where)
    return compiled_costs(step, (state, batch))


def gradient_error(vocab, embed, config):
    """Largest difference of float32 gradients, over the largest entry; chunks left uneven."""
    config = dataclasses.replace(config, chunk_size=24)
    arguments = make_inputs(64, vocab, embed, jnp.float32, jnp.float32)
    results = (
        value_and_gradients(way, config)(*arguments)[1] for way in (distill, straightforward)
    )
    errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), *results)
    return max(map(float, errors))


def cpu_and_wall(functions, repeats):
    """Seconds of every call, functions taking turns: wall clock, and CPU time over all cores."""
    wall = {name: [] for name in functions}
    cpu = {name: [] for name in functions}
    for index in range(1 + repeats):
        for name, function in functions.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            if index:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="qwen3_0.6b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--time-tokens", type=int, help="tokens where time is taken")
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--top-k", type=int, default=100, help="0 for the full vocabulary")
    parser.add_argument("--save", action="store_true", help="keep the result under results/")
    args = parser.parse_args()
    architecture, sizes = PRESETS[args.preset]
    vocab, embed = architecture["vocab_size"], architecture["hidden_size"]
    tokens = sizes["rows"] * sizes["response"]
    time_tokens = args.time_tokens or sizes["time_tokens"]
    config = DistillationConfig(
        top_k=args.top_k or None, chunk_size=args.chunk_size or sizes["chunk_size"]
    )
    unit = 2 * tokens * vocab * embed

    # Memory and products, all inputs in bfloat16, and with float32 heads as in a real update.
    costs = {
        (name, dtype.__name__): compiled_costs(
            value_and_gradients(way, config), shapes(tokens, vocab, embed, jnp.bfloat16, dtype)
        )
        for name, way in WAYS.items()
        for dtype in (jnp.bfloat16, jnp.float32)
    }

    def temp_ratio(dtype):
        return costs["fused", dtype]["temp_bytes"] / costs["straightforward", dtype]["temp_bytes"]

    # Time, as in a real update: bfloat16 hidden states, float32 heads.
    arguments = make_inputs(time_tokens, vocab, embed, jnp.bfloat16, jnp.float32)
    ready = {
        name: functools.partial(
            value_and_gradients(way, config).lower(*arguments).compile(), *arguments
        )
        for name, way in WAYS.items()
    }
    wall, cpu = cpu_and_wall(ready, args.repeats)
    measure.table(
        [
            {
                "way": name,
                "heads": dtype,
                "products": costs[name, dtype]["products"] / unit,
                "GB moved": costs[name, dtype]["bytes"] / 1e9,
                "temp MB": costs[name, dtype]["temp_bytes"] / 1e6,
                "output MB": costs[name, dtype]["output_bytes"] / 1e6,
                "min s": min(wall[name]) if dtype == "float32" else "",
                "time ratio": measure.ratio(wall, name, "straightforward")
                if dtype == "float32"
                else "",
                "CPU time ratio": measure.ratio(cpu, name, "straightforward")
                if dtype == "float32"
                else "",
            }
            for name, dtype in costs
        ]
    )
    del ready, arguments

    # What an estimate adds to the divergence alone, of the whole update.
    step = step_costs(
        architecture, config, sizes["rows"], prompt=sizes["prompt"], response=sizes["response"]
    )
    inputs = shapes(tokens, vocab, embed, jnp.bfloat16, jnp.float32)
    alone = compiled_costs(value_and_gradients(distill, config, (), lambda terms: None), inputs)
    added = {}
    for name in ESTIMATORS:
        with_it = value_and_gradients(distill, config, (name,), lambda terms: terms.information)
        cost = compiled_costs(with_it, inputs)
        added[name] = {key: (cost[key] - alone[key]) / step[key] for key in ("flops", "bytes")}
    print()
    measure.table(
        [{"estimate": name, **{f"{key} of the update": v for key, v in fractions.items()}}
         for name, fractions in added.items()]
    )  # fmt: skip
    share = {key: alone[key] / step[key] for key in ("flops", "bytes")}
    print(f"\nthe divergence alone: {share['flops']:.1%} of the update's FLOPs, "
          f"{share['bytes']:.1%} of its bytes")  # fmt: skip
    error = gradient_error(vocab, embed, config)
    result = {
        "preset": args.preset,
        "vocab": vocab,
        "embed": embed,
        "tokens": tokens,
        "time_tokens": time_tokens,
        "chunk_size": config.chunk_size,
        "top_k": config.top_k,
        "repeats": args.repeats,
        "temp_bytes_ratio": temp_ratio("bfloat16"),
        "temp_bytes_ratio_float32_heads": temp_ratio("float32"),
        "temp_bytes": {
            f"{name}_{dtype}_heads": cost["temp_bytes"] for (name, dtype), cost in costs.items()
        },
        "time_ratio": measure.ratio(wall, "fused", "straightforward"),
        "cpu_time_ratio": measure.ratio(cpu, "fused", "straightforward"),
        "seconds": {name: min(values) for name, values in wall.items()},
        "cpu_seconds": {name: min(values) for name, values in cpu.items()},
        "recompute_over_fused_time": measure.ratio(wall, "recompute", "fused"),
        "recompute_over_fused_cpu_time": measure.ratio(cpu, "recompute", "fused"),
        "products": {name: costs[name, "bfloat16"]["products"] / unit for name in WAYS},
        "information_flops_fraction": added["entropy_gap"]["flops"],
        "information_bytes_fraction": added["entropy_gap"]["bytes"],
        "information_fractions": added,
        "divergence_fractions": share,
        "step": step,
        "max_gradient_error": error,
    }
    print(f"largest relative difference of float32 gradients: {error:.1e}\n")
    measure.finish(f"fused_pass_{args.preset}_{jax.default_backend()}", result, args.save)


if __name__ == "__main__":
    main()
