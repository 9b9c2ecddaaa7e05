"""This tells whether the digits that orjson writes for a float32 are always read as the same float32.

    .venv/bin/python -m bench.embeddings.float_digits [--every N]     # 1: all of them, some five minutes

It writes the shortest decimal number that rounds to the float32. A client reads that as a double and rounds
it again, and rounding twice is not rounding once. Signs do not matter, so all positive finite numbers are
tried, or every N-th, and all from 2^-14 to 1, where the numbers of unit vectors are. Exit code 1 if any
comes back as another one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy
import orjson

from bench.shared.command import parser

INFINITY = 0x7F800000  # as bits; smaller ones are finite
COMMON = range(0x38800000, 0x3F800001)  # 2^-14 to 1
CHUNK = 1 << 20


def changed(bits: numpy.ndarray) -> int:
    """Count the numbers with these bits that come back as another one."""
    numbers = bits.view(numpy.float32)
    digits = orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)
    read = numpy.array(orjson.loads(digits), numpy.float64).astype(numpy.float32)
    return int(numpy.count_nonzero(read.view(numpy.uint32) != bits))


def chunks(bits: range) -> Iterator[numpy.ndarray]:
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK]
        yield numpy.arange(part.start, part.stop, part.step, numpy.uint32)


def check(name: str, bits: range) -> int:
    wrong = sum(map(changed, chunks(bits)))
    print(f"{name}: {len(bits):,} numbers, {wrong} changed", flush=True)
    return wrong


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--every", type=int, default=16, metavar="N")
    options.add_argument("--common-every", type=int, default=1, metavar="N", help="of those from 2^-14 to 1")
    given = options.parse_args()
    wrong = check("2^-14 to 1", COMMON[:: given.common_every])
    wrong += check(f"every {given.every}. of all", range(0, INFINITY, given.every))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
