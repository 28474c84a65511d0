"""Programs of a run, ready to be compiled for devices that need not exist, and their sizes.

Arguments are shapes with shardings (`jax.ShapeDtypeStruct`): nothing is loaded and no memory used.
"""

import dataclasses
import math
import os.path
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pgpo_jax import fused, hf, methods, models, sampler, sharding
from pgpo_jax.config import Config
from pgpo_jax.data import Batch, View, bucket, parts_of
from pgpo_jax.errors import InputError
from pgpo_jax.logs import read_multipliers
from pgpo_jax.models import ModelConfig, Params
from pgpo_jax.objective import GroupStatistics
from pgpo_jax.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from pgpo_jax.state import abstract_train_state, train_state_shardings
from pgpo_jax.step import make_train_step

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rope_theta": 1_000_000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "eos_token_id": 151645,
}
# What config.json of these hub models states, so that a plan needs no network.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    f"Qwen/Qwen3-{name}": QWEN3
    | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }
    for name, hidden, inner, layers, heads, tied in (
        ("0.6B", 1024, 3072, 28, 16, True),
        ("1.7B", 2048, 6144, 28, 16, True),
        ("4B", 2560, 9728, 36, 32, True),
        ("8B", 4096, 12288, 36, 32, False),
    )
}


MOMENTS = ("mu", "nu", "trace")
"""What optax calls moments: the first, the second, and the momentum of `sgd`."""


class Setup(NamedTuple):
    """What is compiled."""

    config: Config
    architecture: ModelConfig
    mesh: Mesh
    rows: int
    """Responses in a step; `update_rows` of them are in an update."""
    prompt: int
    teacher_prompt: int
    response: int
    slots: int

    @property
    def update_rows(self) -> int:
        """Responses in an update."""
        return self.rows // self.config.data.updates_per_rollout


def architecture_of(section: hf.ModelSection) -> ModelConfig:
    """The model's architecture; its weights are not needed.

    Raises:
      InputError: Neither stated nor to be had.
    """
    if section.architecture is not None:
        return ModelConfig.from_hf(section.architecture, strict=True)
    if section.path is None:
        raise InputError("model.path: got null; state a checkpoint, or model.architecture")
    if section.path in ARCHITECTURES and not os.path.isdir(section.path):
        return ModelConfig.from_hf(ARCHITECTURES[section.path], strict=True)
    try:
        return hf.load_config(section.path)
    except InputError as error:
        raise InputError(
            f"{error}; or plan with --model.path null and its config.json as model.architecture"
        ) from error


