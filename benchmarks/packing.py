"""What does packing save, and what does it cost where there is nothing to save?

The same update (`train_step.py` says what is in it) on the same responses, padded and packed, in
turns. `skewed`: responses of an eighth of the limit on average and one at it, which makes every
padded row that wide. `equal`: all prompts and responses at their limits, so that packing only adds
its mask and its gather; `data.packing: auto` leaves such a batch as it is.

The physics: a product costs its columns, whether they hold tokens or padding, and attention the
square of a row's width. So time should follow the columns, up to what does not depend on them
(optimizer, moving average).

Shapes are counted without computing: over `--batches` batches of the published sizes (256 responses
of 8 per question, 8 devices, 4 micro-batches; prompts of 100 to 500 tokens; response limit 8192,
log-normal, their mean rising from 100 to 500; every 250th at the limit), each new one is a
compilation.

    python benchmarks/packing.py [--preset small] [--repeats 5] [--save]
"""

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from support import cases, measure

from pgpo_jax import data, fused, sharding
from pgpo_jax.data import Batch, DataConfig, Examples, pack
from pgpo_jax.data.batch import padding_fraction
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.models import decoder
from pgpo_jax.optimizer import OptimizerConfig, make_optimizer
from pgpo_jax.state import init_train_state, train_state_shardings
from pgpo_jax.step import make_train_step


class Preset(NamedTuple):
    """A model of random weights, the rows of a batch and the limits of their lengths."""

    shape: dict[str, Any]
    rows: int
    prompt: int
    feedback: int  # tokens that the teacher sees besides the prompt
    response: int


PRESETS = {
    "tiny": Preset(cases.TINY, rows=8, prompt=16, feedback=16, response=64),
    "small": Preset(cases.qwen3(8192, 256, 768, 6, 4, 2, 64), 8, 64, 64, 256),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as the host needs."""

    index: int
    platform: str = "none"
    process_index: int = 0


def make_examples(prompts, teacher_prompts, responses, vocab: int, limits: tuple[int, int, int]):
    """Random tokens of the given lengths; widths are those of `data.bucket`."""
    rng = np.random.default_rng(0)
    lengths = (prompts, teacher_prompts, responses)
    widths = [data.bucket(int(n.max()), limit) for n, limit in zip(lengths, limits, strict=True)]
    tokens = [rng.integers(0, vocab, (len(responses), width), np.int32) for width in widths]
    masks = [
        np.arange(width)[None] >= width - n[:, None]
        for width, n in zip(widths, lengths, strict=True)
    ]
    return Examples(
        prompts={"student": (tokens[0], masks[0]), "teacher": (tokens[1], masks[1])},
        responses=tokens[2],
        response_mask=np.arange(widths[2])[None] < responses[:, None],
        sampler_log_probs=np.full(tokens[2].shape, -np.log(vocab), np.float32),
        has_context=np.ones(len(responses), bool),
    )


def is_packed(batch: Batch) -> bool:
    """Whether its rows may hold several sequences."""
    return batch.views["student"].segments is not None


def skewed(rng, mean: float, limit: int, rows: int) -> np.ndarray:
    """Log-normal lengths whose deviation is that of a mean of 1.3 times the median."""
    sigma = np.sqrt(2 * np.log(1.3))
    return np.clip(rng.lognormal(np.log(mean / 1.3), sigma, rows), 1, limit).astype(int)


def examples_of(preset: Preset) -> dict[str, Examples]:
    rng = np.random.default_rng(1)
    ones = np.ones(preset.rows, int)
    responses = skewed(rng, preset.response / 8, preset.response, preset.rows)
    responses[0] = preset.response
    prompts = rng.integers(preset.prompt // 4, preset.prompt + 1, preset.rows)
    limits = (preset.prompt, preset.prompt + preset.feedback, preset.response)
    vocab = preset.shape["vocab_size"]
    return {
        "skewed": make_examples(prompts, prompts + preset.feedback, responses, vocab, limits),
        "equal": make_examples(*(limit * ones for limit in limits), vocab, limits),
    }


def compare(preset: Preset, examples: Examples, repeats: int) -> dict[str, Any]:
    """Seconds, memory, padding and losses of an update on a batch, padded and packed."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1))
    options = decoder.Options(dtype=jnp.float32)
    config = decoder.ModelConfig.from_hf(preset.shape)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0))
    states, measured, memory = {}, {}, {}

    def build(name):
        graphdef, params = decoder.init(config, options, jax.random.key(0), mesh)
        where = train_state_shardings(params, optimizer)
        step = make_train_step(graphdef, optimizer, fused.Options(DistillationConfig()), where)
        on_mesh = cases.place(examples, mesh, name)
        states[name] = init_train_state(params, optimizer)
        compiled = step.lower(states[name], on_mesh).compile()
        memory[name] = measure.cost(compiled)["temp_bytes"]

        def call():
            states[name], measured[name] = compiled(states[name], on_mesh)
            return states[name]

        return call

    functions = {name: build(name) for name in ("never", "always")}
    seconds = measure.paired_cpu(functions, repeats, settle=1)
    losses = [float(measured[name]["loss"]) for name in functions]
    assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[0]), f"the losses differ: {losses}"
    start = time.perf_counter()
    chosen = pack(examples, DataConfig(), mesh)
    host_seconds = time.perf_counter() - start
    median = statistics.median
    return {
        "time_ratio": measure.ratio(seconds.wall, "always", "never"),
        "cpu_time_ratio": measure.ratio(seconds.cpu, "always", "never"),
        "seconds_padded": median(seconds.wall["never"]),
        "seconds_packed": median(seconds.wall["always"]),
        "cpu_seconds_padded": median(seconds.cpu["never"]),
        "cpu_seconds_packed": median(seconds.cpu["always"]),
        "padding_fraction_padded": float(measured["never"]["padding_fraction"]),
        "padding_fraction_packed": float(measured["always"]["padding_fraction"]),
        "temp_bytes_ratio": memory["always"] / memory["never"],
        "packed_by_auto": is_packed(chosen),
        "packing_seconds": host_seconds,
    }


