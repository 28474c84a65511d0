"""HTML page about one or several runs."""

from pgpo_jax.report.page import main, report
from pgpo_jax.report.samples import SHOWN

__all__ = ["SHOWN", "main", "report"]
