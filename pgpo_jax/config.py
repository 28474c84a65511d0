"""The configuration of a run: the sections of all parts, read from YAML with dotted overrides."""

import contextlib
import dataclasses
import difflib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import draccus
import yaml
from draccus.utils import DecodingError, ParsingError

from pgpo_jax.checkpoint import CheckpointConfig
from pgpo_jax.data import DataConfig
from pgpo_jax.errors import InputError, require
from pgpo_jax.evaluate import EvaluationConfig
from pgpo_jax.hf import ModelSection
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.metrics import MetricsConfig
from pgpo_jax.optimizer import OptimizerConfig
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.sampler import SamplingConfig
from pgpo_jax.sharding import DistributedConfig, MeshConfig
from pgpo_jax.tasks import TaskConfig
from pgpo_jax.warm_start import WarmStartConfig


@dataclass(frozen=True)
class Config:
    """One run. Every section's dataclass stands beside the code that it configures."""

    seed: int = 0
    """Everything random derives from it and from the step, so any step can be replayed."""
    steps: int = 100
    """Updates of the student."""
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
    """Divergence, information, and the teacher's average."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and the multiplier."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """avg@k on held-out questions."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved, and when."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Log files, trackers and the screen."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are arranged."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Several processes."""

    def __post_init__(self):
        require(
            "",
            self,
            seed=(self.seed >= 0, "at least 0"),
            steps=(self.steps >= 0, "at least 0"),
            output_dir=(bool(self.output_dir), "a folder"),
        )
        corrects = self.distillation.importance_cap is not None
        if corrects and self.sampling.temperature != self.distillation.temperature:
            raise InputError(
                f"sampling.temperature: got {self.sampling.temperature}; must equal "
                f"distillation.temperature = {self.distillation.temperature}, whose log-probs the "
                "importance weights compare, unless distillation.importance_cap is null"
            )


def load(path: str | None, overrides: Sequence[str] = (), prog: str | None = None) -> Config:
    """Reads a YAML file, then applies overrides such as `["--optimizer.alpha", "0.5"]`.

    Args:
      path: The file, or None for the defaults alone.
      overrides: Command-line arguments; `--help` prints every field with default and doc and exits.
      prog: The command's name in `--help`.

    Raises:
      InputError: A missing file, broken YAML, an unknown or missing field, a value of a wrong type,
        or one that breaks its section's rule.
    """
    _check_names(overrides)
    if path is not None:
        _check_file(path)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return draccus.parse(Config, config_path=path, args=list(overrides), prog=prog)
    except InputError:
        raise
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(stderr.getvalue().strip().splitlines()[-1]) from stop
    except (DecodingError, ParsingError, TypeError, ValueError, AttributeError) as error:
        raise _as_input_error(error, path) from error


def from_command_line(argv: Sequence[str], command: str) -> Config:
    """`CONFIG [--section.field value ...]`, the arguments that the commands share."""
    path = argv[0] if argv and not argv[0].startswith("-") else None
    overrides = argv[1:] if path else argv
    if path is None and not {"-h", "--help"} & set(argv):
        raise InputError(
            f"CONFIG: got none; give a file: python -m pgpo_jax.{command} configs/quickstart.yaml"
        )
    prog = f"python -m pgpo_jax.{command} CONFIG"
    return load(path, overrides, prog)


def dump(config: Config) -> str:
    """The whole configuration as YAML, itself a valid configuration file."""
    return str(draccus.dump(config))


def _check_file(path: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"CONFIG: {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"CONFIG: {path} is not valid YAML ({error})") from error
    if content is not None and not isinstance(content, dict):
        raise InputError(
            f"CONFIG: {path} holds {type(content).__name__}; must be fields and values"
        )
    if not os.path.getsize(path):
        raise InputError(f"CONFIG: {path} is empty")


def _check_names(overrides: Sequence[str]) -> None:
    """argparse would answer an unknown option with its whole usage text."""
    names = _field_names(Config)
    for argument in overrides:
        name = argument.split("=")[0]
        if not name.startswith("--") or name == "--help" or name[2:] in names:
            continue
        close = difflib.get_close_matches(name[2:], names, n=1)
        hint = f"did you mean --{close[0]}?" if close else "see --help for all fields"
        raise InputError(f"{name}: no such field; {hint}")


def _field_names(section: Any, prefix: str = "") -> list[str]:
    names = []
    for item in dataclasses.fields(section):
        nested = isinstance(item.type, type) and dataclasses.is_dataclass(item.type)
        if nested:
            names += _field_names(item.type, f"{prefix}{item.name}.")
        else:
            names.append(prefix + item.name)
    return names


def _as_input_error(error: BaseException, path: str | None) -> InputError:
    """What a section itself objected to, else draccus's message."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return InputError(f"{path or 'command line'}: {error}")
