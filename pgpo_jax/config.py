"""The configuration of a run: the sections of all parts, read from YAML with dotted overrides."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pgpo_jax import fields
from pgpo_jax.checkpoint import CheckpointConfig
from pgpo_jax.command import Argument, Arguments, Command, Option, parse
from pgpo_jax.data import DataConfig
from pgpo_jax.discovery import DiscoveryConfig
from pgpo_jax.errors import InputError, require
from pgpo_jax.evaluation import EvaluationConfig
from pgpo_jax.hf import ModelSection
from pgpo_jax.logs import AlarmsConfig, MetricsConfig
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.methods import ObjectiveConfig
from pgpo_jax.optimizer import OptimizerConfig
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.sampler import SamplingConfig
from pgpo_jax.sharding import DistributedConfig, MeshConfig
from pgpo_jax.tasks import TaskConfig
from pgpo_jax.teacher import TeacherConfig
from pgpo_jax.warm_start import WarmStartConfig


@dataclass(frozen=True)
class Config:
    """One run. Every section's dataclass stands beside the code that it configures."""

    seed: int = 0
    """All that is random derives from it and the step: any step can be replayed."""
    steps: int = 100
    """Updates of the student: rollouts, each with one update unless `data` asks for several."""
    output_dir: str = "runs/pgpo"
    """The run's folder; the same command with the same folder resumes."""
    model: ModelSection = field(default_factory=ModelSection)
    """The student: a checkpoint, or a small architecture with random weights."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Questions, and how answers are judged."""
    data: DataConfig = field(default_factory=DataConfig)
    """Batches of questions."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    """Supervised steps before the first update; off by default."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the student answers in training."""
    reprompt: RepromptConfig = field(default_factory=RepromptConfig)
    """What the teacher is shown."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Divergence and information."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss: SDPO, or a rival's."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """How the teacher follows the student."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and the multiplier."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """avg@k on held-out questions."""
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    """Hard questions, for the command `discover`."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved, and when."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Log files, trackers and the screen."""
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    """When the run warns of itself, and what ends it early."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are arranged."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Several processes."""

    def __post_init__(self):
        require(
            "",
            self,
            # JAX would keep the lowest 32 bits and say nothing.
            seed=(0 <= self.seed < 2**32, "at least 0 and below 2**32"),
            steps=(self.steps >= 0, "at least 0"),
            output_dir=(bool(self.output_dir), "a folder"),
        )
        compares = self.distillation.importance_cap is not None or self.objective.policy
        if compares and self.sampling.temperature != self.distillation.temperature:
            raise InputError(
                f"sampling.temperature: got {self.sampling.temperature}; must equal "
                f"distillation.temperature = {self.distillation.temperature}, whose log-probs the "
                "importance weights and the policy gradient compare with the sampler's, unless "
                "distillation.importance_cap is null and objective.policy is 0"
            )
        if self.objective.policy:
            for name, whole in (("top_p", 1), ("top_k", None)):
                if (value := getattr(self.sampling, name)) != whole:
                    raise InputError(
                        f"sampling.{name}: got {value}; must be {fields.show(whole)} with "
                        "objective.policy, whose ratio to the sampler's probabilities would stay "
                        "below 1 wherever tokens were left out, clipped without a gradient"
                    )
        if self.objective.policy and self.data.without_context == "drop":
            raise InputError(
                "data.without_context: got drop; must be keep with objective.policy, which learns "
                "from responses whether or not their teacher got a context"
            )
        if self.optimizer.name == "muon" and self.model.lora.rank:
            raise InputError(
                f"optimizer.name: got muon with model.lora.rank = {self.model.lora.rank}; it is "
                "for the layers' projections, which adapters leave as they are: choose another"
            )
        if self.alarms.reaction == "refresh_teacher" and self.teacher.path is not None:
            raise InputError(
                "alarms.reaction: got refresh_teacher; the teacher is another model "
                f"(teacher.path = {self.teacher.path}), which the student cannot replace: choose "
                "another reaction, or teacher.path null"
            )
        if self.objective.policy and self.sampling.num_samples < 2:
            raise InputError(
                f"sampling.num_samples: got {self.sampling.num_samples}; objective.policy compares "
                "the responses of a question, so it needs at least 2"
            )


def shipped() -> dict[str, str]:
    """Name -> file of the configurations that come with the package: `quickstart`, `rivals/grpo`.

    They lie in the package, or beside it where that is installed from a checkout.
    """
    package = Path(__file__).parent
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    paths = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): str(path) for path in paths}


def _file(path: str, name: str) -> str:
    """`path`, or where nothing is there the shipped configuration of this name, if there is one."""
    return path if os.path.exists(path) else shipped().get(name, path)


_BASE = Option("--base", "a file that CONFIG changes, in place of the one it names", "FILE")


def command(name: str, doc: str | None, *options: Option) -> Command:
    """A command that takes a configuration: `CONFIG [--section.field VALUE ...]`."""
    argument = Argument("CONFIG", "a YAML file of fields and values")
    example = "configs/quickstart.yaml"
    return Command(name, doc, (argument,), (_BASE, *options), example, Config)


def from_arguments(arguments: Arguments) -> Config:
    """The configuration that the arguments of such a command state."""
    return _load(arguments.words[0], arguments, {})


