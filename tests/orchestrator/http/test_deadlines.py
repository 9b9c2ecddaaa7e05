from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from orchestrator.errors import RequestTimeout
from orchestrator.http import listeners
from orchestrator.http.deadlines import LINGER_S, MIN_TAKEN, NEVER, Deadlines, Sweep
from orchestrator.http.exchange import Exchange
from orchestrator.http.limits import ServerLimits
from tests.orchestrator.raw_http import (
    GET,
    SOON,
    RawClient,
    app_of,
    check_error,
    chunked,
    echo,
    lax,
    logs_errors,
    no_errors_logged,
    post,
    run,
    serving,
    until,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures

LIMITS = ServerLimits(header_timeout_s=10, body_idle_timeout_s=3, body_timeout_s=5, write_timeout_s=7)
KEEP_ALIVE_S = 100.0
START_S = 1000.0


class Loop:
    """The event loop's clock."""

    def __init__(self) -> None:
        self.now = START_S

    def time(self) -> float:
        return self.now


class Transport:
    """Whose client takes what the test says."""

    unsent = 0

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str) -> Transport:
        return self

    def fileno(self) -> int:
        raise OSError  # as of a socket that is closed: the kernel tells nothing


class Clock:
    """The deadlines of a connection that was made just now."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.transport = Transport()
        self.deadlines = Deadlines(cast("Any", self.loop), LIMITS, KEEP_ALIVE_S)
        assert self.deadlines.at == NEVER
        self.deadlines.connected(cast("Any", self.transport))

    def after(self, seconds: float) -> Deadlines:
        """Let time go on."""
        self.loop.now += seconds
        return self.deadlines

    @property
    def left(self) -> float:
        return self.deadlines.at - self.loop.now


def test_a_new_client_has_to_send_a_head() -> None:
    assert Clock().left == 10


def test_a_head_has_its_time_however_it_comes() -> None:
    clock = Clock()
    clock.after(4).await_head()
    assert clock.left == 10
    clock.after(4).await_head()
    assert clock.left == 6


def test_each_piece_of_a_body_has_its_time_and_so_has_the_whole() -> None:
    clock = Clock()
    clock.after(1).await_body()
    assert clock.left == 3
    clock.after(2).await_body()
    assert clock.left == 3
    clock.after(2).await_body()
    assert clock.left == 1


def test_a_body_that_the_client_may_send_only_now_has_all_of_its_time() -> None:
    clock = Clock()
    clock.after(1).await_body()
    clock.after(60).await_whole_body()
    assert clock.left == 3
    clock.after(3).await_body()
    assert clock.left == 2


def test_a_pause_is_not_the_clients() -> None:
    clock = Clock()
    clock.after(1).await_body()
    clock.after(2).pause()
    clock.after(60).forgive_pause()
    assert clock.left == 3
    clock.after(2).await_body()
    assert clock.left == 1


def test_between_requests_a_connection_is_kept() -> None:
    clock = Clock()
    clock.after(1).rest(in_head=False)
    assert clock.left == KEEP_ALIVE_S


def test_a_head_that_came_during_the_last_answer_has_its_time_from_its_end() -> None:
    clock = Clock()
    clock.after(60).rest(in_head=True)
    assert clock.left == 10
    clock.after(4).await_head()
    assert clock.left == 6


def test_a_client_has_to_take_enough_in_each_period() -> None:
    clock = Clock()
    clock.transport.unsent = 5 * MIN_TAKEN
    clock.after(1).await_writes()
    assert clock.left == 7
    clock.transport.unsent -= MIN_TAKEN
    assert clock.after(7).lag(clock.loop.now) is None
    assert clock.left == 7
    clock.transport.unsent -= MIN_TAKEN - 1
    assert clock.after(7).lag(clock.loop.now) == (MIN_TAKEN - 1, 3 * MIN_TAKEN + 1)


def test_a_client_cannot_take_less_than_nothing() -> None:
    clock = Clock()
    clock.after(1).await_writes()
    clock.transport.unsent = 10
    assert clock.after(7).lag(clock.loop.now) == (0, 10)


def test_a_client_that_is_to_close_need_not_have_taken_anything_at_first() -> None:
    clock = Clock()
    clock.transport.unsent = 10 * MIN_TAKEN
    clock.after(1).linger()
    assert clock.left == LINGER_S
    assert clock.after(LINGER_S).lag(clock.loop.now) is None
    assert clock.after(7).lag(clock.loop.now) == (0, 10 * MIN_TAKEN)


def test_what_the_kernel_holds_counts_as_not_taken() -> None:
    ours, its = socket.socketpair()
    with ours, its:
        ours.send(b"a" * 3000)
        clock = Clock()
        clock.transport.unsent = 5
        clock.transport.get_extra_info = lambda name: ours  # type: ignore[assignment, return-value]
        clock.deadlines.await_writes()
        lag = clock.deadlines.lag(clock.loop.now)
        assert lag is not None
        assert lag[1] >= 3005


def test_the_sweep_tells_of_deadlines_that_have_passed(run: Any) -> None:
    async def main() -> None:
        loop, sweep, told = asyncio.get_running_loop(), Sweep(0.001), asyncio.Event()
        due, later = (Deadlines(loop, LIMITS, KEEP_ALIVE_S) for _ in range(2))
        calls: list[float] = []

        def expire(now: float) -> None:
            calls.append(now)
            due.at = NEVER
            told.set()

        sweep.add(due, expire)
        sweep.add(later, lambda now: pytest.fail("this one has time"))
        due.at, later.at = loop.time() + 0.01, loop.time() + 3600
        expected = due.at
        await told.wait()
        assert calls[0] >= expected
        await asyncio.sleep(0.01)
        assert len(calls) == 1
        for deadlines in (due, later, later):
            sweep.discard(deadlines)
        await until(lambda: not sweep._is_armed)

    run(main)


# --- on connections -------------------------------------------------------------------------------


def test_a_client_that_never_sends_is_cut_off(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(header_timeout_s=SOON)) as site, site.client() as client:
            assert await client.is_closed()

    run(main)


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\n", GET[:-2], b"\r\nGET", post(b"")[:-2]])
def test_a_slow_head_is_408(start: bytes, run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(header_timeout_s=SOON)) as site, site.client() as client:
            answer = await client.ask(start)
            check_error(answer, 408)
            assert answer.closes
            assert await client.is_closed()
            assert [type(error) for error in site.refused] == [RequestTimeout]

    run(main)


def test_a_dripping_head_is_408(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(header_timeout_s=0.3)) as site, site.client() as client:
            dripping = asyncio.create_task(drip(client, GET[:-2] + b"X: " + b"a" * 10_000))
            check_error(await client.answer(), 408)
            dripping.cancel()

    run(main)


async def drip(client: RawClient, data: bytes) -> None:
    for byte in data:
        client.send(bytes([byte]))
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "start", [post(b"abc")[:-1], chunked(b"abc")[:-1], chunked(b"abc")[:-6], post(b"abc")[:-3]]
)
def test_a_body_that_stops_is_408(start: bytes, run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(body_idle_timeout_s=SOON)) as site, site.client() as client:
            answer = await client.ask(start)
            check_error(answer, 408)
            assert answer.closes
            assert await client.is_closed()

    run(main)


def test_a_body_that_drips_is_408_in_the_end(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(body_timeout_s=0.3)) as site, site.client() as client:
            dripping = asyncio.create_task(drip(client, post(b"a" * 10_000)))
            check_error(await client.answer(), 408)
            dripping.cancel()

    run(main)


def test_a_refused_body_that_stops_is_cut_off(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(body_idle_timeout_s=SOON)) as site, site.client() as client:
            answer = await client.ask(post(b"abc", b"Content-Encoding: gzip")[:-1])
            check_error(answer, 415)
            assert not answer.closes
            assert await client.is_closed()

    run(main)


def test_an_idle_connection_is_closed_without_a_word(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(), timeout_keep_alive=SOON) as site, site.client() as client:
            assert (await client.ask(GET)).status == 200
            assert await client.is_closed()

    run(main)


def test_empty_lines_do_not_keep_a_connection(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(), timeout_keep_alive=0.3) as site, site.client() as client:
            assert (await client.ask(GET)).status == 200
            dripping = asyncio.create_task(drip(client, b"\r\n" * 10_000))
            assert await client.is_closed()
            dripping.cancel()

    run(main)


def test_the_application_may_take_its_time(run: Any) -> None:
    async def slow(exchange: Exchange) -> None:
        await exchange.read_body()
        await asyncio.sleep(0.8)  # longer than all deadlines
        exchange.start(200, [])
        exchange.feed(b"a")
        await asyncio.sleep(0.8)
        exchange.finish(b"b")

    async def main() -> None:
        limits = ServerLimits(0.5, 0.5, 0.5, 0.5, sweep_s=0.01)
        async with (
            serving(app_of(slow), limits, timeout_keep_alive=SOON) as site,
            site.client() as client,
        ):
            assert (await client.ask(post(b"abc"))).body == b"ab"

    run(main)


@pytest.mark.pure  # extends HttpProtocol
def test_the_sweep_survives_a_fault(run: Any, logs_errors: None) -> None:
    class Faulty(listeners.HttpProtocol):
        is_first = True

        def expire(self, now: float) -> None:
            if self.is_first:
                self.is_first = False
                raise ValueError("as it should")
            super().expire(now)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(listeners, "HttpProtocol", Faulty)
            async with serving(app_of(echo), lax(header_timeout_s=SOON)) as site, site.client() as client:
                assert await client.is_closed()

    run(main)


def test_the_sweep_rests_while_no_connection_is_open(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax()) as site:
            sweep = site.protocol.shared.sweep
            for _ in range(2):
                async with site.client() as client:
                    await client.ask(GET)
                    assert sweep._is_armed
                await until(lambda: not sweep._is_armed)

    run(main)


def test_what_waits_behind_an_answer_takes_no_time_from_who_reads_that(run: Any) -> None:
    """The client is not read on while it has yet to take the answer before."""
    large, size = bytes(16 * 1024 * 1024), 1024 * 1024

    async def handler(exchange: Exchange) -> None:
        body = await exchange.read_body()
        exchange.start(200, [])
        exchange.feed(large if not body else b"%d" % len(body))
        await exchange.drain()
        exchange.finish()

    async def main() -> None:
        limits = lax(write_timeout_s=30)
        async with serving(app_of(handler), limits) as site, site.client(receive_buffer=4096) as client:
            client.send(GET)
            await until(lambda: any(guest.is_write_paused for guest in site.protocol.shared.open))
            client.send(post(bytes(size)))
            await asyncio.sleep(0.3)  # many sweeps
            status, _ = await client.head()
            assert status == 200
            left = len(large)
            while left:
                left -= int(await client.reader.readuntil(b"\r\n"), 16)
                await client.reader.readexactly(len(large) + 2)
            assert await client.reader.readuntil(b"0\r\n\r\n")
            assert (await client.answer()).body == b"%d" % size

    run(main)
