"""How long work is stopped, or asked to save: Ctrl-C or SIGTERM stops it after its step, SIGUSR1 only saves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from groundup.runtime.console import warn


class StopRequest:
    """What somebody asked of the work.

    Attributes:
        signal: the one that asked to stop; None while none did. The request is true once there is one.
        save: somebody asked to save and go on; whoever does so sets it back.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.save = False

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While the block runs, the first SIGINT or SIGTERM only sets the yielded flag; a second one acts as usual.

    SIGUSR1 (where there is one) asks to save, as often as it comes: batch systems send it ahead of the end. It keeps
    asking after the first SIGTERM too, since its usual action would end the process in the middle of saving.
    Off the main thread, where Python delivers no signals, the flags simply stay unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    stopping = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    saving = {number: signal.getsignal(number) for name in ("SIGUSR1",) if (number := getattr(signal, name, None))}

    def ask_to_stop(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        for known, handler in stopping.items():
            signal.signal(known, handler)
        warn(f"{signal.Signals(number).name} received: finishing this step and saving. Once more stops at once.")

    def ask_to_save(_number: int, _frame: FrameType | None) -> None:
        request.save = True

    for number in stopping:
        signal.signal(number, ask_to_stop)
    for number in saving:
        signal.signal(number, ask_to_save)
    try:
        yield request
    finally:
        for number, handler in (stopping | saving).items():
            signal.signal(number, handler)
