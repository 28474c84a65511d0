"""How fast are responses drawn, against transformers and against the memory?

Three numbers per preset, from one run: tokens per second of `sampler.sample` (prefill included);
its ratio to `transformers`' `generate` with the same weights, prompts, lengths, threads and rows
at a time, the two taking turns; and the share of the memory bound that is reached.

The physics: a step of decoding reads all weights and the live part of the cache, whatever the
number of rows, and does little else. With bandwidth measured by summing a large array,

    bound = (tokens / rows at a time * weight bytes + sum over tokens of cached bytes) / bandwidth

which no sampler with that many rows can beat; prefill, idle rows and everything else only add.
Lengths are forced, so both sides do the same work: quantiles of an exponential distribution (mean
200, longest 1024) in random order, or all alike. `generate` holds a batch until its longest
response ends; `sample` refills its slots. torch gets as many threads as serve it best, and may not
spin while it waits: on a shared machine that would cost it most of its speed.

    python benchmarks/sampler.py [--preset cpu_135m] [--repeats 3] [--no-transformers] [--save]
"""

import argparse
import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from support import measure

from pgpo_jax import hf, sampler
from pgpo_jax.models import decoder


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model of random weights and the responses asked of it."""

    shape: dict[str, Any]
    questions: int
    num_samples: int
    slots: int  # rows at a time, on both sides
    prompt: int
    longest: int
    mean: int | None = None  # None: every response has the longest length
    dtype: Any = jnp.float32
    recorded: dict[str, float] | None = None  # Tunix, measured on an idle machine like this


def qwen3(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, width: int):
    return {
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": width,
        "tie_word_embeddings": True,
    }


TINY = qwen3(4096, 128, 384, 4, 4, 2, 32)
SMALL = qwen3(49_152, 576, 1536, 30, 9, 3, 64)  # 134.5M parameters
QWEN3_06B = qwen3(151_936, 1024, 3072, 28, 16, 8, 128)
QWEN3_17B = qwen3(151_936, 2048, 6144, 28, 16, 8, 128)
TUNIX = {"tokens_per_second": 64.0, "cpu_seconds": 7.47}
PRESETS = {
    "tiny": Preset(TINY, 16, 4, slots=8, prompt=32, mean=50, longest=256),
    # The fixed case in which the JAX peers were measured.
    "cpu_135m": Preset(SMALL, 4, 1, slots=4, prompt=64, longest=64, recorded=TUNIX),
    "cpu_135m_skewed": Preset(SMALL, 16, 4, slots=8, prompt=64, mean=200, longest=1024),
    # The same at a quarter of the lengths, for slow machines.
    "cpu_135m_short": Preset(SMALL, 16, 4, slots=8, prompt=64, mean=50, longest=256),
    # Few responses per slot: the longest one outlives the queue, and refilling cannot help.
    "cpu_135m_few": Preset(SMALL, 4, 4, slots=4, prompt=64, mean=200, longest=1024),
    "qwen3_0.6b": Preset(
        QWEN3_06B, 64, 16, slots=256, prompt=128, mean=200, longest=1024, dtype=jnp.bfloat16
    ),
    "qwen3_1.7b": Preset(
        QWEN3_17B, 64, 16, slots=256, prompt=128, mean=200, longest=1024, dtype=jnp.bfloat16
    ),
}


def lengths(preset: Preset) -> np.ndarray:
    """Tokens of every response `[question, sample]`."""
    count = preset.questions * preset.num_samples
    if preset.mean is None:
        values = np.full(count, preset.longest)
    else:
        quantiles = -np.log1p(-(np.arange(count) + 0.5) / count) * preset.mean
        values = np.clip(np.rint(quantiles), 1, preset.longest)
        values = np.random.default_rng(0).permutation(values)
    return values.reshape(preset.questions, preset.num_samples).astype(int)


def bandwidth() -> float:
    """Bytes per second that one jitted sum reads, the best of several."""
    array = jnp.ones((2**26 if jax.default_backend() == "cpu" else 2**30,), jnp.float32)
    read = jax.jit(jnp.sum)
    read(array).block_until_ready()
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        read(array).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return array.nbytes / best


def bound_seconds(preset: Preset, config: decoder.ModelConfig, speed: float) -> float:
    """Least time to decode the preset's responses at a memory bandwidth of `speed`."""
    width = jnp.dtype(preset.dtype).itemsize
    shapes = decoder.param_shapes(config)
    if not config.tie_word_embeddings:
        del shapes["embed_tokens"]  # only a few of its rows are read
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) * width
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
    tokens = lengths(preset).ravel()
    cached = (tokens * preset.prompt + tokens * (tokens + 1) // 2).sum() * per_token
    return (tokens.sum() / preset.slots * weights + cached) / speed


def transformers_generate(
    folder: str, preset: Preset, prompts: np.ndarray
) -> Callable[[], None] | str:
    """`generate` on the saved model, or why it cannot be run."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is first imported
    try:
        import torch
        import transformers
    except ImportError as error:
        return f"not importable: {error.name}"
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return "torch does not see the GPU"
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    dtype = torch.bfloat16 if preset.dtype == jnp.bfloat16 else torch.float32
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    peer = peer.to(device).eval()

    class Limits(transformers.StoppingCriteria):
        def __init__(self, values: np.ndarray):
            self.values = torch.tensor(values, device=device)

        def __call__(self, tokens: Any, scores: Any, **_: Any) -> Any:
            return tokens.shape[1] - preset.prompt >= self.values

    rows = np.repeat(prompts, preset.num_samples, axis=0)
    limits = lengths(preset).ravel()

    def quickest_threads() -> int:
        tokens, seconds = torch.tensor(rows[: preset.slots]), {}
        for threads in (1, os.cpu_count() or 1) * 2:  # the first round warms up
            torch.set_num_threads(threads)
            start = time.perf_counter()
            peer.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8)
            seconds[threads] = time.perf_counter() - start
        return min(seconds, key=lambda threads: seconds[threads])

    if device == "cpu":
        torch.set_num_threads(quickest_threads())

    def run() -> None:
        for first in range(0, len(rows), preset.slots):
            batch = slice(first, first + preset.slots)
            tokens = torch.tensor(rows[batch], device=device)
            out = peer.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=int(limits[batch].max()),
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[Limits(limits[batch])],
            )
            assert out.shape[1] == preset.prompt + limits[batch].max()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu_135m")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of timed calls")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--save", action="store_true", help="keep the result under results/")
    args = parser.parse_args()
    preset = PRESETS[args.preset]

    config = decoder.ModelConfig.from_hf(preset.shape)
    graphdef, params = decoder.init(config, decoder.Options(dtype=preset.dtype), jax.random.key(0))
    shape = (preset.questions, preset.prompt)
    prompts = np.random.default_rng(1).integers(1, config.vocab_size, shape)
    limits = lengths(preset)
    sampling = sampler.SamplingConfig(
        num_samples=preset.num_samples, max_response_length=preset.longest, slots=preset.slots
    )
    key = jax.random.key(2)
    cpu: dict[str, list[float]] = {"sample": [], "generate": []}

    def timed(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            start = time.process_time()
            jax.block_until_ready(function())
            cpu[name].append(time.process_time() - start)

        return call

    def sample() -> sampler.Samples:
        mask = np.ones(shape, bool)
        return sampler.sample(graphdef, params, prompts, mask, key, sampling, limits=limits)

    start = time.perf_counter()
    samples = sample()
    first = time.perf_counter() - start
    np.testing.assert_array_equal(np.asarray(samples.mask).sum(-1), limits)
    compiled = sampler.compilations()

    functions, absent = {"sample": timed("sample", sample)}, "left out by --no-transformers"
    if not args.no_transformers:
        with tempfile.TemporaryDirectory() as folder:
            hf.save(folder, graphdef, params)
            peer = transformers_generate(folder, preset, prompts)
        if isinstance(peer, str):
            absent = peer
        else:
            functions["generate"] = timed("generate", peer)
    seconds = measure.paired(functions, args.repeats, warm_up=0)  # both are warm by now
    assert sampler.compilations() == compiled, "a later call compiled again"

    total, speed = int(limits.sum()), bandwidth()
    bound = bound_seconds(preset, config, speed)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    median_cpu = {name: statistics.median(values) for name, values in cpu.items() if values}
    print(
        f"{args.preset}: {limits.size} responses of {limits.min()} to {limits.max()} tokens "
        f"(mean {limits.mean():.0f}), {preset.slots} at a time, prompts of {preset.prompt}\n"
    )
    rows = [
        {
            "what": {"sample": "pgpo_jax", "generate": "transformers"}[name],
            "seconds": value,
            "tokens/s": total / value,
            "CPU-seconds": median_cpu[name],
        }
        for name, value in median.items()
    ]
    rows.append(
        {"what": "memory bound", "seconds": bound, "tokens/s": total / bound, "CPU-seconds": "-"}
    )
    measure.table(rows)
    both = "generate" in seconds
    if not both:
        print(f"transformers: {absent}")
    print()
    result = {
        "tokens_per_second": total / median["sample"],
        "speedup_over_transformers": measure.ratio(seconds, "generate", "sample") if both else None,
        "transformers_absent": None if both else absent,
        "cpu_time_ratio": median_cpu["generate"] / median_cpu["sample"] if both else None,
        "bound_fraction": bound / median["sample"],
        "compilations": compiled,
        "first_call_seconds": first,
        "seconds": seconds,
        "cpu_seconds": {name: values for name, values in cpu.items() if values},
        "bandwidth_bytes_per_second": speed,
        "tokens": total,
        "slots": preset.slots,
        "tunix_recorded": preset.recorded,
        "load_average": os.getloadavg()[0],  # above the number of cores: others were at work
        "peers": {name: version_of(name) for name in ("torch", "transformers")},
    }
    measure.finish(f"sampler_{args.preset}_{jax.default_backend()}", result, args.save)


def version_of(name: str) -> str | None:
    """The version of a package that need not be there."""
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
