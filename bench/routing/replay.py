"""The requests of a trace are sent at their moments, whatever has become of those before, and are timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

import aiohttp

from bench.shared.bodies import MODEL, encoded
from launch.simulate.trace import Arrival, Trace

BYTES_PER_TOKEN: Final = 3  # of the simulated worker's tokenizer
_JSON: Final = {"content-type": "application/json"}
_FIRST: Final = b'"content":"'  # of a token; an event that only names the role has an empty one


@dataclass(frozen=True)
class Planned:
    """A request is to be sent so many seconds after the start."""

    at_s: float
    body: bytes


@dataclass
class Replayed:
    """This became of the requests: TTFTs of those that were answered, and how late they were sent."""

    ttft_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    failed: int = 0


# --- what is sent -------------------------------------------------------------------------------


def planned(trace: Trace, requests: int, speed: float, shorten: int, seed: int) -> list[Planned]:
    """Return the first `requests` of a trace, `speed` times as fast, with answers `shorten` times as short.
    The seed draws moments that the trace does not tell apart.
    """
    first = Trace(trace.arrivals[:requests], trace.block_tokens, trace.resolution_s)
    return [
        Planned(at_s, body_of(arrival, trace.block_tokens, shorten))
        for at_s, arrival in first.moments(speed, Random(seed))
    ]


def body_of(arrival: Arrival, block_tokens: int, shorten: int) -> bytes:
    """Return a chat that has as many tokens, for the simulated worker, and begins alike where blocks do."""
    content = prompt_of(arrival, block_tokens)
    return encoded(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max(1, arrival.output_tokens // shorten),
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
    )


def prompt_of(arrival: Arrival, block_tokens: int) -> str:
    """Return a text of which equal blocks are equal, and the rest is the request's own if it has no name."""
    left = arrival.prompt_tokens - len(arrival.blocks) * block_tokens
    tail = f"own {arrival.index}" if arrival.tail is None else f"{arrival.tail:x}"
    blocks = [_filled(f"{block:x}", block_tokens) for block in arrival.blocks]
    return "".join(blocks) + _filled(tail, left)


def _filled(name: str, tokens: int) -> str:
    length = tokens * BYTES_PER_TOKEN
    return (f"{name}." * (length // (len(name) + 1) + 1))[:length]


# --- sending ------------------------------------------------------------------------------------


def replay(url: str, requests: Sequence[Planned]) -> Replayed:
    """Send them all to a router, and return when each has been answered."""
    return asyncio.run(_replay(f"{url}/v1/chat/completions", requests))


async def _replay(url: str, requests: Sequence[Planned]) -> Replayed:
    found = Replayed()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start = time.perf_counter()
        await asyncio.gather(*(_send(session, url, request, start, found) for request in requests))
    return found


async def _send(
    session: aiohttp.ClientSession, url: str, request: Planned, start: float, found: Replayed
) -> None:
    due = start + request.at_s
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    found.late_s.append(time.perf_counter() - due)
    try:
        ttft_s = await _ttft_s(session, url, request.body, due)
    except (aiohttp.ClientError, OSError):
        ttft_s = None
    if ttft_s is None:
        found.failed += 1
    else:
        found.ttft_s.append(ttft_s)


async def _ttft_s(session: aiohttp.ClientSession, url: str, body: bytes, due: float) -> float | None:
    """Return when the first token was there, once all are; None if there was none, or the end is missing."""
    first_s = None
    is_whole = False
    async with session.post(url, data=body, headers=_JSON) as answer:
        async for line in answer.content:
            if first_s is None and answer.ok and is_token(line):
                first_s = time.perf_counter() - due
            is_whole = is_whole or line.startswith(b"data: [DONE]")
    return first_s if is_whole else None


def is_token(line: bytes) -> bool:
    """Tell whether a line of a stream brings text; others name the role, or are empty."""
    place = line.find(_FIRST)
    return place >= 0 and line[place + len(_FIRST) : place + len(_FIRST) + 1] != b'"'