def make_setup(config: Config, devices: Sequence[Any]) -> Setup:
    """Mesh and sizes.

    Raises:
      InputError: The configuration's mesh, micro-batches and slots do not suit the devices.
    """
    if config.teacher.path is not None:
        raise InputError(
            f"teacher.path: got {config.teacher.path}; a plan counts a teacher of the student's "
            "own size, so plan with --teacher.path null --teacher.refresh frozen"
        )
    architecture, mesh = architecture_of(config.model), sharding.make_mesh(config.mesh, devices)
    if mesh.size != len(devices):
        raise InputError(
            f"mesh: got {tuple(mesh.shape.values())}, {mesh.size} of {len(devices)} devices"
        )
    parts, rows = mesh.shape["data"] * mesh.shape["fsdp"], row_count(config)
    update_rows = rows // config.data.updates_per_rollout
    if update_rows % (parts * config.data.micro_batches):
        raise InputError(
            f"data.micro_batches: got {config.data.micro_batches}; the {update_rows} rows of an "
            f"update must divide by it and by data x fsdp = {parts} devices"
        )
    slots = min(config.sampling.slots or rows, rows)
    if not config.sampling.end_tokens:
        sampling = dataclasses.replace(config.sampling, end_tokens=hf.end_tokens(architecture))
        config = dataclasses.replace(config, sampling=sampling)

    return Setup(
        config=config,
        architecture=architecture,
        mesh=mesh,
        rows=rows,
        prompt=config.data.max_prompt_length,
        teacher_prompt=config.reprompt.max_length,
        response=config.sampling.max_response_length,
        slots=-(-slots // parts) * parts,
    )


def row_count(config: Config) -> int:
    """Responses in a step."""
    return config.data.questions_per_step * config.sampling.num_samples


def abstract_params(setup: Setup) -> tuple[Params, Params | None]:
    """Shapes, types and shardings of the trained parameters, and of those that are frozen."""
    return models.abstract_params(setup.architecture, setup.config.model.lora, setup.mesh)


def _graphdef(setup: Setup) -> Any:
    options = dataclasses.replace(setup.config.model.options(), mesh=setup.mesh)
    return models.make_graphdef(setup.architecture, options)


def abstract_batch(setup: Setup) -> Batch:
    """Shapes and shardings of the worst batch: every prompt and response at its limit."""
    parts = parts_of(setup.mesh) * setup.config.data.micro_batches
    each = setup.update_rows // parts
    tokens = each * setup.response

    def array(dtype: Any, *sizes: int) -> Any:
        shape = (parts, *sizes)
        where = sharding.row_sharding(shape, setup.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def view(prompt: int) -> View:
        rows = array(jnp.int32, each, prompt + setup.response)
        return View(rows, array(jnp.int32, tokens))

    views = dict.fromkeys(("teacher", *setup.config.objective.views), setup.teacher_prompt)
    return Batch(
        views={name: view(length) for name, length in {"student": setup.prompt, **views}.items()},
        responses=array(jnp.int32, tokens),
        response_mask=array(jnp.bool_, tokens),
        sampler_log_probs=array(jnp.float32, tokens),
        owners=array(jnp.int32, tokens),
        lengths=array(jnp.int32, each),
        has_context=array(jnp.bool_, each),
        rows=array(jnp.int32, each),
        held=array(jnp.int32),
        group=GroupStatistics(*(array(kind, each) for kind in (jnp.bool_, *[jnp.float32] * 2))),
        has_wrong=array(jnp.bool_, each) if setup.config.objective.views else None,
        old_log_probs=array(jnp.float32, tokens)
        if setup.config.objective.old_log_probs == "recomputed"
        else None,
    )


def lower_train_step(setup: Setup, alpha: float | None = None) -> jax.stages.Lowered:
    """The train step of a run (`step.make_train_step`), with another alpha if one is given."""
    config, (params, frozen) = setup.config, abstract_params(setup)
    chosen = config.optimizer
    if alpha is not None:
        chosen = dataclasses.replace(chosen, alpha=alpha)
    optimizer = make_optimizer(chosen, read_multipliers(chosen.replay))
    train_step: Any = make_train_step(
        _graphdef(setup),
        optimizer,
        fused.Options(config.distillation, config.metrics.estimators, config.sampling.vocabulary()),
        train_state_shardings(params, optimizer),
        objective=methods.make_objective(config.objective),
        teacher_config=config.teacher,
    )
    state = abstract_train_state(params, optimizer)
    return train_step.lower(state, abstract_batch(setup), frozen)


def lower_sampler(setup: Setup) -> dict[str, sampler.Lowered]:
    """The sampler's programs in a rollout of the worst batch, by name."""
    return sampler.lower_programs(
        _graphdef(setup),
        models.join(*abstract_params(setup)),
        dataclasses.replace(setup.config.sampling, slots=setup.slots),
        questions=setup.config.data.questions_per_step,
        prompt_length=setup.prompt,
    )


def whole_arrays(setup: Setup) -> list[dict[str, Any]]:
    """Parameters whose axis the mesh was to split but does not divide: `sharding.whole_arrays`."""
    axes, shapes = (f(setup.architecture) for f in (models.param_axes, models.param_shapes))
    return [array._asdict() for array in sharding.whole_arrays(axes, shapes, setup.mesh)]


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes with shardings."""
    return sum(sharding.shard_bytes(x, x.sharding) for x in jax.tree.leaves(tree))


def state_bytes(setup: Setup) -> dict[str, int]:
    """Per device: student, its gradients, optimizer and teacher, and what is frozen beside them."""
    chosen = setup.config.optimizer
    optimizer = make_optimizer(chosen, read_multipliers(chosen.replay))
    params, frozen = abstract_params(setup)
    state = abstract_train_state(params, optimizer)
    beside = {} if frozen is None else {"frozen": shard_bytes(frozen)}
    return beside | {
        "parameters": shard_bytes(state.student),
        "optimizer": shard_bytes(state.opt_state),
        "teacher": shard_bytes(state.teacher),
        "gradients": shard_bytes(state.student),
    }


def state_bytes_per_parameter(setup: Setup) -> float:
    """Of one copy of the state over all its devices, per parameter of the model."""
    devices = setup.mesh.shape["fsdp"] * setup.mesh.shape["tensor"]
    return sum(state_bytes(setup).values()) * devices / _parameters(setup)


def bytes_per_parameter(setup: Setup) -> dict[str, dict[str, float]]:
    """Bytes of the state for each parameter of the model, on all devices together.

    Of student and teacher, of what is frozen beside adapters, and, by optimizer and type of the
    first moment, of every moment by the name that optax gives it.
    """
    (params, frozen), state = abstract_params(setup), None
    count = _parameters(setup)

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    found: dict[str, dict[str, float]] = {}
    for name in OPTIMIZERS:
        if name == "muon" and frozen is not None:  # refused: no projection is trained
            continue
        for dtype in ("float32", "bfloat16"):
            chosen = OptimizerConfig(name=name, moments_dtype=dtype)  # pyright: ignore[reportArgumentType]
            state = abstract_train_state(params, make_optimizer(chosen))
            moments: dict[str, int] = {}
            for path, leaf in jax.tree.leaves_with_path(state.opt_state):
                fields = [entry.name for entry in path if hasattr(entry, "name")]
                if leaf.ndim and (kind := fields[-1]) in MOMENTS:
                    moments[kind] = moments.get(kind, 0) + size(leaf)
            found[f"{name}, {dtype}"] = {kind: total / count for kind, total in moments.items()}
    assert state is not None
    both = {"student": size(state.student) / count, "teacher": size(state.teacher) / count}
    beside = {} if frozen is None else {"frozen": size(frozen) / count}
    return {"state": both | beside} | found


def _parameters(setup: Setup) -> int:
    return sum(x.size for x in jax.tree.leaves(models.param_shapes(setup.architecture)))


def cache_bytes(setup: Setup) -> int:
    """Keys and values of a device's slots at their longest."""
    c, mesh = setup.architecture, setup.mesh
    columns = bucket(setup.prompt, 2**30) + setup.response  # as the sampler pads them
    dtype = setup.config.sampling.cache_dtype or setup.config.model.dtype
    heads = c.num_key_value_heads
    heads //= mesh.shape["tensor"] if heads % mesh.shape["tensor"] == 0 else 1
    slots = setup.slots // (mesh.shape["data"] * mesh.shape["fsdp"])
    size = jnp.dtype(dtype).itemsize
    return 2 * c.num_hidden_layers * slots * columns * heads * c.head_dim * size


def model_flops(setup: Setup) -> int:
    """What the method asks for in one update, all devices together; nothing computed twice counts.

    Two operations per multiply-add; the student's backward pass is twice its forward pass, but for
    matrices that are frozen, and attention counts the keys that a query sees.
    """
    c, lora = setup.architecture, setup.config.model.lora
    layers = models.leaves(c)["layers"]
    weights = sum(math.prod(leaf.shape) for name, leaf in layers.items() if name.endswith("_proj"))
    added = 0
    if lora.rank:
        leaves = models.adapter_leaves(c, lora)["layers"].values()
        added = sum(math.prod(leaf.shape) for leaf in leaves)

    def forward(time: int) -> int:
        def seen(window: int) -> int:
            return window * (window + 1) // 2 + (time - window) * window

        keys = sum(seen(min(kind.window or time, time)) for kind in c.kinds)
        scores = keys * c.num_attention_heads * c.head_dim
        return 2 * time * (weights + added) + 4 * scores

    head = 2 * setup.response * c.hidden_size * c.vocab_size
    time = setup.prompt + setup.response
    student = forward(time) + head
    teacher = forward(setup.teacher_prompt + setup.response) + head
    frozen = 2 * time * weights + head if lora.rank else 0  # whose gradients nobody takes
    return setup.update_rows * (3 * student - frozen + teacher)
