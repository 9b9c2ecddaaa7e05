"""Raw bytes, and what must become of them: the status, and whether the connection can be used on.

Each case runs on a protocol in memory, and over a socket. Behind each goes a canary: a request that must be
answered if and only if the connection stays usable, and whose bytes must never be taken for a part of the
case, nor the case's for it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import pytest
import uvicorn
from uvicorn.server import ServerState

from orchestrator.http.connection import Shared
from orchestrator.http.ids import IdSource
from orchestrator.http.listeners import Protocols
from tests.orchestrator.http.test_reader import Wire, is_waiting_for_more
from tests.orchestrator.raw_http import (
    CHUNKED_HEAD,
    SMALL,
    app_of,
    echo,
    logs_errors,
    no_errors_logged,
    run,
    serving,
    until,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures

CANARY = b"GET /canary HTTP/1.1\r\nHost: canary\r\n\r\n"
KEEPS, CLOSES = True, False


class Case(NamedTuple):
    data: bytes
    statuses: tuple[int, ...]  # in their order
    keeps: bool  # the connection, so that the canary is answered


def one(data: bytes, status: int, keeps: bool) -> Case:
    return Case(data, (status,), keeps)


def head(*fields: bytes, line: bytes = b"POST /echo HTTP/1.1", host: bytes = b"Host: a") -> bytes:
    return b"\r\n".join([line, *([host] if host else []), *fields, b"", b""])


def with_body(*fields: bytes, body: bytes = b"abc") -> bytes:
    return head(b"Content-Length: %d" % len(body), *fields) + body


TE = b"Transfer-Encoding: "
LAST = b"3\r\nabc\r\n0\r\n\r\n"


def framing() -> Iterator[tuple[str, Case]]:
    yield "chunked", one(head(TE + b"chunked") + LAST, 200, KEEPS)
    yield "Chunked", one(head(TE + b"Chunked") + LAST, 200, KEEPS)
    yield "blanks around chunked", one(head(TE + b" chunked \t") + LAST, 400, CLOSES)
    others = [
        b"gzip",
        b"identity",
        b"xchunked",
        b"chunked",
        b"",
        b"deflate",
        b"compress",
        b"trailers",
        b'"chunked"',
    ]
    for name in others:
        yield f"{name!r} then chunked", one(head(TE + name, TE + b"chunked") + LAST, 400, CLOSES)
        yield f"chunked then {name!r}", one(head(TE + b"chunked", TE + name) + LAST, 400, CLOSES)
        yield f"{name!r}, chunked", one(head(TE + name + b", chunked") + LAST, 400, CLOSES)
        yield f"chunked, {name!r}", one(head(TE + b"chunked, " + name) + LAST, 400, CLOSES)
        if name != b"chunked":
            yield f"only {name!r}", one(head(TE + name) + LAST, 400, CLOSES)
        yield f"{name!r} twice", one(head(TE + name, TE + name) + LAST, 400, CLOSES)
    for case in (b"transfer-encoding: ", b"TRANSFER-ENCODING:", b"Transfer-encoding:\t"):
        yield f"{case!r} of two", one(head(case + b"gzip", TE + b"chunked") + LAST, 400, CLOSES)
        yield (
            f"{case!r} with a length",
            one(head(b"Content-Length: 3", case + b"chunked") + LAST, 400, CLOSES),
        )
    for first, second in itertools.product((b"0", b"3", b"11"), repeat=2):
        fields = (b"Content-Length: " + first, b"Content-Length: " + second)
        yield f"lengths {first!r} {second!r}", one(head(*fields) + b"abc", 400, CLOSES)
        joined = b"Content-Length: %b, %b" % (first, second)
        yield f"lengths {first!r}, {second!r} in one", one(head(joined) + b"abc", 400, CLOSES)
    for value in (
        b"-3",
        b"+3",
        b"3 3",
        b"0x3",
        b"3;",
        b"three",
        b"",
        b"3.0",
        b"99999999999999999999",
        b"\xb3",
        b"1_0",
    ):
        yield f"length {value!r}", one(head(b"Content-Length: " + value) + b"abc", 400, CLOSES)
    for value in (b"3", b"003", b" 3", b"3 ", b"\t3"):
        yield f"length {value!r}", one(head(b"Content-Length:" + value) + b"abc", 200, KEEPS)
    yield (
        "a length with HTTP/1.0",
        one(head(b"Content-Length: 3", line=b"POST /echo HTTP/1.0") + b"abc", 200, CLOSES),
    )
    yield "chunked with HTTP/1.0", one(head(TE + b"chunked", line=b"POST /echo HTTP/1.0") + LAST, 400, CLOSES)
    for name in (
        b"Content-Length ",
        b" Content-Length",
        b"Content-Length\t",
        b"Content\x00Length",
        b"Content Length",
    ):
        yield f"a field {name!r}", one(head(name + b": 3") + b"abc", 400, CLOSES)
    yield "a length behind a fold", one(head(b"Content-Length:\r\n 3") + b"abc", 400, CLOSES)
    yield "a coding behind a fold", one(head(TE + b"\r\n chunked") + LAST, 400, CLOSES)
    yield "a field of underscores", one(head(b"Transfer_Encoding: chunked"), 200, KEEPS)


def chunks() -> Iterator[tuple[str, Case]]:
    for size in (b"3", b"03", b"0003", b"3;a", b"3;a=b", b'3;a="b"', b"3;a;b=c"):
        data = CHUNKED_HEAD.replace(b"/ ", b"/echo ") + size + b"\r\nabc\r\n0\r\n\r\n"
        yield f"size {size!r}", one(data, 200, KEEPS)
    bad = [
        b"",
        b"x",
        b"-3",
        b"+3",
        b"0x3",
        b" 3",
        b"3 ",
        b"3\t",
        b"3 ;a",
        b"3\n",
        b"3\r",
        b"3,3",
        b"\x003",
        b"f" * 17,
    ]
    for size in bad:
        yield f"size {size!r}", one(CHUNKED_HEAD + size + b"\r\nabc\r\n0\r\n\r\n", 400, CLOSES)
    ends = [
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nab\r\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"3\r\nabc\r0\r\n\r\n",
    ]
    for end in ends:
        yield f"chunk {end!r}", one(CHUNKED_HEAD + end, 400, CLOSES)
    for extension in (b";a\nb", b";a\rb", b";a\x00b", b';a="b\n"', b";\x7f"):
        yield (
            f"extension {extension!r}",
            one(CHUNKED_HEAD + b"3%b\r\nabc\r\n0\r\n\r\n" % extension, 400, CLOSES),
        )
    whole = CHUNKED_HEAD + b"3\r\nabc\r\n0\r\n"
    for field in (b"X: a", b"Host: b", b"Authorization: c", b"X: a\r\nX: b", b"Cookie: a"):
        yield f"trailer {field!r}", one(whole + field + b"\r\n\r\n", 200, KEEPS)
    bad = [
        b"Connection: close",
        b"connection: Close",
        b"Connection: keep-alive",
        b"Connection: x, close",
        b"Proxy-Connection: close",
        b"proxy-connection: keep-alive",
        b"Upgrade: h2c",
        b"Connection: upgrade\r\nUpgrade: websocket",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: identity",
        b"Content-Length: 3",
        b"X: a\r\nConnection: close",
        b"X: \x00",
        b"X : a",
        b"X: a\r\n b",
        b"X",
        b"X: a\nConnection: close",
    ]
    for field in bad:
        yield f"trailer {field!r}", one(whole + field + b"\r\n\r\n", 400, CLOSES)
    yield (
        "over the limit",
        one(CHUNKED_HEAD + b"1f4\r\n%b\r\n" % (b"a" * 500) * 40 + b"0\r\n\r\n", 413, CLOSES),
    )


def lines() -> Iterator[tuple[str, Case]]:
    for method in (b"GET", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"):
        yield f"method {method!r}", one(head(line=method + b" /echo HTTP/1.1"), 200, KEEPS)
    for method in (
        b"get",
        b"FOO",
        b"G ET",
        b"",
        b"GET\t",
        b"G\x00ET",
        b"PRI",
        b"GETX",
        b"POST\r\n",
        b"\xffGET",
    ):
        yield f"method {method!r}", one(head(line=method + b" /echo HTTP/1.1"), 400, CLOSES)
    yield "CONNECT", one(head(line=b"CONNECT a:1 HTTP/1.1"), 405, CLOSES)
    versions = [
        b"HTTP/1.2",
        b"HTTP/0.9",
        b"HTTP/2.0",
        b"HTTP/9.9",
        b"HTTP/1",
        b"HTTP/1.",
        b"HTTP/1.10",
        b"HTTP/01.1",
    ]
    versions += [
        b"http/1.1",
        b"HTTP 1.1",
        b"HTTP/1.1 ",
        b"HTTP/-1.1",
        b"HTTP/1,1",
        b"XTTP/1.1",
        b"",
        b"HTTP/\xb1.1",
    ]
    for version in versions:
        yield f"version {version!r}", one(head(line=b"GET /echo " + version), 400, CLOSES)
    for protocol, method in itertools.product(
        (b"RTSP/1.0", b"RTSP/1.1"), (b"GET", b"POST", b"OPTIONS", b"DESCRIBE")
    ):
        yield f"{method!r} {protocol!r}", one(head(line=method + b" /echo " + protocol), 400, CLOSES)
        rest = head(line=b"%b  /echo  %b" % (method, protocol))
        yield f"{method!r} blanks {protocol!r}", one(rest, 400, CLOSES)
    yield "ICE", one(head(line=b"SOURCE /echo ICE/1.0"), 400, CLOSES)
    yield "an empty line, then RTSP", one(b"\r\n" + head(line=b"GET /echo RTSP/1.1"), 400, CLOSES)
    two = head(line=b"GET /echo HTTP/1.1") + head(line=b"GET /echo RTSP/1.1")
    yield "RTSP behind HTTP", Case(two, (200, 400), CLOSES)
    long = head(b"X: " + b"a" * 20_000, b"Y: " + b"a" * 12_000, line=b"GET /echo RTSP/1.1")
    yield "RTSP with a long head", one(long, 400, CLOSES)
    yield "RTSP in a body", one(with_body(body=b"POST /echo RTSP/1.1\r\n\r\n"), 200, KEEPS)
    behind = head(line=b"GET /echo HTTP/1.1") + with_body(body=b"\r\nPOST /other RTSP/1.1\r\n\r\n")
    yield "RTSP in the body of the second", Case(behind, (200, 200), KEEPS)
    yield "empty lines first", one(b"\r\n\r\n" + head(line=b"GET /echo HTTP/1.1"), 200, KEEPS)
    for end in (b"\n", b"\r", b"\r\r\n", b"\x00\r\n", b" \n"):
        yield f"line end {end!r}", one(b"GET /echo HTTP/1.1" + end + b"Host: a\r\n\r\n", 400, CLOSES)


def targets() -> Iterator[tuple[str, Case]]:
    for target in (
        b"/",
        b"/echo?x=*",
        b"/a%20b",
        b"//",
        b"/..",
        b"/a;b",
        b"http://a/echo",
        b"http://a:1/",
        b"/%zz",
    ):
        yield f"target {target!r}", one(head(line=b"GET %b HTTP/1.1" % target), 200, KEEPS)
    for target in (b"*", b"foo", b"?x", b"#x", b"http:", b"http://", b"a:1", b"http:///x", b"://a/"):
        case = one(head(line=b"GET %b HTTP/1.1" % target), 400, CLOSES)
        is_target = target in (b"*", b"http://", b"http:///x")  # but there is nothing there
        yield f"target {target!r}", case._replace(keeps=KEEPS) if is_target else case
    for target in (b"/\x00", b"/\xff", b"/a b", b"/\x7f", b"/\t"):
        yield f"target {target!r}", one(head(line=b"GET %b HTTP/1.1" % target), 400, CLOSES)
    star, get = head(line=b"OPTIONS * HTTP/1.1"), head(line=b"GET * HTTP/1.1")
    yield "OPTIONS *", one(star, 200, KEEPS)
    for order in itertools.product((star, get), repeat=3):
        statuses = tuple(200 if data is star else 400 for data in order)
        yield f"stars {statuses}", Case(b"".join(order), statuses, KEEPS)


def fields() -> Iterator[tuple[str, Case]]:
    single = {
        b"Authorization": (b"Bearer a", b"Bearer b"),
        b"Content-Type": (b"application/json", b"text/plain"),
        b"Host": (b"a", b"b"),
        b"Origin": (b"http://a", b"http://b"),
        b"X-Api-Key": (b"a", b"b"),
        b"X-Request-Id": (b"a", b"b"),
        b"X-Request-Timeout": (b"1", b"2"),
        b"Expect": (b"100-continue", b"100-continue"),
    }
    for name, (first, second) in single.items():
        host = b"" if name == b"Host" else b"Host: a"
        for other in (name, name.lower(), name.upper()):
            for value in (first, second):
                data = head(
                    name + b": " + first, other + b": " + value, line=b"GET /echo HTTP/1.1", host=host
                )
                yield f"{name!r} {other!r} {value!r}", one(data, 400, KEEPS)
        data = head(
            name + b": " + first, b"X-Other: a", name + b": " + first, line=b"GET /echo HTTP/1.1", host=host
        )
        yield f"{name!r} apart", one(data, 400, KEEPS)
    for name in (b"Accept", b"X-Forwarded-For", b"Via", b"Cookie", b"Accept-Encoding", b"X-Custom"):
        yield f"{name!r} twice", one(with_body(name + b": a", name + b": b"), 200, KEEPS)
    for host in (b"", b"a/b", b"a@b", b"a b", b"a:b", b"[::1", b"a:123456", b"%zz", b"a,b", b"a\x80"):
        bad = one(head(line=b"GET / HTTP/1.1", host=b"Host: " + host), 400, KEEPS)
        yield f"host {host!r}", bad if host != b"a,b" else one(bad.data, 200, KEEPS)
    yield "no host", one(head(line=b"GET / HTTP/1.1", host=b""), 400, KEEPS)
    yield "no host in HTTP/1.0", one(head(line=b"GET / HTTP/1.0", host=b""), 200, CLOSES)
    for byte in (b"\x00", b"\x01", b"\x08", b"\x0b", b"\x0c", b"\x1f", b"\x7f", b"\r", b"\n"):
        yield f"{byte!r} in a value", one(head(b"X: a" + byte + b"b"), 400, CLOSES)
    for byte in (
        b"\x00",
        b"\x01",
        b"\x1f",
        b"\x7f",
        b"\x80",
        b" ",
        b"(",
        b")",
        b"/",
        b"[",
        b"{",
        b"@",
        b",",
        b";",
        b'"',
    ):
        yield f"{byte!r} in a name", one(head(b"X" + byte + b"Y: a"), 400, CLOSES)
    for value in (b"close", b"Close", b"x, close", b"close, x"):
        yield f"connection {value!r}", one(with_body(b"Connection: " + value), 200, CLOSES)
    for value in (b"keep-alive", b"x", b"", b"te", b"closed"):
        yield f"connection {value!r}", one(with_body(b"Connection: " + value), 200, KEEPS)
    upgrade = (b"Connection: Upgrade", b"Upgrade: h2c")
    yield "an upgrade", one(with_body(*upgrade), 200, KEEPS)
    yield "an upgrade, chunked", one(head(TE + b"chunked", *upgrade) + LAST, 200, KEEPS)
    yield "an upgrade of two codings", one(head(TE + b"gzip", TE + b"chunked", *upgrade) + LAST, 400, CLOSES)
    for coding in (b"gzip", b"br", b"identity, gzip", b"x"):
        yield f"content-encoding {coding!r}", one(with_body(b"Content-Encoding: " + coding), 415, KEEPS)
    yield "too many", one(head(*[b"X: a"] * 101), 431, KEEPS)
    yield "too large", one(head(b"X: " + b"a" * 33_000), 431, KEEPS)


CASES: dict[str, Case] = {}
for make in (framing, chunks, lines, targets, fields):
    for name, case in make():
        CASES.setdefault(f"{make.__name__}: {name}", case)


def answers_in(written: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """The answers that a strict client reads; all of the bytes must be answers."""
    found = []
    while written:
        top, _, rest = written.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines)
        assert len(fields) == len(lines), "a field came twice"
        status = int(first.split(" ")[1])
        if status != 100:
            length = int(fields["content-length"])
            assert len(rest) >= length
            found.append((status, fields, rest[:length]))
            rest = rest[length:]
        written = rest
    return found


def check(case: Case, written: bytes) -> None:
    """What was answered to the case and the canary behind it."""
    answers = answers_in(written)
    statuses = [status for status, _, _ in answers]
    assert statuses == [*case.statuses, *([200] if case.keeps else [])]
    for _, fields, _ in answers:
        assert fields["date"].endswith(" GMT")
        assert fields["x-request-id"]
    closes = [fields.get("connection") == "close" for _, fields, _ in answers]
    assert closes == [False] * (len(answers) - 1) + [not case.keeps]
    paths = [json.loads(body)["path"] for status, _, body in answers if status == 200]
    assert ("/canary" in paths) is case.keeps


class Line(Wire):
    """As if over a socket, of which the kernel tells nothing."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else default

    def fileno(self) -> int:
        return 2**20


