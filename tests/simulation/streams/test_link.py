"""The simulated link behaves as a connection does, so that what is found on it is true."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest

from tests.simulation.loop import run_virtually
from tests.simulation.streams.link import KEEPALIVE_S, Link, LinkSpec, Listener, SimTransport

SPEC = LinkSpec(delay_s=0.01, capacity=1000, piece=70)


class End(asyncio.Protocol):
    def __init__(self) -> None:
        self.data = b""
        self.told: list[str] = []
        self.reads = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, SimTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert data
        self.data += data
        self.reads += 1

    def eof_received(self) -> bool:
        self.told.append("eof")
        return False

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")

    def connection_lost(self, error: Exception | None) -> None:
        self.told.append("lost" if error is None else "broken")


def on_link(spec: LinkSpec, test: Any, seed: int = 1) -> None:
    async def main() -> None:
        here, there = End(), End()
        listener = Listener(lambda: there, lambda: Link(spec, Random(seed)))
        await listener.connect(lambda: here)
        await test(here, there)

    run_virtually(main())


DATA = bytes(range(256)) * 40


def test_bytes_arrive_whole_in_order_and_late() -> None:
    async def test(here: End, there: End) -> None:
        here.transport.write(DATA)
        await asyncio.sleep(0.0099)
        assert not there.data
        await asyncio.sleep(10)
        assert there.data == DATA
        assert there.reads > 100
        assert here.told == ["resume"] or here.told == []

    on_link(SPEC, test)


def test_a_writer_is_told_to_pause_while_nobody_reads() -> None:
    async def test(here: End, there: End) -> None:
        there.transport.pause_reading()
        here.transport.set_write_buffer_limits(high=2000)
        here.transport.write(DATA)
        await asyncio.sleep(1)
        assert (here.told, there.data) == (["pause"], b"")
        assert here.transport.get_write_buffer_size() == len(DATA) - SPEC.capacity
        there.transport.resume_reading()
        await asyncio.sleep(10)
        assert (here.told, there.data) == (["pause", "resume"], DATA)

    on_link(SPEC, test)


def test_a_close_sends_the_rest_and_an_end() -> None:
    async def test(here: End, there: End) -> None:
        here.transport.write(DATA)
        here.transport.close()
        here.transport.write(b"too late")
        await asyncio.sleep(10)
        assert there.data == DATA
        assert there.told == ["eof", "lost"]
        assert here.told == ["lost"]

    on_link(SPEC, test)


def test_an_abort_breaks_the_other_end() -> None:
    async def test(here: End, there: End) -> None:
        here.transport.write(DATA)
        here.transport.abort()
        await asyncio.sleep(10)
        assert (here.told, there.told) == (["lost"], ["broken"])
        assert len(there.data) <= SPEC.capacity

    on_link(SPEC, test)


@pytest.mark.parametrize("place", [0, 1, 500, len(DATA)])
def test_a_cut_is_at_a_byte_and_both_ends_hear_of_it(place: int) -> None:
    async def test(here: End, there: End) -> None:
        here.transport.write(DATA)
        await asyncio.sleep(10)
        assert there.data == DATA[:place]
        assert (here.told[-1], there.told) == ("broken", ["broken"])

    on_link(LinkSpec(0.01, 1000, 70, cut_after=(place, None)), test)


def test_a_silent_link_keeps_what_is_written_and_tells_nobody() -> None:
    async def test(here: End, there: End) -> None:
        here.transport.set_write_buffer_limits(high=0)
        here.transport.write(DATA)
        there.transport.write(b"back")
        await asyncio.sleep(KEEPALIVE_S - 1)
        assert there.data == DATA[:300]
        assert (here.data, here.told, there.told) == (b"back", ["pause"], [])
        await asyncio.sleep(2)
        assert (here.told, there.told) == (["pause", "broken"], ["broken"])

    on_link(LinkSpec(0.01, 1000, 70, silent_after=(300, None)), test)


def test_who_writes_to_an_end_that_is_gone_hears_of_it() -> None:
    async def test(here: End, there: End) -> None:
        there.eof_received = lambda: True  # type: ignore[method-assign]
        here.transport.close()
        await asyncio.sleep(1)
        there.transport.write(b"hello?")
        await asyncio.sleep(1)
        assert there.told == ["broken"]

    on_link(SPEC, test)


def test_nobody_listens() -> None:
    async def main() -> None:
        listener = Listener(End, lambda: Link(SPEC, Random(1)))
        listener.is_up = False
        with pytest.raises(ConnectionRefusedError):
            await listener.connect(End)

    run_virtually(main())
