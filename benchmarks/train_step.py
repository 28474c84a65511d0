"""How fast and how large is one update, against the same one in PyTorch, and where does it go?

The update is the whole of SDPO with the multiplier of PGPO: student forward and backward, the
teacher's forward over a longer prompt, the divergence on the student's top 100 and the tail,
entropy gap, clipping, AdamW, multiplier, and the teacher's moving average. `support/torch_peer.py`
is the same in PyTorch and transformers, from the same weights, on the same batch and threads; the
run fails if the two disagree on the losses. On a CPU the two take turns; on a GPU, whose memory
both together would overflow, PyTorch comes first.

The physics: a product with P parameters takes 2 P operations per token, forward, and twice that
backward, attention 2 T^2 per head, its width and sequence of T tokens (the causal half). So an
update needs at least

    6 P (student tokens) + 2 P (teacher tokens) + 8 (vocab x embed) (response tokens) + attention

operations, P without the embedding, and MFU is that, over the time, over the device's peak: that of
`pgpo_jax.plan.chips`, or on a CPU the rate of one large float32 product measured here. With
`--lora-rank` nobody needs the gradients of the frozen matrices (2 P) and of the output matrix; then
PyTorch and the parts are left out. Tokens are
those of the student's sequences, prompt and response.

On a CPU most of the temporary memory is touched for the first time in every update; with pages of
2 MiB that is cheap, so both sides run with them (glibc only), and torch's threads may not spin
while the other side works:

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 OMP_WAIT_POLICY=passive
    python benchmarks/train_step.py [--preset cpu_135m] [--repeats 5] [--no-torch] [--save]
"""

import argparse
import dataclasses
import functools
import gc
import math
import os
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from support import cases, measure

