from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from orchestrator.discovery import dns
from orchestrator.discovery.base import SourceAway
from orchestrator.discovery.dns import INTERVAL_S, JITTER, SOON_S, DnsSource
from orchestrator.wire.member import MemberSet
from tests.orchestrator.discovery.followed import DECODE, PREFILL
from tests.simulation.loop import VirtualTimeLoop


class Resolver(VirtualTimeLoop):
    """A loop whose resolver answers what a test says."""

    addresses: tuple[str, ...] = ()
    error: Exception | None = None
    asked = 0

    async def resolve(self, host: str, port: int) -> list[Any]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


def run(story: Callable[[Resolver, list[MemberSet], asyncio.Task[Any]], Any]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Resolver)
        loop.addresses = ("10.0.0.1", "fd00::2")
        sets: list[MemberSet] = []
        source = DnsSource("workers", 8000, [DECODE, PREFILL], Random(0), loop.resolve)
        watching = asyncio.create_task(source.watch(sets.append))
        await asyncio.sleep(0.01)
        await story(loop, sets, watching)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    with asyncio.Runner(loop_factory=Resolver) as runner:
        runner.run(main())


def urls(found: MemberSet) -> list[str]:
    return [one.url for one in found.members if one.role == "decode"]


def test_all_addresses_are_workers_of_each_pool() -> None:
    async def story(loop: Resolver, sets: list[MemberSet], _: object) -> None:
        assert urls(sets[0]) == ["http://10.0.0.1:8000", "http://[fd00::2]:8000"]
        assert [(one.role, one.name, one.uid) for one in sets[0].members][2:] == [
            ("prefill", "10.0.0.1:8000", "10.0.0.1:8000"),
            ("prefill", "[fd00::2]:8000", "[fd00::2]:8000"),
        ]
        loop.addresses = ("10.0.0.1", "fd00::2", "10.0.0.3")
        await asyncio.sleep(INTERVAL_S * (1 + JITTER))
        assert len(urls(sets[-1])) == 3

    run(story)


def test_one_that_is_missing_once_is_looked_for_again() -> None:
    async def story(loop: Resolver, sets: list[MemberSet], _: object) -> None:
        both = loop.addresses
        loop.addresses = both[:1]
        await asyncio.sleep(INTERVAL_S * (1 + JITTER))
        assert len(urls(sets[-1])) == 2
        await asyncio.sleep(SOON_S * (1 + JITTER))
        assert urls(sets[-1]) == ["http://10.0.0.1:8000"]

    run(story)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "workers cannot be resolved: Name or",
        ),
        (UnicodeError("label too long"), "cannot be resolved: label too long"),
        (OSError("no sockets"), "cannot be resolved: no sockets"),
    ],
)
def test_a_resolver_that_fails_is_away(error: Exception, why: str) -> None:
    async def story(loop: Resolver, sets: list[MemberSet], watching: asyncio.Task[Any]) -> None:
        loop.error = error
        with pytest.raises(SourceAway, match=why):
            await watching
        assert len(sets) == 1

    run(story)


def test_localhost_is_resolved() -> None:
    async def main() -> None:
        sets: list[MemberSet] = []
        watching = asyncio.create_task(DnsSource("localhost", 8, [DECODE], Random(0)).watch(sets.append))
        async with asyncio.timeout(60):
            while not sets:  # noqa: ASYNC110  # a list tells no event
                await asyncio.sleep(0.01)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert {"http://127.0.0.1:8", "http://[::1]:8"} & set(urls(sets[0]))

    asyncio.run(main())


def test_a_resolver_that_hangs_is_away_and_asked_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    go, has_begun = threading.Event(), threading.Event()
    asked: list[threading.Thread] = []

    def hang(*_: object, **__: object) -> list[Any]:
        asked.append(threading.current_thread())
        has_begun.set()
        go.wait(60)
        return []

    monkeypatch.setattr(dns, "PATIENCE_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", hang)

    async def main() -> None:
        source = DnsSource("workers", 8, [DECODE], Random(0))
        for _ in range(3):
            with pytest.raises(SourceAway, match="the resolver does not answer for workers"):
                await source.watch(lambda found: None)

    asyncio.run(main())
    assert has_begun.wait(60)
    go.set()
    assert [thread.daemon for thread in asked] == [True]
