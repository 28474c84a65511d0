"""`python -m pgpo_jax.checkpoint`."""

import sys

from pgpo_jax.checkpoint.commands import main
from pgpo_jax.errors import command

sys.exit(command(main))
