"""Who the teacher is after an update: refresh rules, and the teacher that mixes two models' logits.

Sources: the average and the trust region are those of SDPO (Hübotter et al., arXiv 2601.20802);
a frozen or external teacher is that of on-policy distillation and TGPO (arXiv 2605.13230).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from pgpo_jax.errors import require


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """How the teacher follows the student (config section `teacher`)."""

    refresh: Literal["ema", "frozen", "live", "periodic", "trust_region", "restarts", "gated"] = (
        "ema"
    )
    """After an update: `ema` moves by `ema_rate` towards the student, `live` becomes it, `periodic`
    becomes it every `period` updates, `frozen` stays. `trust_region` stays too, and teaches with
    logits mixed from its own and, by `mix`, the student's (both see the teacher's prompt).
    `restarts` becomes the student at `restart_fractions` of the run and stays between. `gated`
    stays until a look, every `period` steps, finds that the mean reward of those steps is above
    that of the last refresh by more than `gate_rise` and that at most `gate_tail` of their
    responses were cut off; the first look but sets the level."""
    ema_rate: float = 0.05
    """The teacher moves by this part of its distance to the student after every update."""
    period: int = 50
    """Updates between two refreshes of `periodic`; steps between two looks of `gated`."""
    restart_fractions: tuple[float, ...] = (0.25, 0.5, 0.75)
    """The parts of `steps` after which `restarts` makes the teacher the student. A run with them
    keeps its `steps` when it is resumed."""
    gate_rise: float = 0.0
    """How far the mean reward must have risen for `gated`; the threshold is ours."""
    gate_tail: float = 0.1
    """Largest part of responses cut off at the longest length for `gated`; the threshold is ours.
    """
    mix: float = 0.05
    """The student's part in the logits of `trust_region`; 0 is `frozen`, 1 is `live`."""
    path: str | None = None
    """A checkpoint folder or hub id of another, frozen teacher with the student's vocabulary; null:
    the student is its own teacher."""

    def __post_init__(self):
        require(
            "teacher",
            self,
            ema_rate=(0 <= self.ema_rate <= 1, "in [0, 1]"),
            period=(self.period >= 1, "at least 1"),
            restart_fractions=(
                bool(self.restart_fractions)
                and all(0 < fraction < 1 for fraction in self.restart_fractions)
                and [*self.restart_fractions] == sorted({*self.restart_fractions}),
                "rising numbers between 0 and 1, both excluded",
            ),
            gate_rise=(0 <= self.gate_rise < float("inf"), "at least 0"),
            gate_tail=(0 <= self.gate_tail <= 1, "in [0, 1]"),
            mix=(0 <= self.mix <= 1, "in [0, 1]"),
            refresh=(
                self.path is None or self.refresh == "frozen",
                "frozen where teacher.path names another model",
            ),
        )


AVERAGE = TeacherConfig()
"""The default: an exponential moving average of the student."""

Params = Any
REFRESH: dict[str, Callable[[Params, Params, Int[Array, ""], TeacherConfig], Params]] = {
    "ema": lambda student, teacher, count, config: optax.incremental_update(
        student, teacher, config.ema_rate
    ),
    "frozen": lambda student, teacher, count, config: teacher,
    "live": lambda student, teacher, count, config: jax.tree.map(jnp.copy, student),
    "periodic": lambda student, teacher, count, config: optax.periodic_update(
        student, teacher, count, config.period
    ),
    "trust_region": lambda student, teacher, count, config: teacher,
    "restarts": lambda student, teacher, count, config: teacher,
    "gated": lambda student, teacher, count, config: teacher,
}
"""(student, teacher, updates done, config) -> the next teacher. `restarts` and `gated` look at the
run, not at an update: the loop asks `methods.refresh_due` between two updates."""


def refresh(
    student: Params, teacher: Params, count: Int[Array, ""], config: TeacherConfig
) -> Params:
    """The teacher after an update.

    Args:
      student: The parameters after it.
      teacher: The parameters before it, float32: in bfloat16 an average would never move.
      count: Updates done, this one included.
      config: The rule.
    """
    return REFRESH[config.refresh](student, teacher, count, config)


def taught(side: Callable[[Any], Any], teacher: Any, live: Any, config: TeacherConfig) -> Any:
    """What the teacher says at the response tokens.

    Args:
      side: A model -> its `fused.Side`.
      teacher: The model that follows the student.
      live: The student, through which no gradient flows.
      config: The rule.
    """
    own = side(teacher)
    if config.refresh != "trust_region":
        return own
    other = side(live)
    hidden, head = mix_logits(own.hidden, own.head, other.hidden, other.head, config.mix)
    return own._replace(hidden=hidden, head=head)


def mix_logits(
    hidden: Float[Array, "tokens embed"],
    head: Float[Array, "vocab embed"],
    other_hidden: Float[Array, "tokens embed"],
    other_head: Float[Array, "vocab embed"],
    mix: float,
) -> tuple[Float[Array, "tokens both"], Float[Array, "vocab both"]]:
    """Hidden states and a head whose logits are (1 - mix) those of one model + mix of the other's.

    One product over both widths: the mixture needs no logits of its own in the vocabulary pass.
    """
    scaled = [(1 - mix) * hidden, mix * other_hidden.astype(hidden.dtype)]
    return jnp.concatenate(scaled, 1), jnp.concatenate([head, other_head], 1)
