"""Signals: SIGTERM and SIGINT end a run after it has saved, on all hosts alike."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from pgpo_jax import sharding


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask the loop to save and end; a second SIGINT interrupts at once.

    Yields:
      Whether any process was asked; all hosts must call it together and get the same answer.
    """
    asked = []

    def ask(number, frame):
        del frame
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(sharding.agree_max([len(asked)])[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
