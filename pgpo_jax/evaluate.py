"""Evaluates a run's newest student on held-out questions: `python -m pgpo_jax.evaluate CONFIG`."""

import json
import sys
from collections.abc import Sequence

from pgpo_jax import keys, sharding
from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.config import from_command_line
from pgpo_jax.errors import command
from pgpo_jax.evaluation import evaluate
from pgpo_jax.run import checkpoint_folder, load_run


def main(argv: Sequence[str]) -> int:
    """Evaluates the newest student of a run, or the model itself where there is no run."""
    config = from_command_line(argv, "evaluate")
    run = load_run(config)
    params, step = run.params, 0
    if not config.evaluation.untrained:
        with Checkpoints(checkpoint_folder(config), read_only=True) as checkpoints:
            step, params = checkpoints.restore_student(params)
    key = keys.key(config.seed, keys.Stream.EVALUATION)  # the run's own evaluation key
    threshold = config.reprompt.threshold
    metrics, _ = evaluate(run.policy, params, run.task, key, config.evaluation, threshold)
    if sharding.is_main():
        print(json.dumps({"step": step, **metrics}))
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
