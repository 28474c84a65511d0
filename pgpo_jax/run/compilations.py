"""Compilations of XLA while a run goes on, counted by function."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def count_compilations() -> Iterator[Counter[str]]:
    """Yields a count of what XLA compiles meanwhile, by the name of the jitted function."""
    counts: Counter[str] = Counter()

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            counts[str(kwargs.get("fun_name"))] += 1

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
