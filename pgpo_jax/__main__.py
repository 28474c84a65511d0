"""The commands by name: `pgpo-jax train CONFIG`, which is `python -m pgpo_jax.train CONFIG`."""

import difflib
import importlib
from collections.abc import Sequence
from typing import NoReturn

from pgpo_jax import errors, extras
from pgpo_jax.errors import InputError

COMMANDS = {
    "train": ("pgpo_jax.train", "train a student, or go on where a run stopped"),
    "evaluate": ("pgpo_jax.evaluate", "evaluate a run's newest student"),
    "discover": ("pgpo_jax.discover", "solve hard questions at test time"),
    "convert": ("pgpo_jax.convert", "checkpoints to Hugging Face folders"),
    "plan": ("pgpo_jax.plan", "memory and time on devices that need not exist"),
    "report": ("pgpo_jax.report", "one page about runs"),
    "doctor": ("pgpo_jax.doctor", "whether this machine is ready for a run"),
    "checkpoint": ("pgpo_jax.checkpoint.commands", "compare two runs bit by bit"),
}


def run(argv: Sequence[str]) -> int | None:
    """Runs the command that the first argument names."""
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print("usage: pgpo-jax COMMAND ...\n")
        print("\n".join(f"  {command:12}{doc}" for command, (_, doc) in COMMANDS.items()))
        print("\npgpo-jax COMMAND --help says more.")
        return 0
    if name not in COMMANDS:
        meant = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {meant[0]}?" if meant else f"must be one of {', '.join(COMMANDS)}"
        raise InputError(f"COMMAND: got {name or 'none'}; {hint}")
    extras.require_train(f"pgpo-jax {name}")
    return importlib.import_module(COMMANDS[name][0]).main(argv[1:])


def main() -> NoReturn:
    """The console script `pgpo-jax`."""
    errors.command(run)


if __name__ == "__main__":
    main()
