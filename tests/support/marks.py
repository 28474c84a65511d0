"""Marks that several test files share."""

import os

import pytest

long = pytest.mark.skipif(
    not os.environ.get("PGPO_JAX_LONG"), reason="takes minutes: PGPO_JAX_LONG=1 runs it"
)
"""For what repeats a slow test at length: run before a release."""
