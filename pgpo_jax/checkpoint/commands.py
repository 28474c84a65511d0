"""Command line of the checkpoints: `python -m pgpo_jax.checkpoint compare RUN_A RUN_B`."""

from collections.abc import Sequence

from pgpo_jax.checkpoint.compare import compare
from pgpo_jax.command import Argument, Command, parse_one_of

COMPARE = Command(
    "checkpoint compare",
    """Says whether two runs are equal bit by bit, or where they differ first.

Compared are the arrays of the newest and of the best checkpoint, the metrics but for times, and the
samples. The exit code is 0 where the two are equal, 1 where they differ.
""",
    (Argument("RUN_A", "a run's folder (its output_dir)"), Argument("RUN_B", "another")),
    example="runs/one runs/other",
)


def main(argv: Sequence[str]) -> int:
    """The command line; see `--help`."""
    _, arguments = parse_one_of((COMPARE,), "Checkpoints of runs.", argv)
    difference = compare(*arguments.words)
    print(difference or "equal")
    return 1 if difference else 0
