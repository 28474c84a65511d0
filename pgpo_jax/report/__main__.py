"""`python -m pgpo_jax.report`."""

import sys

from pgpo_jax.errors import command
from pgpo_jax.report.page import main

sys.exit(command(main))
