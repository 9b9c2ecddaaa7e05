from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.loop import signals
from orchestrator.loop.signals import Terminal, hold_hangup, on_hangup, on_signals


class Site:
    """A process with or without a terminal."""

    def __init__(self) -> None:
        self.has_terminal = True


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site()
    monkeypatch.setattr(signals, "_has_terminal", lambda: made.has_terminal)
    return made


@pytest.fixture
def with_nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def hang_up() -> str:
    """What SIGHUP is taken for, once."""

    async def main() -> str:
        heard: asyncio.Queue[str] = asyncio.Queue()
        with on_hangup(lambda: heard.put_nowait("reload"), lambda: heard.put_nowait("stop")):
            os.kill(os.getpid(), signal.SIGHUP)
            return await heard.get()

    return asyncio.run(main())


def test_sighup_asks_for_the_config_to_be_read_again(site: Site) -> None:
    assert hang_up() == "reload"


def test_sighup_of_a_terminal_that_is_gone_asks_for_the_end(site: Site) -> None:
    async def main() -> str:
        heard: asyncio.Queue[str] = asyncio.Queue()
        with on_hangup(lambda: heard.put_nowait("reload"), lambda: heard.put_nowait("stop")):
            site.has_terminal = False
            os.kill(os.getpid(), signal.SIGHUP)
            return await heard.get()

    assert asyncio.run(main()) == "stop"


def test_the_end_of_a_terminal_is_heard_once(site: Site) -> None:
    async def main() -> list[str]:
        heard: list[str] = []
        with on_hangup(lambda: heard.append("reload"), lambda: heard.append("stop")):
            site.has_terminal = False
            for _ in range(2):  # the shell and the kernel both tell of it
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.sleep(0.05)
        return heard

    assert asyncio.run(main()) == ["stop"]


def test_without_a_terminal_from_the_start_none_can_be_gone(site: Site) -> None:
    site.has_terminal = False
    assert hang_up() == "reload"


def test_who_was_started_with_nohup_outlives_its_terminal(site: Site, with_nohup: None) -> None:
    terminal = Terminal()
    site.has_terminal = False
    assert not terminal.is_gone()


def test_a_terminal_that_is_there_is_not_gone(site: Site) -> None:
    terminal = Terminal()
    assert not terminal.is_gone()
    site.has_terminal = False
    assert terminal.is_gone()


def test_signals_are_heard_within_the_block_only() -> None:
    numbers = (signal.SIGUSR1, signal.SIGUSR2)

    async def main() -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        with on_signals(lambda: heard.put_nowait("heard"), numbers):
            for number in numbers:
                os.kill(os.getpid(), number)
                assert await heard.get() == "heard"
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL] * 2

    asyncio.run(main())


@pytest.fixture
def unblocked() -> Iterator[None]:
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def test_sighup_during_the_start_waits_and_is_heard(site: Site, unblocked: None) -> None:
    hold_hangup()
    signal.pthread_kill(threading.get_ident(), signal.SIGHUP)  # pytest's own threads do not hold it

    async def main() -> str:
        heard: asyncio.Queue[str] = asyncio.Queue()
        with on_hangup(lambda: heard.put_nowait("reload"), lambda: heard.put_nowait("stop")):
            return await heard.get()

    assert asyncio.run(main()) == "reload"


def test_sighup_is_held_again_at_the_end(site: Site, unblocked: None) -> None:
    async def main() -> None:
        hold_hangup()
        with on_hangup(lambda: None, lambda: None):
            assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    asyncio.run(main())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
