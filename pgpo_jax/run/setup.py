"""Setup of a run: the processes, the devices and all that a configuration names, loaded."""

import dataclasses
import datetime
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from pgpo_jax import hf, keys, models, sharding, tasks
from pgpo_jax.config import Config, load
from pgpo_jax.data import CLOCK
from pgpo_jax.errors import InputError
from pgpo_jax.models import GraphDef
from pgpo_jax.reprompt import RepromptConfig, with_templates
from pgpo_jax.run.checks import check_lengths, check_solutions, check_vocabulary
from pgpo_jax.run.questions import HeldOut, LeftOut, load_questions
from pgpo_jax.sampler import Policy, SamplingConfig
from pgpo_jax.tasks import Task


class Run(NamedTuple):
    """What a configuration names, loaded."""

    config: Config
    task: Task
    """With the questions that fit `data.max_prompt_length`."""
    policy: Policy
    """The model without its trained weights, the tokenizer, the devices, and how responses are
    drawn."""
    reprompt: RepromptConfig
    """How the teacher's prompts are made, with the task's own templates."""
    params: Any
    """The student's trained weights."""
    teacher_graphdef: GraphDef | None = None
    """The teacher's model, where it is another one (`teacher.path`)."""
    teacher: Any = None
    """Its weights."""
    source: str = ""
    """The files that the weights are from, in words."""
    notes: tuple[str, ...] = ()
    """What should be known of solutions, devices and questions before work begins, a sentence each.
    """
    left_out: LeftOut = LeftOut()
    """Training questions that are too long."""
    held_out: tuple[HeldOut, ...] = ()
    """The sets of questions that evaluations ask, the task's own first."""


def join(config: Config) -> Mesh:
    """Joins the other processes and arranges the devices."""
    sharding.initialize(config.distributed)
    return sharding.make_mesh(config.mesh)


def load_run(config: Config, mesh: Mesh | None = None) -> Run:
    """Loads task, model and tokenizer, and checks that they fit together.

    Args:
      config: The configuration.
      mesh: Where to load them; None joins the other processes and arranges the devices.

    Raises:
      InputError: Something is missing, or does not fit the rest.
    """
    mesh = mesh or join(config)
    task = tasks.load(config.task)
    told = check_solutions(task, config.reprompt)
    key = keys.key(config.seed, keys.Stream.PARAMETERS)
    model = hf.from_section(config.model, mesh, key)
    tokenizer = model.tokenizer or task.tokenizer
    if tokenizer is None:
        raise InputError(
            f"model.path: got none; task {task.name} brings no tokenizer, so give a checkpoint"
        )
    config = _with_date(config, tokenizer)
    sampling = _complete(config, tokenizer)
    reprompt = with_templates(config.reprompt, task.templates)
    check_vocabulary(model.config, tokenizer, sampling)
    check_lengths(model.config, sampling, config.data, reprompt)
    task, left_out, held_out = questions = load_questions(config, task, tokenizer, reprompt)
    policy = Policy(model.graphdef, tokenizer, mesh, sampling, config.data, frozen=model.frozen)
    path = config.model.path
    source = "" if path is None else hf.describe_files(path)
    axes, shapes = models.param_axes(model.config), model.frozen or model.params
    whole = sharding.describe_whole(axes, shapes, mesh, frozen=model.frozen is not None)
    adapters = hf.adapter_notes(config.model.lora, path)
    notes = (*told, *whole, *adapters, *questions.notes(config.data))
    run = Run(config, task, policy, reprompt, model.params, source=source, notes=notes)
    run = run._replace(left_out=left_out, held_out=held_out)
    if config.teacher.path is None:
        return run
    return _with_teacher(run, model.config.vocab_size)


def _with_date(config: Config, tokenizer: Any) -> Config:
    """The configuration with the date of the run's first day, if the chat template has a clock.

    It stands in the run's config.yaml as an option of the template, so that a run that is resumed
    on another day asks the same prompts.
    """
    options = config.data.template_options
    if "strftime_now" not in str(getattr(tokenizer, "chat_template", None)):
        return config
    if options.keys() & {CLOCK, "date_string"}:
        return config
    path, date = os.path.join(config.output_dir, "config.yaml"), None
    if os.path.exists(path):
        date = load(path).data.template_options.get(CLOCK)
    if date is None:
        (day,) = sharding.agree_max([datetime.date.today().toordinal()])
        date = datetime.date.fromordinal(day).isoformat()
    frozen = dataclasses.replace(config.data, template_options={**options, CLOCK: date})
    return dataclasses.replace(config, data=frozen)


