"""How long work is stopped: Ctrl-C or SIGTERM asks, the work finishes its step, saves, and stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from groundup.runtime.console import warn


class StopRequest:
    """Whether somebody asked the work to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While the block runs, the first SIGINT or SIGTERM only sets the yielded flag; a second one acts as usual.

    Off the main thread, where Python delivers no signals, the flag simply stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        for known, handler in previous.items():
            signal.signal(known, handler)
        warn(f"{signal.Signals(number).name} received: finishing this step and saving. Once more stops at once.")

    for number in previous:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
