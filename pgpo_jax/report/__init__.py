"""One page about one or several runs."""

from pgpo_jax.report.page import SHOWN, main, report, text

__all__ = ["SHOWN", "main", "report", "text"]
