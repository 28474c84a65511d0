"""Evaluates a run's newest student on held-out questions.

CONFIG is the run's own config.yaml, in its folder. The last line is the result as JSON.
"""

import functools
import json
import sys
from collections.abc import Sequence

from pgpo_jax import config as config_module
from pgpo_jax import keys, sharding
from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.command import parse
from pgpo_jax.errors import command
from pgpo_jax.logs import Console
from pgpo_jax.run import checkpoint_folder, evaluate_sets, load_run

COMMAND = config_module.command("evaluate", __doc__)


def main(argv: Sequence[str]) -> int:
    """Evaluates the newest student of a run, or the model itself where there is no run."""
    config = config_module.from_arguments(parse(COMMAND, argv))
    run = load_run(config)
    params, step = run.params, 0
    if not config.evaluation.untrained:
        with Checkpoints(checkpoint_folder(config), read_only=True) as checkpoints:
            step, params = checkpoints.restore_student(params)
    key = keys.key(config.seed, keys.Stream.EVALUATION)  # the run's own evaluation key
    with Console(config.metrics.log_seconds, sharding.is_main()) as console:

        def tell(phase: str):
            return functools.partial(console.progress, phase)

        found = evaluate_sets(run, params, key, tell)
        for warning in found.warnings:
            console.warn(warning)
    if sharding.is_main():
        print(json.dumps({"step": step, **found.metrics}))
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