from pgpo_jax import fused, hf, models, sharding
from pgpo_jax.data import Batch, Examples
from pgpo_jax.data.batch import response_hidden
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.models import LoraConfig, decoder
from pgpo_jax.optimizer import OptimizerConfig, make_optimizer, scale_by_information
from pgpo_jax.plan import chips
from pgpo_jax.state import init_train_state, train_state_shardings
from pgpo_jax.step import make_train_step
from pgpo_jax.teacher import AVERAGE


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model of random weights and the size of a batch."""

    shape: dict[str, Any]
    rows: int
    prompt: int
    feedback: int  # tokens that the teacher sees besides the prompt
    response: int
    dtype: Any = jnp.float32
    threads: int | None = None  # None: as many as there are
    recorded: dict[str, float] | None = None  # EasyDeL's sampled-token step, on a machine like this


VARIABLES = ("GLIBC_TUNABLES", "OMP_WAIT_POLICY")  # of the environment, part of the result
GPU = {"prompt": 512, "feedback": 512, "response": 1536, "dtype": jnp.bfloat16}
PRESETS = {
    "tiny": Preset(cases.TINY, rows=4, prompt=16, feedback=8, response=16),
    # The fixed case in which the JAX peers were measured.
    "cpu_135m": Preset(
        cases.QWEN3_135M,
        rows=4,
        prompt=64,
        feedback=64,
        response=64,
        threads=2,
        recorded={"seconds": 4.69, "cpu_seconds": 8.88},
    ),
    "smollm2_135m": Preset(cases.SMOLLM2_135M, rows=16, **GPU),
    "qwen3_0.6b": Preset(cases.QWEN3_06B, rows=8, **GPU),
    "qwen3_1.7b": Preset(cases.QWEN3_17B, rows=4, **GPU),
}
SETTINGS = OptimizerConfig(warmup_steps=0)
DISTILLATION = DistillationConfig(top_k=100)


def model_flops(config: decoder.ModelConfig, preset: Preset, lora: LoraConfig) -> float:
    """Operations that an update cannot do without: no optimizer, nothing computed again."""
    shapes = decoder.param_shapes(config)["layers"]
    matrices = sum(x.size for x in jax.tree.leaves(shapes) if len(x.shape) > 2)
    added, frozen = 0, 0
    if lora.rank:
        leaves = models.adapter_leaves(config, lora)["layers"].values()
        added, frozen = sum(math.prod(leaf.shape) for leaf in leaves), matrices
    matrices += added
    student = preset.prompt + preset.response
    teacher = student + preset.feedback
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    per_row = (
        6 * matrices * student
        + 2 * matrices * teacher
        - 2 * frozen * student
        + (6 if lora.rank else 8) * config.vocab_size * config.hidden_size * preset.response
        + 6 * width * student**2
        + 2 * width * teacher**2
    )
    return float(preset.rows * per_row)


def peak_flops() -> tuple[float, str]:
    """Operations per second of products, and where the number is from."""
    device = jax.devices()[0]
    known = chips.chip_of(device).peak_flops
    if known is not None:
        return known, "data sheet, bfloat16 (pgpo_jax.chips)"
    size = 2048
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    seconds = measure.paired({"": lambda: product(matrix, matrix)}, 10, warm_up=2)[""]
    return 2 * size**3 / min(seconds), f"measured: float32 product of {size} x {size}, best of 10"


def parts(graphdef, params, batch: Batch, optimizer, distillation: DistillationConfig, repeats):
    """Wall and CPU seconds of the parts of an update, each compiled and run alone."""

    def student(params):
        return response_hidden(nnx.merge(graphdef, params), batch, "student")

    def teacher(params):
        return response_hidden(nnx.merge(graphdef, params), batch, "teacher")

    @jax.jit
    def student_gradients(params, cotangent):
        return jax.vjp(student, params)[1](cotangent)[0]

    @jax.jit
    def vocabulary(hidden, teacher_hidden, params):
        head = nnx.merge(graphdef, params).head()
        weights = jnp.full(hidden.shape[0], 1 / hidden.shape[0])

        def loss(hidden, head):
            tokens, sampled = batch.responses.reshape(-1), batch.sampler_log_probs.reshape(-1)
            value, terms = fused.distill(
                fused.Side(hidden, head),
                fused.Side(teacher_hidden, head),
                fused.Tokens(tokens, weights, sampled),
                fused.Options(distillation),
            )
            return value, terms.information

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, grads):
        student, teacher, opt_state = state
        updates, opt_state = optimizer.update(grads, opt_state, student, information=0.1)
        student = optax.apply_updates(student, updates)
        teacher = optax.incremental_update(student, teacher, AVERAGE.ema_rate)
        return student, teacher, opt_state

    scale = scale_by_information(1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def multiply(updates):
        return scale.update(updates, scale.init(None), information=0.1)[0]

    hidden, teacher_hidden = jax.jit(student)(params), jax.jit(teacher)(params)
    grads = student_gradients(params, hidden)
    # What changes hands from call to call, so that donated buffers are not used twice.
    held = {
        "update": (*(jax.tree.map(jnp.copy, params) for _ in range(2)), optimizer.init(params)),
        "multiply": jax.tree.map(jnp.copy, grads),
    }

    def threaded(name, function, *arguments):
        def call():
            held[name] = function(held[name], *arguments)
            return held[name]

        return call

    functions = {
        "student forward and backward": lambda: student_gradients(params, hidden),
        "teacher forward": functools.partial(jax.jit(teacher), params),
        "vocabulary pass": lambda: vocabulary(hidden, teacher_hidden, params),
        "optimizer and teacher's average": threaded("update", update, grads),
        "the multiplier alone": threaded("multiply", multiply),
    }
    return measure.paired_cpu(functions, repeats, warm_up=2)


def with_params(preset: Preset, mesh, options: decoder.Options):
    """A model of random weights whose embedding is 3 times as large as at a usual start.

    Logits then have a deviation near 1 and both sides differ by more than rounding. The last of
    what is returned are the parameters beside adapters, None without these.
    """
    config, lora = decoder.ModelConfig.from_hf(preset.shape), options.lora
    dtype = lora.base_dtype if lora.rank else jnp.float32
    graphdef, params = decoder.init(config, options, jax.random.key(0), mesh, dtype)
    params = {**params, "embed_tokens": 3 * params["embed_tokens"]}
    if not lora.rank:
        return config, graphdef, params, None
    return config, graphdef, models.init_adapters(config, lora, jax.random.key(1), mesh), params


def make_peer(folder, preset: Preset, examples: Examples, threads: int | None):
    """The peer and no reason, or no peer and the reason."""
    try:
        from support import torch_peer
    except ImportError as error:
        return None, f"{error}: pip install 'pgpo_jax[peers]'"
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch_peer.torch.cuda.is_available():
        return None, "this torch cannot use the GPU"
    bfloat16 = preset.dtype == jnp.bfloat16
    peer = torch_peer.Peer(
        *(folder, examples, DISTILLATION, SETTINGS),
        bfloat16=bfloat16,
        device=device,
        threads=threads,
    )
    return peer, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu_135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, help="sequences instead of the preset's")
    parser.add_argument("--threads", type=int, help="of both sides, on a CPU")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--unroll", action="store_true", help="layers written out")
    parser.add_argument("--chunk-size", type=int, default=DISTILLATION.chunk_size)
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-parts", action="store_true")
    parser.add_argument("--save", action="store_true", help="keep the result under results/")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    preset = dataclasses.replace(preset, rows=args.rows or preset.rows)
    threads = args.threads or preset.threads
    if threads is not None:  # before jax starts its threads: one per core that the process may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1))
    lora = LoraConfig(rank=args.lora_rank)
    options = decoder.Options(dtype=preset.dtype, remat=args.remat, unroll=args.unroll, lora=lora)
    config, graphdef, params, frozen = with_params(preset, mesh, options)
    flops, (peak, peak_source) = model_flops(config, preset, lora), peak_flops()
    sizes = {
        "rows": preset.rows,
        "prompt": preset.prompt,
        "teacher_prompt": preset.prompt + preset.feedback,
        "response": preset.response,
    }
    examples = cases.make_examples(**sizes, vocab=config.vocab_size)
    distillation = dataclasses.replace(DISTILLATION, chunk_size=args.chunk_size)

    peer, absent = None, "left out by --no-torch"
    if lora.rank:
        absent, args.no_parts = "left out with --lora-rank", True
    elif not args.no_torch:
        with tempfile.TemporaryDirectory() as folder:
            hf.save(folder, graphdef, params)
            peer, absent = make_peer(folder, preset, examples, threads)
    losses: dict[str, list[float]] = {"pgpo_jax": [], "torch": []}
    seconds = measure.Seconds({}, {})
    peer_versions: dict[str, str] = {}

    def torch_call():
        losses["torch"].append(peer.step()["loss"])

    take_turns = jax.default_backend() == "cpu"
    if peer is not None:
        from support import torch_peer

        peer_versions = torch_peer.VERSIONS
        if not take_turns:
            try:
                seconds = measure.paired_cpu({"torch": torch_call}, args.repeats, warm_up=2)
            except torch_peer.torch.OutOfMemoryError:
                absent = "torch ran out of the device's memory"
            peer = None
            gc.collect()
            torch_peer.torch.cuda.empty_cache()

    optimizer = make_optimizer(SETTINGS)
    where = train_state_shardings(params, optimizer)
    step = make_train_step(graphdef, optimizer, fused.Options(distillation), where)
    on_mesh = cases.place(examples, mesh)
    # The parts need the parameters again; the update's are donated.
    state = init_train_state(jax.tree.map(jnp.copy, params), optimizer)
    start = time.perf_counter()
    compiled = step.lower(state, on_mesh, frozen).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()

    def jax_call():
        nonlocal state
        state, measured = compiled(state, on_mesh, frozen)
        losses["pgpo_jax"].append(float(measured["loss"]))
        return state

    functions = {"pgpo_jax": jax_call}
    if peer is not None:
        functions["torch"] = torch_call
    measured = measure.paired_cpu(functions, args.repeats, settle=1)
    seconds = measure.Seconds({**measured.wall, **seconds.wall}, {**measured.cpu, **seconds.cpu})
    peak_memory = jax.local_devices()[0].memory_stats() or {}
    del state, peer, functions
    gc.collect()

    compared = "torch" in seconds.wall
    difference = None
    if compared:
        pairs = list(zip(losses["pgpo_jax"], losses["torch"], strict=True))
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
        tolerance = 1e-3 if preset.dtype == jnp.float32 else 3e-2
        assert difference < tolerance, f"the losses of the two differ: {pairs}"

    wall = {name: statistics.median(values) for name, values in seconds.wall.items()}
    cpu = {name: statistics.median(values) for name, values in seconds.cpu.items()}
    tokens = preset.rows * (preset.prompt + preset.response)
    print(f"{args.preset}: {sizes}, {jnp.dtype(preset.dtype).name}")
    print(f"peak {peak / 1e12:.4g} TFLOP/s ({peak_source}); {flops / 1e9:.4g} GFLOP an update\n")
    measure.table(
        [
            {
                "what": name,
                "seconds": wall[name],
                "CPU-seconds": cpu[name],
                "tokens/s": tokens / wall[name],
                "MFU": flops / wall[name] / peak,
            }
            for name in wall
        ]
    )
    if not compared:
        print(f"torch: {absent}")
    part_seconds = None
    if not args.no_parts:
        by_part = parts(graphdef, params, on_mesh, optimizer, distillation, max(2, args.repeats))
        part_seconds = {
            name: {
                "seconds": statistics.median(values),
                "cpu_seconds": statistics.median(by_part.cpu[name]),
            }
            for name, values in by_part.wall.items()
        }
        print()
        measure.table([{"part": name, **values} for name, values in part_seconds.items()])
    print()
    result = {
        "preset": args.preset,
        **sizes,
        "dtype": jnp.dtype(preset.dtype).name,
        "remat": args.remat,
        "unroll": args.unroll,
        "chunk_size": args.chunk_size,
        "parameters": sum(x.size for x in jax.tree.leaves((params, frozen))),
        "lora_rank": lora.rank,
        "repeats": args.repeats,
        "threads": threads,
        "seconds_per_step": wall["pgpo_jax"],
        "cpu_seconds_per_step": cpu["pgpo_jax"],
        "tokens_per_second": tokens / wall["pgpo_jax"],
        "mfu": flops / wall["pgpo_jax"] / peak,
        "speedup_over_torch": measure.ratio(seconds.wall, "torch", "pgpo_jax")
        if compared
        else None,
        "cpu_speedup_over_torch": measure.ratio(seconds.cpu, "torch", "pgpo_jax")
        if compared
        else None,
        "torch_absent": None if compared else absent,
        "torch_seconds_per_step": wall.get("torch"),
        "torch_cpu_seconds_per_step": cpu.get("torch"),
        "loss_difference": difference,
        "losses": losses,
        "compile_seconds": compile_seconds,
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "device_peak_bytes": peak_memory.get("peak_bytes_in_use"),
        "parts": part_seconds,
        "model_flops": flops,
        "peak_flops": peak,
        "peak_source": peak_source,
        "seconds": seconds.wall,
        "cpu_seconds": seconds.cpu,
        "recorded_easydel": preset.recorded,
        "load_average": os.getloadavg()[0],
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "peers": peer_versions,
    }
    name = f"train_step_{args.preset}_{jax.default_backend()}"
    name += f"_lora_{lora.rank}" if lora.rank else ""
    name += "" if args.threads is None else f"_{threads}_threads"
    measure.finish(name, result, args.save)


if __name__ == "__main__":
    main()
