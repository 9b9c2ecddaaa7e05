"""This measures how long a hostile request holds up the event loop, which reads each body once, in place.

    python -m bench.micro.bad_input [--mebibytes N]

For every kind of bad input, a body of a given size (16 MiB, the default limit, if not told): the time
until it is understood or refused, the best of three. No worker is needed: none of these gets that far.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from bench.shared.command import parser
from orchestrator.api.view import InvalidRequest, view_request

MIB = 1024 * 1024
MODEL = b'"model":"m"'


def _filled(start: bytes, piece: bytes, end: bytes, size: int) -> bytes:
    """Join `start`, as many pieces as fit, and `end`."""
    return start + piece * ((size - len(start) - len(end)) // len(piece)) + end


Make = Callable[[int], bytes]
BODIES: dict[str, Make] = {
    "text, valid": lambda size: _filled(b"{" + MODEL + b',"prompt":"', b"a b c d ", b'"}', size),
    "token ids, valid": lambda size: _filled(b"{" + MODEL + b',"prompt":[1', b",123456", b"]}", size),
    "not JSON at the end": lambda size: _filled(b"{" + MODEL + b',"prompt":"', b"a b c d ", b'"', size),
    "invalid UTF-8 at the end": lambda size: _filled(
        b"{" + MODEL + b',"prompt":"', "é".encode(), b'\xff"}', size
    ),
    "nested arrays": lambda size: b"{" + MODEL + b',"x":' + b"[" * (size - 20),
    "nested objects": lambda size: _filled(b"{" + MODEL + b',"x":', b'{"a":', b"", size),
    "escapes everywhere": lambda size: _filled(b"{" + MODEL + b',"prompt":"', b"\\u0041", b'"}', size),
    "white space": lambda size: _filled(b"{" + MODEL + b',"prompt":"a"', b" \n\t", b"}", size),
    "many small fields": lambda size: _many_fields(size, b'"%x":1,'),
    "many fields, spaced": lambda size: _many_fields(size, b'"%x" : 1 , '),
    "a field ever again": lambda size: _filled(b"{", b'"model":"m",', MODEL + b"}", size),
    "a field ever again, escaped": lambda size: _filled(b"{", b'"\\u006dodel":"m",', MODEL + b"}", size),
    "another field ever again": lambda size: _filled(b"{", b'"x":1,', MODEL + b"}", size),
    "small objects": lambda size: _filled(b"{" + MODEL + b',"messages":[1', b",{}", b"]}", size),
    "brackets in escaped text": lambda size: _filled(b"{" + MODEL + b',"prompt":["', b'\\"[', b'"]}', size),
    "a constant behind text": lambda size: _filled(
        b"{" + MODEL + b',"prompt":"', b"a b c [", b'","x":NaN}', size
    ),
    "names inside a text": lambda size: _filled(b"{" + MODEL + b', "prompt":"', b'\\"model\\":', b'"}', size),
}


def _many_fields(size: int, pattern: bytes) -> bytes:
    fields = bytearray(b"{")
    number = 0
    while len(fields) < size - 64:
        fields += pattern % number
        number += 1
    return bytes(fields) + MODEL + b"}"


def milliseconds(body: bytes) -> tuple[float, str]:
    began = time.perf_counter()
    try:
        view_request(body)
        verdict = "understood"
    except InvalidRequest as error:
        verdict = f"400: {error.message[:50]}"
    return (time.perf_counter() - began) * 1e3, verdict


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--mebibytes", type=float, default=16.0)
    size = int(options.parse_args().mebibytes * MIB)
    for name, make in BODIES.items():
        body = make(size)
        spent, verdict = min(milliseconds(body) for _ in range(3))
        print(f"{name:30}{spent:10.1f} ms   {verdict}")


if __name__ == "__main__":
    main()
