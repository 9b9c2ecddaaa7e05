from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from orchestrator.config.options import LimitsConfig, OrchestratorConfig, TlsConfig
from orchestrator.errors import RequestTimeout
from orchestrator.http import backlog, connection, deadlines, listeners
from orchestrator.http.exchange import Exchange
from orchestrator.http.ids import IdSource
from orchestrator.http.limits import ServerLimits
from orchestrator.http.listeners import Protocols, uvicorn_config
from tests.orchestrator.raw_http import (
    CHUNKED_HEAD,
    GET,
    LAX,
    PATIENCE_S,
    SMALL,
    SOON,
    RawClient,
    Site,
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

# --- malformed requests ---------------------------------------------------------------------------


def with_headers(*lines: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join([method + b" / HTTP/1.1", *lines, b"", b""])


# What leaves in doubt where the request ends: 400, and the connection closes.
UNREADABLE = {
    "bare LF behind the request line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "bare LF behind a header": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "bare LF as the empty line": b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    "bare CR in a header": with_headers(b"Host: a\rX: b"),
    "CR CR LF": b"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n",
    "obs-fold": with_headers(b"Host: a", b"X: b", b" c"),
    "obs-fold with a tab": with_headers(b"Host: a", b"X: b", b"\tc"),
    "obs-fold in transfer-encoding": with_headers(b"Host: a", b"Transfer-Encoding:", b" chunked"),
    "space before the first header": with_headers(b" Host: a"),
    "space before the colon": with_headers(b"Host : a"),
    "no colon": with_headers(b"Host a"),
    "no name": with_headers(b"Host: a", b": b"),
    "NUL in a value": with_headers(b"Host: a", b"X: a\0b"),
    "NUL in a name": with_headers(b"Host: a", b"X\0: b"),
    "control character in a value": with_headers(b"Host: a", b"X: a\1b"),
    "NUL in the target": b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    "high byte in the target": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "target without slash": b"GET foo HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\nHost: a\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "method in lower case": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "unknown method": b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": bytes.fromhex("160301020001000001fc0303"),
    "content-length and transfer-encoding": with_headers(
        b"Host: a", b"Content-Length: 5", b"Transfer-Encoding: chunked", method=b"POST"
    ),
    "transfer-encoding and content-length": with_headers(
        b"Host: a", b"Transfer-Encoding: chunked", b"Content-Length: 5", method=b"POST"
    ),
    "two content-lengths": with_headers(b"Host: a", b"Content-Length: 5", b"Content-Length: 6"),
    "the same content-length twice": with_headers(b"Host: a", b"Content-Length: 5", b"Content-Length: 5"),
    "content-length list": with_headers(b"Host: a", b"Content-Length: 5, 5"),
    "negative content-length": with_headers(b"Host: a", b"Content-Length: -1"),
    "content-length with a sign": with_headers(b"Host: a", b"Content-Length: +1"),
    "hexadecimal content-length": with_headers(b"Host: a", b"Content-Length: 0x1"),
    "empty content-length": with_headers(b"Host: a", b"Content-Length:"),
    "content-length over 64 bits": with_headers(b"Host: a", b"Content-Length: 99999999999999999999"),
    "transfer-encoding: gzip, chunked": with_headers(b"Host: a", b"Transfer-Encoding: gzip, chunked"),
    "transfer-encoding: chunked, gzip": with_headers(b"Host: a", b"Transfer-Encoding: chunked, gzip"),
    "transfer-encoding: chunked, chunked": with_headers(
        b"Host: a", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"
    ),
    "transfer-encoding: gzip": with_headers(b"Host: a", b"Transfer-Encoding: gzip"),
    "transfer-encoding: identity": with_headers(b"Host: a", b"Transfer-Encoding: identity"),
    "transfer-encoding: xchunked": with_headers(b"Host: a", b"Transfer-Encoding: xchunked"),
    "transfer-encoding: VT chunked": with_headers(b"Host: a", b"Transfer-Encoding: \x0bchunked"),
    "empty transfer-encoding": with_headers(b"Host: a", b"Transfer-Encoding:"),
    "transfer-encoding with HTTP/1.0": CHUNKED_HEAD.replace(b"1.1", b"1.0") + b"0\r\n\r\n",
    "chunk size of no digits": CHUNKED_HEAD + b"zz\r\n\r\n",
    "empty chunk size": CHUNKED_HEAD + b"\r\na\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED_HEAD + b"0x1\r\na\r\n0\r\n\r\n",
    "negative chunk size": CHUNKED_HEAD + b"-1\r\na\r\n0\r\n\r\n",
    "chunk size with a space": CHUNKED_HEAD + b"1 \r\na\r\n0\r\n\r\n",
    "chunk size over 64 bits": CHUNKED_HEAD + b"10000000000000000\r\na\r\n0\r\n\r\n",
    "chunk size with a bare LF": CHUNKED_HEAD + b"1\na\r\n0\r\n\r\n",
    "chunk with a bare LF": CHUNKED_HEAD + b"1\r\na\n0\r\n\r\n",
    "chunk longer than its size": CHUNKED_HEAD + b"1\r\nab\r\n0\r\n\r\n",
    "bare LF in a chunk extension": CHUNKED_HEAD + b"1;a\nb\r\na\r\n0\r\n\r\n",
    "NUL in a trailer": CHUNKED_HEAD + b"1\r\na\r\n0\r\nX: \0\r\n\r\n",
}

# What is refused although its end is known: the connection stays usable.
REFUSED = {
    "no Host": (400, with_headers(b"X: a")),
    "two Hosts": (400, with_headers(b"Host: a", b"Host: b")),
    "the same Host twice": (400, with_headers(b"Host: a", b"Host: a")),
    "empty Host": (400, with_headers(b"Host:")),
    "Host with a slash": (400, with_headers(b"Host: a/b")),
    "Host with a user": (400, with_headers(b"Host: b@a")),
    "Host list": (400, with_headers(b"Host: a b")),
    "Host with a bad port": (400, with_headers(b"Host: a:b")),
    "Host with a bad escape": (400, with_headers(b"Host: %zz")),
    "Host with an open bracket": (400, with_headers(b"Host: [::1")),
    "no Host, with a body": (400, b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"),
    "star for GET": (400, b"GET * HTTP/1.1\r\nHost: a\r\n\r\n"),
    "long request line": (414, b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 20_000)),
    "longer request line": (414, b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 100_000)),
    "large header": (431, with_headers(b"Host: a", b"X: " + b"a" * 40_000)),
    "larger header": (431, with_headers(b"Host: a", b"X: " + b"a" * 100_000)),
    "many fields": (431, with_headers(b"Host: a", *[b"X: a"] * 100)),
    "large headers together": (431, with_headers(b"Host: a", *[b"X: " + b"a" * 900] * 40)),
    "gzip": (415, post(b"abc", b"Content-Encoding: gzip")),
    "gzip among others": (415, post(b"abc", b"Content-Encoding: identity, gzip")),
    "gzip in the first of two": (415, post(b"a", b"Content-Encoding: gzip", b"Content-Encoding: identity")),
    "gzip, chunked": (415, chunked(b"abc").replace(b"Host", b"Content-Encoding: gzip\r\nHost")),
    "too large, but not much": (413, post(b"a" * 2000)),
    "chunked, too large, but not much": (413, chunked(*[b"a" * 500] * 4)),
}

# What is refused and has no end that is worth waiting for.
ENDLESS = {
    "2 MB header": (431, with_headers(b"Host: a", b"X: " + b"a" * 2_000_000)),
    "10,000 fields": (431, with_headers(b"Host: a", *[b"X-Field: 0123456789"] * 10_000)),
    "1 MB request line": (414, b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 1_000_000)),
    "far too large": (413, post(b"a" * 20_000)),
    "chunked, far too large": (413, chunked(*[b"a" * 500] * 40)),
    "CONNECT": (405, b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\nrest"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_requests_are_refused_and_the_connection_closed(name: str, run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            answer = await client.ask(UNREADABLE[name])
            check_error(answer, 400)
            assert answer.closes
            assert await client.is_closed()

    run(main)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_requests_leave_the_connection_usable(name: str, run: Any) -> None:
    status, request = REFUSED[name]

    async def main() -> None:
        async with serving(app_of(echo), SMALL) as site, site.client() as client:
            answer = await client.ask(request)
            check_error(answer, status)
            assert not answer.closes
            assert (await client.ask(GET)).status == 200
            if "chunked, too" not in name:  # that one was answered by the application
                assert [error.status for error in site.refused] == [status]

    run(main)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_client_that_sends_on_regardless_still_gets_the_answer(name: str, run: Any) -> None:
    status, request = ENDLESS[name]

    async def main() -> None:
        async with serving(app_of(echo), SMALL) as site, site.client() as client:
            await client.send_all(request)
            answer = await client.answer()
            check_error(answer, status)
            assert await client.is_closed()

    run(main)


def test_a_large_upload_gets_its_413_and_not_a_reset(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            await client.send_all(post(b"a" * 20 * 2**20))
            answer = await client.answer()
            check_error(answer, 413)
            assert answer.closes
            assert await client.is_closed()

    run(main)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(b"abc-1.2:3_", True), (b"a" * 128, True), (b"a" * 129, False), (b"a b", False), (b"\xe9", False)],
)
def test_errors_repeat_a_valid_request_id(given: bytes, kept: bool, run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site:
            # The parser tells of a header when it has seen the name of the next one.
            for line in (b"X: a", b"X: a\r\nbroken"):
                answer = await site.ask(with_headers(b"X-Request-Id: " + given, line))
                assert answer.status == 400
                assert (answer.headers["x-request-id"] == given.decode("latin-1")) is kept

    run(main)


# --- requests that are fine -----------------------------------------------------------------------

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
FINE = {
    "GET": (GET, "GET", "/echo", ""),
    "query and fragment": (GET.replace(b"/echo", b"/echo?a=b#c"), "GET", "/echo", ""),
    "escapes": (GET.replace(b"/echo", b"/%65cho%20%C3%A9"), "GET", "/echo é", ""),
    "absolute form": (GET.replace(b"/echo", b"http://b:1/echo?x"), "GET", "/echo", ""),
    "absolute form without path": (GET.replace(b"/echo", b"http://b"), "GET", "/", ""),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS", "*", ""),
    "body": (post(b"abc"), "POST", "/echo", "abc"),
    "empty body": (post(b""), "POST", "/echo", ""),
    "chunked": (chunked(b"abc", b"de"), "POST", "/echo", "abcde"),
    "chunked in capitals": (chunked(b"abc").replace(b"chunked", b"Chunked "), "POST", "/echo", "abc"),
    "chunk extension": (CHUNKED_HEAD + b'3;a="b"\r\nabc\r\n0\r\n\r\n', "POST", "/", "abc"),
    "trailers": (CHUNKED_HEAD + b"3\r\nabc\r\n0\r\nHost: b\r\nAuthorization: c\r\n\r\n", "POST", "/", "abc"),
    "GET with a body": (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", "GET", "/", "abc"),
    "empty lines before": (b"\r\n\r\n" + GET, "GET", "/echo", ""),
    "empty header": (GET.replace(b"Host", b"X-Empty:\r\nHost"), "GET", "/echo", ""),
    "Host with a port": (GET.replace(b": a", b": a.b-c_d:8000"), "GET", "/echo", ""),
    "Host of IPv6": (GET.replace(b": a", b": [::1]:8000"), "GET", "/echo", ""),
    "Host with spaces behind": (GET.replace(b": a", b":  a \t"), "GET", "/echo", ""),
    "identity": (post(b"abc", b"Content-Encoding: identity"), "POST", "/echo", "abc"),
    "encoding without a body": (GET.replace(b"Host", b"Content-Encoding: gzip\r\nHost"), "GET", "/echo", ""),
    "as many fields as may be": (GET.replace(b"Host", b"X: a\r\n" * 99 + b"Host"), "GET", "/echo", ""),
    "headers as large as may be": (
        GET.replace(b"Host", b"X: " + b"a" * 32_700 + b"\r\nHost"),
        "GET",
        "/echo",
        "",
    ),
    "h2c offered": (GET.replace(b"Host", H2C + b"Host"), "GET", "/echo", ""),
    "h2c offered, with a body": (post(b"abc").replace(b"Host", H2C + b"Host"), "POST", "/echo", "abc"),
    "h2c offered, chunked": (chunked(b"abc", b"d").replace(b"Host", H2C + b"Host"), "POST", "/echo", "abcd"),
    "websocket offered": (
        GET.replace(b"Host", b"Connection: Upgrade\r\nUpgrade: websocket\r\nHost"),
        "GET",
        "/echo",
        "",
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_requests_that_are_fine_are_served_and_the_connection_is_kept(name: str, run: Any) -> None:
    request, method, path, body = FINE[name]

    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            answer = await client.ask(request)
            assert answer.status == 200, answer
            assert answer.json() == {"method": method, "path": path, "body": body}
            assert not answer.closes
            assert (await client.ask(GET)).json()["path"] == "/echo"

    run(main)


def test_trailers_do_not_become_headers(run: Any) -> None:
    seen: list[Any] = []

    async def look(exchange: Exchange) -> None:
        await exchange.read_body()
        seen.extend(exchange.headers)
        exchange.respond(200, [], b"")

    async def main() -> None:
        async with serving(app_of(look)) as site, site.client() as client:
            client.send(CHUNKED_HEAD + b"3\r\nabc\r\n")
            client.send(b"0\r\nAuthorization: b\r\n\r\n")
            await client.answer()
        assert seen == [(b"host", b"a"), (b"transfer-encoding", b"chunked")]

    run(main)


def test_head_is_answered_without_a_body(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            answer = await client.ask(GET.replace(b"GET", b"HEAD"), is_head=True)
            assert int(answer.headers["content-length"]) > 0
            assert (await client.ask(GET)).status == 200

    run(main)


@pytest.mark.parametrize("host", [b"Host: a\r\n", b""])
def test_http_1_0_is_served_and_closed(host: bytes, run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            answer = await client.ask(b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n%b\r\n" % host)
            assert answer.status == 200
            assert answer.closes
            assert await client.is_closed()

    run(main)


def test_connection_close_is_honoured(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            answer = await client.ask(post(b"abc", b"Connection: close") + GET)
            assert answer.json()["body"] == "abc"
            assert answer.closes
            assert await client.is_closed()

    run(main)


# --- expect: 100-continue -------------------------------------------------------------------------

EXPECT = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"


def test_continue_is_sent_when_the_body_is_asked_for(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            assert (await client.ask(EXPECT)).status == 100
            assert (await client.ask(b"abc")).json()["body"] == "abc"
            assert (await client.ask(EXPECT + b"abc")).json()["body"] == "abc"  # did not wait
            assert (await client.ask(GET)).status == 200

    run(main)


def test_an_answer_instead_of_continue_closes(run: Any) -> None:
    async def refuse(exchange: Exchange) -> None:
        exchange.respond(401, [], b"")

    async def main() -> None:
        async with serving(app_of(refuse), SMALL) as site:
            for request in (EXPECT, EXPECT.replace(b"h: 3", b"h: 2000")):
                async with site.client() as client:
                    answer = await client.ask(request)
                    assert answer.status == (401 if request is EXPECT else 413)
                    assert answer.closes
                    assert await client.is_closed()

    run(main)


def test_waiting_for_continue_is_not_the_clients_delay(run: Any) -> None:
    asked = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await asked.wait()
        await echo(exchange)

    async def main() -> None:
        limits = ServerLimits(body_idle_timeout_s=0.1, body_timeout_s=0.2, sweep_s=0.01)
        async with serving(app_of(slow), limits) as site, site.client() as client:
            client.send(EXPECT)
            await until(lambda: bool(site.state.tasks))
            await asyncio.sleep(0.5)  # longer than the deadlines
            asked.set()
            assert (await client.answer()).status == 100
            check_error(await client.answer(), 408)  # now it is
            assert await client.is_closed()

    run(main)


# --- split, closed, pipelined ---------------------------------------------------------------------

SPLIT = {
    "body": post(b"abc"),
    "chunked": chunked(b"abc", b"de"),
    "h2c": chunked(b"abc").replace(b"Host", H2C + b"Host"),
    "two": post(b"abc") + GET,
    "broken second": GET + b"\r\nbroken\r\n\r\n",
    "refused first": post(b"abc", b"Content-Encoding: gzip") + GET,
    "bad chunk": CHUNKED_HEAD + b"3\r\nabc\r\nx\r\n",
}


class Wire(asyncio.Transport):
    """Keeps what the server writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.ended = False
        self.protocol: Any = None

    def write(self, data: Any) -> None:
        assert not self.ended
        self.written += data

    def writelines(self, data: Any) -> None:
        self.write(b"".join(data))

    def close(self) -> None:
        if not self.ended:
            self.ended = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close
    write_eof = close

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.ended

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


async def converse(pieces: list[bytes], limits: ServerLimits = LAX) -> tuple[bytes, bool]:
    """What the server writes when the pieces arrive one by one, and whether it closed."""
    protocol_class = Protocols(limits, IdSource(Random(1)), handlers=app_of(echo))
    config = uvicorn.Config(
        app_of(echo),
        http=protocol_class,
        ws="none",
        log_config=None,
        interface="asgi3",
        timeout_keep_alive=3600,
    )
    state = ServerState()
    wire = Wire()
    wire.protocol = protocol = protocol_class(config, state, {})
    protocol.connection_made(wire)
    for piece in pieces:
        if not wire.ended:
            protocol.data_received(piece)
        await asyncio.sleep(0)
    await until(lambda: is_waiting_for_more(protocol))
    closed = wire.ended
    wire.close()
    await until(lambda: not state.connections and not state.tasks)
    return wire.written, closed


def is_waiting_for_more(protocol: Any) -> bool:
    """Nothing further happens unless the client does something."""
    if protocol._is_lost:
        return True
    active = protocol.active
    is_busy = active is not None and (active.body.is_received or active.body.failure is not None)
    return not (is_busy or protocol._is_next_due)


@pytest.mark.parametrize("name", SPLIT)
def test_where_a_request_is_split_makes_no_difference(name: str, run: Any) -> None:
    request = SPLIT[name]

    async def main() -> None:
        whole = await converse([request])
        assert whole[0]
        assert await converse([request[i : i + 1] for i in range(len(request))]) == whole
        for i in range(1, len(request)):
            assert await converse([request[:i], request[i:]]) == whole, request[:i]

    run(main)


def test_one_byte_at_a_time_over_a_socket(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            for byte in chunked(b"abc", b"de") + GET:
                await client.send_all(bytes([byte]))
                await asyncio.sleep(0)
            assert (await client.answer()).json()["body"] == "abcde"
            assert (await client.answer()).status == 200

    run(main)


@pytest.mark.parametrize("end", ["close", "half_close", "reset"])
def test_closed_at_every_byte(end: str, run: Any) -> None:
    request = chunked(b"abc", b"de")

    async def main() -> None:
        async with serving(app_of(echo)) as site:
            for i in range(len(request) + 1):
                async with site.client() as client:
                    await client.send_all(request[:i])
                    if end == "half_close":
                        client.half_close()
                        await client.rest()
                    elif end == "reset":
                        client.reset()

    run(main)


REQUESTS = [GET, post(b"abc"), chunked(b"ab", b"c"), post(b"x", b"Content-Encoding: gzip"), SPLIT["h2c"]]


@given(
    st.lists(st.sampled_from(REQUESTS), max_size=6),
    st.data(),
    st.sampled_from([3, 50, backlog.MAX_STEP]),
)
@settings(max_examples=80)
def test_any_split_of_any_sequence(requests: list[bytes], data: st.DataObject, step: int) -> None:
    """Whatever a read holds, and however little of it is parsed in one turn of the loop."""
    stream = b"".join(requests)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    async def main() -> None:
        whole = await converse([stream])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backlog, "MAX_STEP", step)
            assert await converse(pieces) == whole

    asyncio.run(main())


@pytest.mark.parametrize(
    "flood",
    [
        CHUNKED_HEAD + b"1\r\na\r\n" * 40_000,
        GET[:-2] + b"a:b\r\n" * 40_000,
        CHUNKED_HEAD + b"0\r\n" + b"a:b\r\n" * 40_000,
        GET * 2_000,
    ],
    ids=["chunks", "fields", "trailers", "requests"],
)
@pytest.mark.pure  # extends Reader
def test_a_read_full_of_tiny_things_is_parsed_over_several_turns(flood: bytes, run: Any) -> None:
    fed: list[int] = []

    class Watched(connection.Reader):
        def feed(self, data: bytes | memoryview) -> None:
            fed.append(len(data))
            super().feed(data)

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(connection, "Reader", Watched)
            turning = asyncio.create_task(note_turns(fed))
            await converse([flood])
            turning.cancel()
        steps = [sum(sizes) for sizes in split_at(fed, TURN)]
        assert max(steps) <= backlog.MAX_STEP

    run(main)


TURN = -1


async def note_turns(fed: list[int]) -> None:
    while True:
        fed.append(TURN)
        await asyncio.sleep(0)


def split_at(values: list[int], mark: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for value in values:
        if value == mark:
            groups.append([])
        else:
            groups[-1].append(value)
    return groups


def test_a_body_in_tiny_pieces_is_whole(run: Any) -> None:
    body = bytes(range(97, 123)) * 400

    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            for size in (1, 7):
                pieces = [body[i : i + size] for i in range(0, len(body), size)]
                answer = await client.ask(chunked(*pieces))
                assert answer.json()["body"] == body.decode()

    run(main)


@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([*REQUESTS, CHUNKED_HEAD])), max_size=6))
@settings(max_examples=100)
def test_garbage_is_answered_or_waited_for(pieces: list[bytes]) -> None:
    async def main() -> None:
        written, closed = await converse(pieces, SMALL)
        assert written.startswith(b"HTTP/1.1 ") or not written
        assert not closed or written.count(b"connection: close\r\n") == 1

    asyncio.run(main())


def test_pipelined_requests_are_answered_in_order(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            client.send(
                post(b"1") + chunked(b"2") + post(b"3", b"Content-Encoding: gzip") + GET + b"GARBAGE\r\n"
            )
            assert (await client.answer()).json()["body"] == "1"
            assert (await client.answer()).json()["body"] == "2"
            check_error(await client.answer(), 415)
            assert (await client.answer()).json()["method"] == "GET"
            check_error(await client.answer(), 400)
            assert await client.is_closed()

    run(main)


def test_what_follows_a_request_in_progress_waits_unparsed(run: Any) -> None:
    gate = asyncio.Event()
    started: list[str] = []

    async def gated(exchange: Exchange) -> None:
        started.append(exchange.path)
        if exchange.path == "/1":
            await gate.wait()
        await echo(exchange)

    async def main() -> None:
        async with serving(app_of(gated)) as site, site.client() as client:
            client.send(post(b"", path=b"/1"))
            await until(lambda: started == ["/1"])
            large = b"b" * 300_000
            sending = asyncio.create_task(client.send_all(post(large, path=b"/2") + post(b"", path=b"/3")))
            await asyncio.sleep(0.05)
            assert started == ["/1"]
            gate.set()
            answers = [await client.answer() for _ in range(3)]
            await sending
            assert [answer.json()["path"] for answer in answers] == ["/1", "/2", "/3"]
            assert answers[1].json()["body"] == large.decode()

    run(main)


def test_what_drips_in_behind_a_request_in_progress_is_kept_in_order(run: Any) -> None:
    gate = asyncio.Event()

    async def gated(exchange: Exchange) -> None:
        if exchange.path == "/first":
            await gate.wait()
        await echo(exchange)

    async def main() -> None:
        async with serving(app_of(gated)) as site, site.client() as client:
            client.send(post(b"", path=b"/first"))
            await until(lambda: bool(site.state.tasks))
            connection: Any = next(iter(site.state.connections))
            for byte in post(b"abc") + chunked(b"de", b"f"):
                held = connection._reader.backlog.size
                await client.send_all(bytes([byte]))
                await until(lambda held=held: connection._reader.backlog.size > held)  # type: ignore[misc]
            gate.set()
            bodies = [(await client.answer()).json()["body"] for _ in range(3)]
            assert bodies == ["", "abc", "def"]

    run(main)


def test_many_pipelined_requests_are_cut_off_with_notice(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            client.send(GET * 1000)
            answers = [await client.answer()]
            while not answers[-1].closes:
                answers.append(await client.answer())
            assert 64 <= len(answers) < 1000
            assert await client.is_closed()

    run(main)


def test_a_client_that_pipelines_and_leaves_is_noticed(run: Any) -> None:
    left = asyncio.Event()

    async def wait(exchange: Exchange) -> None:
        exchange.on_leave(left.set)
        await left.wait()

    async def main() -> None:
        async with serving(app_of(wait)) as site:
            async with site.client() as client:
                await client.send_all(GET * 3)
                await until(lambda: bool(site.state.tasks))
            await left.wait()

    run(main)


# --- deadlines ------------------------------------------------------------------------------------


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


# --- too many -------------------------------------------------------------------------------------


def test_requests_above_the_limit_are_503_and_idle_connections_do_not_count(run: Any) -> None:
    gate = asyncio.Event()

    async def gated(exchange: Exchange) -> None:
        if exchange.path == "/echo":
            await gate.wait()
        await echo(exchange)

    async def main() -> None:
        limits = lax(limit_concurrency=1)
        async with (
            serving(app_of(gated), limits) as site,
            site.client() as idle,
            site.client() as first,
            site.client() as second,
        ):
            assert (await idle.ask(GET.replace(b"/echo", b"/other"))).status == 200
            first.send(GET)
            await until(lambda: len(site.state.tasks) == 1)
            answer = await second.ask(post(b"abc"))
            check_error(answer, 503)
            assert answer.headers["retry-after"] == "1"
            assert not answer.closes
            assert (await second.ask(GET.replace(b"/echo", b"/health"))).status == 200
            gate.set()
            assert (await first.answer()).status == 200
            assert (await second.ask(GET)).status == 200

    run(main)


# --- under uvicorn --------------------------------------------------------------------------------


@asynccontextmanager
async def under_uvicorn(app: Any, **config: Any) -> AsyncIterator[tuple[uvicorn.Server, Site]]:
    options = OrchestratorConfig(listen="127.0.0.1:0", **config)
    server = uvicorn.Server(uvicorn_config(app, options, random=Random(1)))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield server, Site(port, server.server_state, server.config.http_protocol_class)
    finally:
        server.should_exit = True
        await serving
        assert not server.server_state.connections
        assert not server.server_state.tasks


def test_shutdown_closes_idle_connections_and_lets_busy_ones_finish(run: Any) -> None:
    gate = asyncio.Event()

    async def gated(exchange: Exchange) -> None:
        if exchange.path == "/stream":
            exchange.start(200, [])
            exchange.feed(b"a")
        if exchange.path != "/echo":
            await gate.wait()
        if exchange.path == "/stream":
            exchange.finish(b"b")
        else:
            await echo(exchange)

    async def main() -> None:
        async with (
            under_uvicorn(app_of(gated)) as (server, site),
            site.client() as idle,
            site.client() as busy,
            site.client() as stream,
        ):
            assert (await idle.ask(GET)).status == 200
            busy.send(GET.replace(b"/echo", b"/busy") + GET)
            stream.send(GET.replace(b"/echo", b"/stream"))
            await until(lambda: len(site.state.tasks) == 2)
            server.should_exit = True
            assert await idle.is_closed()
            gate.set()
            answer = await busy.answer()
            assert answer.status == 200
            assert answer.closes
            assert await busy.is_closed()
            assert (await stream.answer()).body == b"ab"
            assert await stream.is_closed()

    run(main)


def test_a_request_that_outlasts_the_shutdown_is_answered_503(run: Any, logs_errors: None) -> None:
    async def wait(exchange: Exchange) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with (
            under_uvicorn(app_of(wait), timeout_graceful_shutdown=0) as (server, site),
            site.client() as client,
        ):
            client.send(GET)
            await until(lambda: bool(site.state.tasks))
            server.should_exit = True
            answer = await client.answer()
            check_error(answer, 503)
            assert answer.closes
            await until(lambda: not site.state.tasks and not site.state.connections)

    run(main)


def test_the_last_requests_before_the_limit_say_close(run: Any) -> None:
    async def main() -> None:
        async with (
            under_uvicorn(app_of(echo), limit_max_requests=3) as (_, site),
            site.client() as client,
        ):
            closes = [(await client.ask(GET)).closes for _ in range(3)]
            assert closes == [False, False, True]
            assert await client.is_closed()

    run(main)


def test_tls(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "LINGER_S", PATIENCE_S)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 "
        f"-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
    )

    async def main() -> None:
        tls = TlsConfig(cert=os.fspath(cert), key=os.fspath(key))
        async with under_uvicorn(app_of(echo), tls=tls) as (_, site):
            context = ssl.create_default_context(cafile=cert)
            url = f"https://localhost:{site.port}/echo"
            async with httpx.AsyncClient(verify=context, timeout=PATIENCE_S) as client:
                assert (await client.post(url, content=b"abc")).json()["body"] == "abc"
                answer = await client.post(url, content=b"a" * 17 * 2**20)
                assert answer.status_code == 413

    run(main)


def test_what_uvicorn_is_told(tmp_path: Path) -> None:
    limits = LimitsConfig(header_timeout_s=1, body_idle_timeout_s=2, body_timeout_s=3, max_body_bytes=4096)
    options = OrchestratorConfig(
        listen="[::1]:8000",
        limits=limits,
        backlog=5,
        limit_concurrency=6,
        limit_max_requests=7,
        limit_max_requests_jitter=8,
        timeout_keep_alive=9,
        timeout_graceful_shutdown=10,
    )
    config = uvicorn_config(app_of(echo), options, random=Random(1), listen="127.0.0.1:1")
    assert (config.host, config.port) == ("127.0.0.1", 1)
    assert 7 <= (config.limit_max_requests or 0) <= 15
    assert config.backlog == 5
    assert config.timeout_keep_alive == 9
    assert config.timeout_graceful_shutdown == 10
    bounds = ServerLimits.of(options)
    assert (bounds.header_timeout_s, bounds.body_idle_timeout_s, bounds.body_timeout_s) == (1, 2, 3)
    assert (bounds.max_body_bytes, bounds.limit_concurrency) == (4096, 6)
