from __future__ import annotations

import asyncio
import re
from random import Random
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from orchestrator.http import backlog, connection
from orchestrator.http.connection import Shared
from orchestrator.http.exchange import Exchange
from orchestrator.http.ids import IdSource
from orchestrator.http.limits import ServerLimits
from orchestrator.http.listeners import Protocols
from tests.orchestrator.raw_http import (
    CHUNKED_HEAD,
    GET,
    LAX,
    SMALL,
    app_of,
    check_error,
    chunked,
    echo,
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
                [(request_id, path)] = site.refused_names
                assert request_id == answer.headers["x-request-id"]
                assert request.split()[1].startswith(path.encode())

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
    protocol_class = Protocols(Shared(limits, IdSource(Random(1)), handlers=app_of(echo)))
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
    return re.sub(rb"date: [^\r]*\r\n", b"", wire.written), closed


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
