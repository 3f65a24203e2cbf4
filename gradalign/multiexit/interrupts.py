"""Ctrl-C that ends a run after a whole step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gradalign.multiexit.runs import Run


class Interrupted(Exception):  # noqa: N818 (not an error: the run can go on)
    """Training was stopped by Ctrl-C, after a whole step and with a checkpoint.

    Attributes:
        run: The run.
        step: How many steps it has done.
    """

    def __init__(self, run: Run, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.run = run
        self.step = step


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C, so that the step is finished; a second one stops at once."""
    interrupted = threading.Event()

    def once(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield interrupted
        return
    previous = signal.signal(signal.SIGINT, once)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