def _complete(config: Config, tokenizer: Any) -> SamplingConfig:
    """The sampling section with the model's end tokens and vocabulary."""
    sampling, known = config.sampling, set(tokenizer.get_vocab().values())
    if not sampling.end_tokens:
        ends = {*hf.end_tokens(config.model.path, tokenizer)}
        if (turn_end := hf.turn_end(tokenizer)) is not None:
            ends.add(turn_end)
        ends = ends & known or ends  # a config.json may name tokens of another tokenizer too
        sampling = dataclasses.replace(sampling, end_tokens=tuple(sorted(ends)))
    largest = max(known, default=0)  # ids may have gaps: not its length
    if sampling.vocab_size is None:  # rows beyond the tokenizer's are padding
        sampling = dataclasses.replace(sampling, vocab_size=largest + 1)
    gaps = {*range(min(largest, sampling.vocab_size))} - known
    unknown = tuple(sorted({*sampling.unknown_tokens} | gaps))
    return dataclasses.replace(sampling, unknown_tokens=unknown)


def _with_teacher(run: Run, vocab_size: int) -> Run:
    """The run with another model as its teacher."""
    config, tokenizer = run.config, run.policy.tokenizer
    section = dataclasses.replace(
        config.model, path=config.teacher.path, architecture=None, lora=models.OFF
    )
    key = jax.random.key(0)  # a checkpoint draws nothing
    teacher = hf.from_section(section, run.policy.mesh, key)
    if teacher.tokenizer is not None and teacher.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"teacher.path: {config.teacher.path} has another vocabulary than the student; its "
            "choice of token would mean nothing, so take a teacher of the same family"
        )
    if (size := teacher.config.vocab_size) != vocab_size:
        raise InputError(
            f"teacher.path: got a model of {size} tokens; the student has {vocab_size}"
        )
    parts = [run.source, f"the teacher's {hf.describe_files(config.teacher.path or '')}"]
    source = "; ".join(filter(None, parts))
    return run._replace(teacher_graphdef=teacher.graphdef, teacher=teacher.params, source=source)


def checkpoint_folder(config: Config) -> str:
    """Where the checkpoints of a run are."""
    return config.checkpoint.path or os.path.join(config.output_dir, "checkpoints")


def warm_start_folder(config: Config) -> str:
    """Where those of its warm start are, while that goes on."""
    return os.path.join(checkpoint_folder(config), "warm_start")


def check_rows(config: Config, mesh: Mesh) -> None:
    """An update's rows must divide over micro-batches, devices and hosts; found before anything is
    computed."""
    parts, hosts = mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count()
    updates, micro_batches = config.data.updates_per_rollout, config.data.micro_batches
    questions = config.data.questions_per_step // updates
    rows = questions * config.sampling.num_samples
    if questions % hosts or rows % (parts * micro_batches):
        got = f"data.questions_per_step: got {questions} ("
        if updates > 1:
            got = f"data.updates_per_rollout: got {updates} ({questions} questions an update "
        raise InputError(
            f"{got}x {config.sampling.num_samples} samples = {rows} rows); must divide by {hosts} "
            f"hosts, and rows by {parts} devices (data x fsdp) x {micro_batches} micro-batches"
        )


def describe(run: Run) -> str:
    """What is trained, on what, in one line."""
    content = ", ".join(f"{part} {digest}" for part, digest in tasks.digest(run.task).items())
    also = "".join(f" + {len(s.task.test):,} of {s.label}" for s in run.held_out[1:])
    mesh, frozen = run.policy.mesh, run.policy.frozen
    trained, whole = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (run.params, (run.params, frozen))
    )
    size = f"{whole:,} parameters" + (f", {trained:,} of them trained adapters," if frozen else "")
    shape = " x ".join(f"{name} {count}" for name, count in mesh.shape.items())
    device = mesh.devices.flat[0].device_kind
    updates, steps = run.config.data.updates, run.config.steps
    held_out = f"{len(run.task.test):,} held out{also}"
    return (
        f"{run.task.name}: {len(run.task.train):,} questions, {held_out} ({content}); "
        f"{size} on {mesh.size} {device} ({shape}); "
        + (f"{steps} updates" if updates == 1 else f"{steps} steps of {updates} updates")
    )