async def converse(pieces: list[bytes]) -> bytes:
    protocol_class = Protocols(Shared(SMALL, IdSource(Random(1)), handlers=app_of(echo)))
    config = uvicorn.Config(
        app_of(echo),
        http=protocol_class,
        ws="none",
        log_config=None,
        interface="asgi3",
        timeout_keep_alive=3600,
    )
    state, wire = ServerState(), Line()
    wire.protocol = protocol = protocol_class(config, state, {})
    protocol.connection_made(wire)
    for piece in pieces:
        if not wire.ended:
            protocol.data_received(piece)
            await asyncio.sleep(0)
    await until(lambda: is_waiting_for_more(protocol))
    wire.close()
    await until(lambda: not state.connections and not state.tasks)
    assert protocol_class.shared.held.size == 0
    return wire.written


def split(data: bytes, random: Random) -> list[bytes]:
    """Pieces of the data, of any sizes."""
    places = sorted({random.randrange(len(data)) for _ in range(random.randrange(1, 12))} | {0, len(data)})
    return [data[first:last] for first, last in itertools.pairwise(places)]


def test_there_are_cases_enough() -> None:
    assert len(CASES) > 300


@pytest.mark.parametrize("name", CASES)
def test_in_memory(name: str) -> None:
    case = CASES[name]
    random = Random(name)

    async def main() -> None:
        check(case, await converse([case.data, CANARY]))
        for _ in range(3):
            check(case, await converse(split(case.data + CANARY, random)))

    asyncio.run(main())


def test_over_sockets(run: Any) -> None:
    """All of them on one server, of which nothing is left."""

    async def ask(site: Any, case: Case) -> bytes:
        async with site.client() as client:
            client.send(case.data)
            client.send(CANARY.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            data, _ = await client.rest()
            return bytes(data)

    async def main() -> None:
        async with serving(app_of(echo), SMALL) as site:
            for name, case in CASES.items():
                written = await ask(site, case)
                statuses = [status for status, _, _ in answers_in(written)]
                assert statuses == [*case.statuses, *([200] if case.keeps else [])], name

    run(main)