def load(
    path: str | None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Config:
    """Reads a YAML file, then applies overrides such as `["--optimizer.alpha", "0.5"]`.

    Args:
      path: The file, or the name of a shipped configuration (`shipped`); None for the defaults
        alone. Its entry `base`, a path relative to it or such a name, is what its fields change.
      overrides: Command-line arguments, and `--base FILE` in place of the file's own. A value is
        read as YAML, that of a text field as it stands.
      values: Dotted field -> value, over all others; a text is read as an override's.

    Raises:
      InputError: A missing file, broken YAML, an unknown field, a value of a wrong type, or one
        that breaks its section's rule.
    """
    form = Command("train", None, (), (_BASE,), sections=Config)
    return _load(path, parse(form, overrides), values or {})


def _load(path: str | None, arguments: Arguments, values: Mapping[str, Any]) -> Config:
    tree = {} if path is None else _read_on_base(path, arguments.options.get("--base"))
    if path is not None and _is_of_a_run(path):
        _move(tree, os.path.dirname(path) or ".")
        _forget_old_defaults(tree)
        _rename_old_values(tree)
    kinds = fields.kinds(Config)
    for name, value in (arguments.fields | {**values}).items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise InputError(f"{section}: got {fields.show(place)}; must be fields and values")
        text = isinstance(value, str)
        place[last] = _from_text(value, kinds.get(name), name) if text else value
    return fields.decode(Config, tree)


def _is_of_a_run(path: str) -> bool:
    """Whether a file is the configuration that a run left in its folder."""
    folder, name = os.path.split(path)
    return name == "config.yaml" and os.path.exists(os.path.join(folder, "metrics.jsonl"))


def _move(tree: dict[str, Any], folder: str) -> None:
    """Says where a run's folder is now: it may have been moved, and its checkpoints with it."""
    before, checkpoint = tree.get("output_dir"), tree.get("checkpoint")
    tree["output_dir"] = folder
    if isinstance(before, str) and isinstance(checkpoint, dict):
        path = checkpoint.get("path")
        if isinstance(path, str) and path.startswith(os.path.join(before, "")):
            checkpoint["path"] = os.path.join(folder, os.path.relpath(path, before))


def _forget_old_defaults(tree: dict[str, Any]) -> None:
    """Takes out of a run's own file what an earlier version wrote there and did not mean.

    A run states every field, so one without `task.columns` is from before there were `columns`.
    Then `test_split` was `test` by default, also where there are no splits, and was read as it now
    is by default: the split `test` if there is one, else `test_fraction`.
    """
    task = tree.get("task")
    if isinstance(task, dict) and "columns" not in task and task.get("test_split") == "test":
        del task["test_split"]


RENAMED = {
    ("distillation", "kind"): {"choice": "teacher_argmax"},
    ("objective", "advantage"): {"choice": "teacher_argmax"},
    ("objective", "question_weight"): {"spread": "reward_std"},
    ("objective", "token_weight"): {"certainty": "teacher_entropy"},
}
"""What choices were called when a run was made, and what they are called now."""


def _rename_old_values(tree: dict[str, Any]) -> None:
    for (section, name), names in RENAMED.items():
        stated = tree.get(section)
        if isinstance(stated, dict) and isinstance(value := stated.get(name), str):
            stated[name] = names.get(value, value)


def dump(config: Config) -> str:
    """The whole configuration as YAML, itself a valid configuration file."""
    return fields.dump_yaml(fields.encode(config))


def _read_on_base(path: str, base: str | None = None, inside: tuple[str, ...] = ()) -> Any:
    """The file's mapping over that of the file it names as `base` (or of `base`, if given)."""
    path = _file(path, path)
    tree = _read(path)
    named = tree.pop("base", None)
    if base is None:
        if named is None:
            return tree
        if not isinstance(named, str):
            raise InputError(f"base: got {fields.show(named)} in {path}; must be a file")
        base = _file(os.path.join(os.path.dirname(path), named), named)
    inside = (*inside, os.path.realpath(path))
    if os.path.realpath(base) in inside:
        raise InputError(f"base: {path} names {base}, which stands on it; must not be a circle")
    return _laid_over(_read_on_base(base, inside=inside), tree)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with the fields of `above`, section by section."""
    both = {
        name: _laid_over(below[name], value)
        for name, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(name), dict)
    }
    return below | above | both


def _read(path: str) -> dict[str, Any]:
    """The file's mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            content = fields.load_yaml(file.read())
    except OSError as error:
        raise InputError(f"CONFIG: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # UnicodeDecodeError too
        raise InputError(f"CONFIG: {path} is not valid YAML ({error})") from error
    if content is None:
        raise InputError(f"CONFIG: {path} is empty; must be fields and values")
    if not isinstance(content, dict):
        raise InputError(f"CONFIG: {path} holds {fields.show(content)}; must be fields and values")
    return content


def _from_text(text: str, kind: Any, name: str) -> Any:
    if kind is str or (set(get_args(kind)) == {str, NoneType} and text != "null"):
        return text
    try:
        return fields.load_yaml(text)
    except ValueError as error:
        raise InputError(f"--{name}: got {text!r}, which is not valid YAML ({error})") from error
