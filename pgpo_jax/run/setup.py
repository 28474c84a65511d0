"""What a configuration names, loaded: task, model, tokenizer, devices."""

import dataclasses
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from pgpo_jax import hf, sampler, sharding, tasks
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError
from pgpo_jax.models import GraphDef
from pgpo_jax.run.checks import check_run
from pgpo_jax.tasks import Task


class Run(NamedTuple):
    """What a configuration names, loaded."""

    mesh: Mesh
    task: Task
    graphdef: GraphDef
    params: Any
    tokenizer: Any
    sampling: sampler.SamplingConfig
    """The sampling section with the model's end tokens and vocabulary."""
    teacher_graphdef: GraphDef | None = None
    """The teacher's model, where it is another one (`teacher.path`)."""
    teacher: Any = None
    """Its parameters."""


def load_run(config: Config) -> Run:
    """Joins the other processes, arranges the devices, loads task, model and tokenizer."""
    sharding.initialize(config.distributed)
    mesh = sharding.make_mesh(config.mesh)
    task = tasks.load(config.task)
    model = hf.from_section(config.model, mesh, jax.random.key(config.seed))
    tokenizer = model.tokenizer or task.tokenizer
    if tokenizer is None:
        raise InputError(
            f"model.path: got none; task {task.name} brings no tokenizer, so give a checkpoint"
        )
    sampling = config.sampling
    if not sampling.end_tokens:
        ends = hf.end_tokens(config.model.path, tokenizer)
        sampling = dataclasses.replace(sampling, end_tokens=ends)
    if sampling.vocab_size is None:  # rows beyond the tokenizer's are padding
        sampling = dataclasses.replace(sampling, vocab_size=len(tokenizer))
    check_run(task, model.config, tokenizer, sampling, config.data, config.reprompt)
    run = Run(mesh, task, model.graphdef, model.params, tokenizer, sampling)
    if config.teacher.path is None:
        return run
    section = dataclasses.replace(config.model, path=config.teacher.path, architecture=None)
    teacher = hf.from_section(section, mesh, jax.random.key(0))
    if teacher.tokenizer is not None and teacher.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"teacher.path: {config.teacher.path} has another vocabulary than the student; its "
            "choice of token would mean nothing, so take a teacher of the same family"
        )
    if (size := teacher.config.vocab_size) != model.config.vocab_size:
        raise InputError(
            f"teacher.path: got a model of {size} tokens; the student has {model.config.vocab_size}"
        )
    return run._replace(teacher_graphdef=teacher.graphdef, teacher=teacher.params)


def checkpoint_folder(config: Config) -> str:
    """Where the checkpoints of a run are."""
    return config.checkpoint.path or os.path.join(config.output_dir, "checkpoints")


def check_rows(config: Config, mesh: Mesh) -> None:
    """Rows must divide over micro-batches, devices and hosts; found before anything is computed."""
    parts, hosts = mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count()
    questions, micro_batches = config.data.questions_per_step, config.data.micro_batches
    rows = questions * config.sampling.num_samples
    if questions % hosts or rows % (parts * micro_batches):
        raise InputError(
            f"data.questions_per_step: got {questions} (x {config.sampling.num_samples} samples = "
            f"{rows} rows); must divide by {hosts} hosts, and rows by {parts} devices (data x fsdp)"
            f" x {micro_batches} micro-batches"
        )


def describe(config: Config, run: Run) -> str:
    size = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    shape = " x ".join(f"{name} {count}" for name, count in run.mesh.shape.items())
    device = run.mesh.devices.flat[0].device_kind
    return (
        f"{run.task.name}: {len(run.task.train):,} questions, {len(run.task.test):,} held out; "
        f"{size:,} parameters on {run.mesh.size} {device} ({shape}); {config.steps} updates"
    )
