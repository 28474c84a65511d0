"""Pure text checks."""

from __future__ import annotations

from typing import NamedTuple


class Outcome(NamedTuple):
    """What a verifier says about one response."""

    reward: float
    """In [0, 1]."""
    feedback: str = ""
    """What the teacher may be told; empty if there is nothing to say. Never the right answer."""
    well_formed: bool = True
    """Whether the response has the requested format, right or wrong."""
    failed: bool = False
    """The check itself failed (time-out, nothing to parse): reward 0, and counted."""
