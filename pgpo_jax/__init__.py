"""Physics-Guided Policy Optimization (PGPO) with self-distillation in JAX.

A language model answers questions; a teacher (an average of the model's past that is shown a
successful sibling answer) scores the same answers token by token; the student is pulled towards
that teacher, and every optimizer step is scaled by

    rho = clip(exp(alpha * I), rho_min, rho_max),

where I estimates the information that the teacher's context carries (arXiv 2606.03620).
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from pgpo_jax import extras

if TYPE_CHECKING:
    from pgpo_jax import information, losses
    from pgpo_jax.losses import aggregate, divergence
    from pgpo_jax.multiplier import ScaleByInformationState, scale_by_information
    from pgpo_jax.optimizer import OptimizerConfig, make_optimizer

__version__ = "0.1.0"

__all__ = [
    "OptimizerConfig",
    "ScaleByInformationState",
    "aggregate",
    "divergence",
    "information",
    "losses",
    "make_optimizer",
    "scale_by_information",
]

_MODULES = {
    "OptimizerConfig": "optimizer",
    "ScaleByInformationState": "multiplier",
    "aggregate": "losses",
    "divergence": "losses",
    "make_optimizer": "optimizer",
    "scale_by_information": "multiplier",
}

extras.check_command(sys.orig_argv)


def __getattr__(name: str) -> Any:
    """A public name, whose module, and JAX with it, is imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"pgpo_jax.{_MODULES.get(name, name)}")
    found = getattr(module, name) if name in _MODULES else module
    globals()[name] = found
    return found
