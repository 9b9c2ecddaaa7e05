from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import BodyTooLarge, ClientError, ClientGone, NotFound, RequestTimeout
from orchestrator.http.exchange import Exchange
from tests.orchestrator.raw_http import (
    CHUNKED_HEAD,
    GET,
    SMALL,
    SOON,
    app_of,
    check_error,
    chunked,
    lax,
    logs_errors,
    no_errors_logged,
    post,
    run,
    serving,
    until,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures

# --- what goes wrong in the application -----------------------------------------------------------


def check_whole_answer_of(handler: Any, run: Any, status: int, *, logs: bool) -> None:
    async def main() -> None:
        async with serving(app_of(handler)) as site, site.client() as client:
            check_error(await client.ask(post(b"abc")), status)
            assert (await client.ask(GET)).status == status

    run(main)


def test_an_exception_is_500_and_logged(run: Any, logs_errors: None, caplog: Any) -> None:
    async def fail(exchange: Exchange) -> None:
        raise ValueError("a secret")

    check_whole_answer_of(fail, run, 500, logs=True)
    assert "a secret" in caplog.text


def test_no_answer_is_500_and_logged(run: Any, logs_errors: None, caplog: Any) -> None:
    async def nothing(exchange: Exchange) -> None:
        pass

    check_whole_answer_of(nothing, run, 500, logs=True)
    assert "without a whole answer" in caplog.text


def test_an_error_of_ours_is_its_own_answer(run: Any) -> None:
    async def fail(exchange: Exchange) -> None:
        raise NotFound("there is no such thing")

    check_whole_answer_of(fail, run, 404, logs=False)


@pytest.mark.parametrize("value", [b"a\r\nX: b", b"a\nb", b"a\rb", b"a\0b", b"a\r\n\r\nbody"])
def test_a_header_cannot_break_the_head(value: bytes, run: Any, logs_errors: None) -> None:
    async def respond(exchange: Exchange) -> None:
        exchange.respond(200, [(b"x-header", value)], b"")

    async def start(exchange: Exchange) -> None:
        exchange.start(200, [(b"x-" + value, b"a")])

    check_whole_answer_of(respond, run, 500, logs=True)
    check_whole_answer_of(start, run, 500, logs=True)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("headers", [[], [(b"content-length", b"100")]])
def test_an_answer_that_breaks_off_does_not_look_whole(
    version: bytes, headers: Any, run: Any, logs_errors: None
) -> None:
    fed = asyncio.Event()

    async def fail(exchange: Exchange) -> None:
        exchange.start(200, headers)
        exchange.feed(b"part")
        await fed.wait()
        raise ValueError

    async def main() -> None:
        async with serving(app_of(fail)) as site, site.client() as client:
            client.send(GET.replace(b"1.1", version))
            await client.head()
            fed.set()
            body, is_whole = await client.rest()
            assert b"part" in body or not is_whole
            assert b"0\r\n\r\n" not in body
            assert headers or version == b"1.1" or not is_whole

    run(main)


@pytest.mark.parametrize(("promised", "given"), [(3, b"abcd"), (3, b"ab")])
def test_the_content_length_is_kept_to(promised: int, given: bytes, run: Any, logs_errors: None) -> None:
    async def lie(exchange: Exchange) -> None:
        exchange.start(200, [(b"content-length", b"%d" % promised)])
        exchange.feed(given)
        exchange.finish()

    async def main() -> None:
        async with serving(app_of(lie)) as site, site.client() as client:
            client.send(GET)
            data, _ = await client.rest()
            assert len(data.partition(b"\r\n\r\n")[2]) < promised

    run(main)


def test_a_cancelled_application_is_503(run: Any) -> None:
    async def wait(exchange: Exchange) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with serving(app_of(wait)) as site, site.client() as client:
            client.send(GET)
            await until(lambda: bool(site.state.tasks))
            for task in site.state.tasks:
                task.cancel()
            check_error(await client.answer(), 503)

    run(main)


# --- clients that leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["close", "half_close", "reset"])
@pytest.mark.parametrize("phase", ["body", "wait", "stream"])
def test_leaving_is_noticed_at_once_in_every_phase(leave: str, phase: str, run: Any) -> None:
    left = asyncio.Event()
    ready = asyncio.Event()
    calls: list[int] = []

    async def watch(exchange: Exchange) -> None:
        exchange.on_leave(lambda: (calls.append(1), left.set()))  # type: ignore[func-returns-value]
        if phase == "body":
            ready.set()
            with pytest.raises(ClientGone):
                await exchange.read_body()
        elif phase == "stream":
            exchange.start(200, [])
            exchange.feed(b"a")
        ready.set()
        await left.wait()
        assert exchange.is_gone
        with pytest.raises(ClientGone):
            await exchange.drain()
        if exchange.is_started:
            assert exchange.feed(b"b") is False
            exchange.finish()
        else:
            exchange.respond(200, [], b"nobody reads this")

    async def main() -> None:
        async with serving(app_of(watch)) as site, site.client() as client:
            request = post(b"abc")
            client.send(request[:-1] if phase == "body" else request)
            await ready.wait()
            if leave == "close":
                await client.close()
            else:
                getattr(client, leave)()
            await left.wait()
        assert calls == [1]

    run(main)


def test_who_asks_late_is_told_at_once(run: Any) -> None:
    calls: list[str] = []

    async def watch(exchange: Exchange) -> None:
        exchange.on_leave(lambda: calls.append("replaced"))
        exchange.on_leave(None)
        await until(lambda: exchange.is_gone)
        exchange.on_leave(lambda: calls.append("late"))
        with pytest.raises(ClientGone):
            await exchange.read_body()

    async def main() -> None:
        async with serving(app_of(watch)) as site, site.client() as client:
            client.send(post(b"abc")[:-1])
            await until(lambda: bool(site.state.tasks))
        assert calls == ["late"]

    run(main)


def test_leaving_after_the_answer_is_nothing(run: Any) -> None:
    calls: list[int] = []

    async def watch(exchange: Exchange) -> None:
        exchange.on_leave(lambda: calls.append(1))
        exchange.respond(200, [], b"")

    async def main() -> None:
        async with serving(app_of(watch)) as site, site.client() as client:
            assert (await client.ask(GET)).status == 200
        assert calls == []

    run(main)


def test_abort_cuts_and_is_not_called_leaving(run: Any) -> None:
    calls: list[int] = []

    async def abort(exchange: Exchange) -> None:
        exchange.on_leave(lambda: calls.append(1))
        exchange.start(200, [])
        exchange.feed(b"part")
        exchange.abort()
        assert exchange.feed(b"more") is False

    async def main() -> None:
        async with serving(app_of(abort)) as site, site.client() as client:
            client.send(GET)
            data, _ = await client.rest()
            assert b"0\r\n\r\n" not in data
        assert calls == []

    run(main)


# --- slow readers ---------------------------------------------------------------------------------

PIECE = b"x" * 10_000
PIECES = 400


async def stream_with_drain(exchange: Exchange) -> None:
    exchange.start(200, [])
    waits = 0
    for _ in range(PIECES):
        if not exchange.feed(PIECE):
            waits += 1
            await exchange.drain()
    exchange.finish()
    assert waits > 0


async def stream_with_callback(exchange: Exchange) -> None:
    """As a relay does it, which is pushed its chunks and may only say stop and go."""
    done = asyncio.get_running_loop().create_future()
    left = PIECES

    def push() -> None:
        nonlocal left
        while left:
            left -= 1
            if not exchange.feed(PIECE):
                return
        if not done.done():
            done.set_result(None)

    exchange.start(200, [])
    exchange.on_writable(push)
    push()
    await done
    exchange.finish()


@pytest.mark.parametrize("handler", [stream_with_drain, stream_with_callback])
def test_a_slow_reader_slows_the_writer_and_gets_everything(handler: Any, run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(handler)) as site, site.client(receive_buffer=4096) as client:
            client.send(GET)
            await until(lambda: any(c.is_write_paused for c in site.state.connections))  # type: ignore[union-attr]
            answer = await client.answer()
            assert answer.is_whole
            assert answer.body == PIECE * PIECES

    run(main)


def test_leaving_wakes_a_writer_that_waits(run: Any) -> None:
    gone = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        exchange.start(200, [])
        try:
            while True:
                if not exchange.feed(PIECE):
                    await exchange.drain()
        except ClientGone:
            gone.set()

    async def main() -> None:
        async with serving(app_of(stream)) as site:
            async with site.client(receive_buffer=4096) as client:
                client.send(GET)
                await until(lambda: any(c.is_write_paused for c in site.state.connections))  # type: ignore[union-attr]
                client.reset()
            await gone.wait()

    run(main)


@pytest.mark.parametrize("closes", [True, False])
def test_a_reader_that_stops_is_cut_off(closes: bool, run: Any) -> None:
    """Also when the whole answer is written, and when the connection is waiting to close behind it."""

    async def respond(exchange: Exchange) -> None:
        exchange.respond(200, [], PIECE * 1000)

    async def main() -> None:
        async with (
            # Some asyncio do not say that writelines() filled the buffer; then the keep-alive ends the wait.
            serving(app_of(respond), lax(write_timeout_s=SOON), timeout_keep_alive=SOON) as site,
            site.client(receive_buffer=4096) as client,
        ):
            client.send(post(b"", b"Connection: close") if closes else GET)
            await until(lambda: bool(site.state.connections))
            await until(lambda: not site.state.connections)
            client.reset()

    run(main)


def test_a_reader_that_takes_a_byte_now_and_then_is_cut_off(run: Any) -> None:
    async def main() -> None:
        async with (
            serving(app_of(stream_with_drain), lax(write_timeout_s=SOON)) as site,
            site.client(receive_buffer=4096) as client,
        ):
            client.send(GET)
            await client.head()
            while site.state.connections:
                await client.reader.read(1)
                await asyncio.sleep(0.001)
            data, _ = await client.rest()
            assert len(data) < len(PIECE) * PIECES

    run(main)


def test_a_slow_reader_of_the_last_answer_gets_all_of_it(run: Any) -> None:
    async def respond(exchange: Exchange) -> None:
        exchange.respond(200, [], PIECE * 100)

    async def main() -> None:
        limits = lax(write_timeout_s=2.0)
        async with serving(app_of(respond), limits) as site, site.client(receive_buffer=4096) as client:
            client.send(post(b"", b"Connection: close"))
            status, headers = await client.head()
            body = b""
            while len(body) < int(headers["content-length"]):
                piece = await client.reader.read(20_000)
                assert piece
                body += piece
                await asyncio.sleep(0.005)
            assert await client.is_closed()
            assert status == 200

    run(main)


# --- the exchange's rules -------------------------------------------------------------------------


def test_calls_out_of_order_are_errors(run: Any) -> None:
    async def wrong(exchange: Exchange) -> None:
        for call in (exchange.finish, lambda: exchange.feed(b"a")):
            with pytest.raises(RuntimeError):
                call()
        exchange.start(200, [])
        with pytest.raises(RuntimeError):
            exchange.start(200, [])
        with pytest.raises(RuntimeError):
            exchange.respond(200, [], b"")
        assert exchange.is_started
        assert not exchange.is_complete
        exchange.finish(b"fine")
        assert exchange.is_complete
        for call in (exchange.finish, lambda: exchange.feed(b"a")):
            with pytest.raises(RuntimeError):
                call()
        exchange.abort()  # no effect any more

    async def main() -> None:
        async with serving(app_of(wrong)) as site, site.client() as client:
            for _ in range(2):
                assert (await client.ask(GET)).body == b"fine"

    run(main)


def test_a_body_is_read_once(run: Any) -> None:
    async def twice(exchange: Exchange) -> None:
        assert await exchange.read_body() == b"abc"
        with pytest.raises(RuntimeError):
            await exchange.read_body()
        exchange.respond(200, [], b"")

    async def main() -> None:
        async with serving(app_of(twice)) as site:
            assert (await site.ask(post(b"abc"))).status == 200

    run(main)


def test_a_cancelled_read_can_be_given_up(run: Any) -> None:
    async def impatient(exchange: Exchange) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await exchange.read_body()
        exchange.respond(504, [], b"too late")

    async def main() -> None:
        async with serving(app_of(impatient)) as site, site.client() as client:
            assert (await client.ask(post(b"abc")[:-1])).status == 504
            assert (await client.ask(b"c" + post(b"abc")[:-1])).status == 504

    run(main)


def test_the_failure_of_a_body_is_the_readers(run: Any) -> None:
    seen: list[Any] = []

    async def read(exchange: Exchange) -> None:
        try:
            await exchange.read_body()
        except ClientError as error:
            seen.append(type(error))
            exchange.respond(error.status, error.headers(), error.body())

    async def main() -> None:
        limits = replace(SMALL, body_idle_timeout_s=SOON, sweep_s=0.01)
        async with serving(app_of(read), limits) as site:
            check_error(await site.ask(chunked(b"a" * 2000)), 413)
            check_error(await site.ask(post(b"abc")[:-1]), 408)
            check_error(await site.ask(CHUNKED_HEAD + b"z"), 400)
            assert site.refused == []
        assert seen == [BodyTooLarge, RequestTimeout, ClientError]

    run(main)


def test_an_answer_before_the_body_is_read_leaves_the_connection_usable(run: Any) -> None:
    async def refuse(exchange: Exchange) -> None:
        exchange.respond(401, [], b"")

    async def main() -> None:
        async with serving(app_of(refuse)) as site, site.client() as client:
            for request in (post(b"a" * 3_000_000), chunked(*[b"a" * 1000] * 500), GET):
                sending = asyncio.create_task(client.send_all(request))
                answer = await client.answer()
                await sending
                assert answer.status == 401
                assert not answer.closes

    run(main)


def test_a_body_without_end_behind_an_answer_is_cut_off(run: Any) -> None:
    async def refuse(exchange: Exchange) -> None:
        exchange.respond(401, [], b"")

    async def main() -> None:
        async with serving(app_of(refuse), SMALL) as site, site.client() as client:
            client.send(chunked(*[b"a" * 500] * 40))
            assert (await client.answer()).status == 401
            assert await client.is_closed()

    run(main)


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_body(status: int, run: Any) -> None:
    async def respond(exchange: Exchange) -> None:
        if exchange.path == "/echo":
            exchange.respond(status, [], b"none of this")
        else:
            exchange.start(status, [])
            exchange.finish(b"nor this")

    async def main() -> None:
        async with serving(app_of(respond)) as site, site.client() as client:
            for path in (b"/echo", b"/stream"):
                answer = await client.ask(GET.replace(b"/echo", path))
                assert answer.status == status
                assert "content-length" not in answer.headers
                assert "transfer-encoding" not in answer.headers

    run(main)


def test_a_stream_for_http_1_0_ends_with_the_connection(run: Any) -> None:
    async def stream(exchange: Exchange) -> None:
        exchange.start(200, [])
        exchange.feed(b"a")
        await exchange.drain()
        exchange.finish(b"b")

    async def main() -> None:
        async with serving(app_of(stream)) as site:
            answer = await site.ask(GET.replace(b"1.1", b"1.0"))
            assert answer.body == b"ab"
            assert "transfer-encoding" not in answer.headers
            assert answer.closes

    run(main)


def test_a_head_can_be_sent_alone(run: Any) -> None:
    seen = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        exchange.start(200, [(b"x-a", b"b")])
        await exchange.drain()
        await seen.wait()
        exchange.finish()

    async def main() -> None:
        async with serving(app_of(stream)) as site, site.client() as client:
            client.send(GET)
            status, headers = await client.head()
            assert (status, headers["x-a"]) == (200, "b")
            seen.set()
            assert await client.reader.readexactly(5) == b"0\r\n\r\n"

    run(main)
