"""The first signal asks, the second acts."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from groundup.runtime.interrupt import stop_on_signals

# Raised in this thread: what os.kill sends to the process may reach it by another thread, and a moment later.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop
        assert signal.getsignal(number) not in before
        signal.raise_signal(number)
        assert stop
        assert stop.signal == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capsys.readouterr().err.startswith(f"groundup: warning: {number.name} received: finishing this step")


def test_the_second_ctrl_c_acts_as_usual() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert stop
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal did nothing")
    assert signal.getsignal(signal.SIGINT) is before


TWICE = """
import os, signal, sys
from groundup.runtime.interrupt import stop_on_signals
with stop_on_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


def test_a_second_signal_of_the_other_kind_ends_the_process(child: Any) -> None:
    process = child(TWICE)
    output, _ = process.communicate(timeout=60)
    assert output == "asked\n"
    assert process.returncode == -signal.SIGTERM


def test_handlers_come_back_when_the_block_raises() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="bug"), stop_on_signals():
        raise ValueError("bug")
    assert signal.getsignal(signal.SIGTERM) is before


def test_off_the_main_thread_nothing_is_touched() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