def count_shapes(batches: int) -> dict[str, Any]:
    """Shapes of a run, and its padding; nothing is computed."""
    rows, devices, micro_batches = 256, 8, 4
    held = np.array([[Device(index) for index in range(devices)]])
    mesh = Mesh(held, ("data", "fsdp"))
    rng = np.random.default_rng(2)
    shapes: dict[str, set] = {"padded": set(), "packed": set()}
    shares = []
    for index in range(batches):
        responses = skewed(rng, 100 + 400 * index / batches, 8192, rows)
        responses[rng.random(rows) < 1 / 250] = 8192
        prompts = np.repeat(rng.integers(100, 500, rows // 8), 8)
        shown = np.roll(responses.reshape(-1, 8), 1, axis=1).ravel()  # the demonstration
        limits = (2048, 10240, 8192)
        examples = make_examples(prompts, prompts + shown + 60, responses, 8, limits)
        padded, packed = (
            pack(examples, DataConfig(packing=name, micro_batches=micro_batches), mesh)
            for name in ("never", "auto")
        )
        assert is_packed(packed)
        sizes = []
        for name, one in (("padded", padded), ("packed", packed)):
            arrays = jax.tree.leaves(one)
            shapes[name].add(tuple(x.shape for x in arrays))
            sizes.append(1 - float(padding_fraction(one)))
        shares.append(sizes[0] / sizes[1])
    return {
        "batches": batches,
        "shapes_padded": len(shapes["padded"]),
        "shapes_packed": len(shapes["packed"]),
        "columns_ratio": statistics.mean(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--save", action="store_true", help="keep the result under results/")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    result = {
        name: compare(preset, examples, args.repeats)
        for name, examples in examples_of(preset).items()
    }
    measure.table([{"lengths": name, **values} for name, values in result.items()])
    counted = count_shapes(args.batches)
    print()
    measure.table([counted])
    print()
    line = {
        "preset": args.preset,
        **preset._asdict(),
        **result,
        **counted,
        "repeats": args.repeats,
        "load_average": os.getloadavg()[0],
    }
    measure.finish(f"packing_{args.preset}_{jax.default_backend()}", line, args.save)


if __name__ == "__main__":
    main()
