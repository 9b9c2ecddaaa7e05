"""What a fuzzed connection sends follows from a `Random` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from bench.shared.bodies import MODEL

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/tokenize",
    "/health",
    "/ready",
    "/nowhere",
    "*",
    "/%2e%2e/",
    "http://a/health",
)
METHODS = ("POST", "POST", "POST", "GET", "OPTIONS", "HEAD", "PUT", "TRACE", "get", "CONNECT", "PRI")
VERSIONS = ("HTTP/1.1",) * 12 + ("HTTP/1.0", "HTTP/2.0", "RTSP/1.1", "HTTP/1.10", "")
FIELDS = (
    b"Connection: close",
    b"Connection: keep-alive, Upgrade",
    b"Upgrade: h2c",
    b"Expect: 100-continue",
    b"Content-Encoding: gzip",
    b"Content-Length: 7",
    b"Content-Length: 07, 7",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip",
    b"Transfer-Encoding : chunked",
    b"Authorization: Bearer a",
    b"X-Request-Timeout: 0.5",
    b"X-Request-Timeout: nan",
    b"X-Request-Id: a b",
    b"Host: b",
    b"X: \x00",
    b"X: " + b"a" * 40_000,
    b" folded",
    b"no colon",
    b"X:\xff\xfe",
    b"traceparent: 00-x",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    2**80,
    "",
    "\ud800",
    [],
    {},
    [[]],
    "a" * 5000,
    [1, 2],
    ["a", "b"],
)
KEYS = (
    "model",
    "prompt",
    "messages",
    "stream",
    "max_tokens",
    "n",
    "stop",
    "stream_options",
    "kv_transfer_params",
    "tools",
    "logprobs",
    "echo",
    "input",
)


def conversation(random: Random) -> Iterator[bytes]:
    """Yield the pieces that are written, of one to four requests."""
    data = b"".join(_request(random) for _ in range(random.choice((1, 1, 1, 2, 4))))
    data = random.choice(_CHANGES)(data, random)
    size = random.choice((1, 7, 100, 4096, 1_000_000))
    if len(data) > 200 * size:
        size = len(data)
    for start in range(0, len(data), size):
        yield data[start : start + size]


def _request(random: Random) -> bytes:
    body = _body(random)
    method, path, version = random.choice(METHODS), random.choice(PATHS), random.choice(VERSIONS)
    fields = [b"Host: localhost", b"Content-Type: application/json"]
    fields += random.sample(FIELDS, random.choice((0, 0, 0, 1, 2)))
    framing, body = _framed(body, random)
    return b"\r\n".join([f"{method} {path} {version}".encode(), *fields, framing, b"", body])


def _framed(body: bytes, random: Random) -> tuple[bytes, bytes]:
    """Return the field that says where a body ends, which may be wrong, and the body as it is sent then."""
    if random.random() < 0.3:
        return b"Transfer-Encoding: chunked", _chunked(body, random)
    return b"Content-Length: %d" % (len(body) + random.choice((0, 0, 0, 0, 1, -1))), body


def _body(random: Random) -> bytes:
    document: dict[str, Any] = {
        "model": MODEL,
        "prompt": "Say it",
        "messages": [{"role": "user", "content": "Say it"}],
        "max_tokens": random.choice((1, 5, 50)),
        "stream": random.random() < 0.5,
    }
    for _ in range(random.choice((0, 0, 1, 2))):
        document[random.choice(KEYS)] = random.choice(VALUES)
    body = json.dumps(document).encode()
    if random.random() < 0.1:
        depth = random.choice((10, 900, 990, 5000))
        body = body[:-1] + b',"stop":' + b"[" * depth + b"]" * depth + b"}"
    return body


def _chunked(body: bytes, random: Random) -> bytes:
    step = random.choice((1, 10, 1000)) if len(body) < 2000 else 1000
    pieces = [body[start : start + step] for start in range(0, len(body), step)]
    framed = b"".join(
        b"%x%b\r\n%b\r\n" % (len(piece), random.choice((b"", b"", b";a=b")), piece) for piece in pieces
    )
    return framed + b"0\r\n" + random.choice((b"", b"", b"X: a\r\n", b"Connection: close\r\n")) + b"\r\n"


# --- changes of the bytes -----------------------------------------------------------------------


def _as_it_is(data: bytes, random: Random) -> bytes:
    return data


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def _flipped(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def _without(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data))
    return data[:start] + data[start + random.randrange(1, 20) :]


def _repeated(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data))
    return data[:start] + data[start : start + 30] * random.randrange(2, 50) + data[start:]


def _bare(data: bytes, random: Random) -> bytes:
    return data.replace(b"\r\n", b"\n", random.randrange(1, 5))


_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _as_it_is,
    _as_it_is,
    _as_it_is,
    _cut,
    _flipped,
    _without,
    _repeated,
    _bare,
)
