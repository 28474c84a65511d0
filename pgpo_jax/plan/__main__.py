"""`python -m pgpo_jax.plan`."""

import sys

from pgpo_jax.errors import command
from pgpo_jax.plan.summary import main

sys.exit(command(main))
