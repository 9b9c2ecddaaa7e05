"""The running event loop hears signals here.

SIGHUP means one of two things: somebody wants the config to be read again, or the terminal is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def on_signals(
    callback: Callable[[], None], numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[None]:
    """Have the running event loop call `callback` for each signal."""
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def hold_hangup() -> None:
    """Have SIGHUP wait until `on_hangup` hears it: whoever is still starting would be ended by it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


@contextmanager
def on_hangup(reload: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    """Have the running event loop call `reload` for SIGHUP, or `stop`, once, if a terminal's end caused it.

    What was held by `hold_hangup` is heard now; at the end it is held again, as the process is about to end.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, _Hangup(reload, stop).hear)
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        if signal.SIGHUP in held:
            hold_hangup()
        loop.remove_signal_handler(signal.SIGHUP)


class _Hangup:
    """A shell and the kernel each tell of the terminal's end: the second SIGHUP asks for nothing more."""

    def __init__(self, reload: Callable[[], None], stop: Callable[[], None]) -> None:
        self._terminal = Terminal()
        self._reload = reload
        self._stop = stop
        self._has_stopped = False

    def hear(self) -> None:
        if not self._terminal.is_gone():
            self._reload()
        elif not self._has_stopped:
            self._has_stopped = True
            self._stop()


class Terminal:
    """A terminal may go away. Make this before SIGHUP is handled: who was started with nohup outlives it."""

    def __init__(self) -> None:
        is_detached = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._had_one = not is_detached and _has_terminal()

    def is_gone(self) -> bool:
        """Say whether there was a terminal and it is not there any more: nobody can press Ctrl-C now."""
        return self._had_one and not _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
