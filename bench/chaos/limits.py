"""The orchestrator is short of what it needs: descriptors, and memory for what clients send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

from bench.chaos.client import Connection, fetch
from bench.chaos.kills import Scale, explain, load_of
from bench.chaos.report import none_failed
from bench.chaos.site import IN_SERVICE, Orchestrator, Pools, orchestrating, wait_for
from bench.shared.processes import Failed, rss_bytes
from bench.shared.verdict import Verdict

DESCRIPTORS = 200  # of the orchestrator's process: 68 of them for clients
SILENT = 400  # connections that say nothing
CROWD = 150  # clients at once, with a request each
TRIES = 3  # as Kubernetes' failureThreshold is by itself
MIB = 1024 * 1024
BOUND_MIB = 64
UPLOADS, UPLOAD = 60, 16 * MIB - 1  # bodies that lack their last byte
# Reading in 256 KiB pieces, joining, and what the allocator keeps cost as much again, and a body more.
MOST_MIB = 2 * BOUND_MIB + 32
UPLOAD_HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
UPLOAD_HEAD += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % (UPLOAD + 1)


async def descriptors(pools: Pools, scale: Scale) -> list[Verdict]:
    """There are few descriptors, and strangers take what they can get; then more clients ask than fit."""
    smaller = replace(scale, requests=max(200, scale.requests // 4))
    async with orchestrating(pools, files=DESCRIPTORS) as orchestrator, watched(orchestrator) as silences:
        async with AsyncExitStack() as stack:
            for _ in range(SILENT):
                stack.callback((await Connection.open(orchestrator.port)).close)
            async with load_of(orchestrator, smaller) as load:
                pass
        explain(load.results)
        beside = none_failed(load.results, f"{DESCRIPTORS} descriptors, {SILENT} silent connections")
        async with load_of(orchestrator, replace(smaller, clients=CROWD)) as crowd:
            pass
        del crowd  # some were turned away, as they should be
        states = (await orchestrator.worker_states()).values()
        out = sum(state not in IN_SERVICE for state in states)
        async with load_of(orchestrator, smaller) as load:
            pass
        explain(load.results)
        return [
            beside,
            Verdict(f"then {CROWD} clients at once: no worker is blamed", f"{out} out of service", not out),
            none_failed(load.results, "after that"),
            _answered_throughout(silences),
        ]


async def memory(pools: Pools, scale: Scale) -> list[Verdict]:
    """Clients send large bodies that do not end."""
    limits = {"max_held_bytes": BOUND_MIB * MIB}
    smaller = replace(scale, requests=max(100, scale.requests // 10))
    async with orchestrating(pools, limits=limits) as orchestrator, watched(orchestrator) as silences:
        before = rss_bytes(orchestrator.pid)
        async with AsyncExitStack() as stack:
            uploads = [asyncio.create_task(_upload(orchestrator.port, stack)) for _ in range(UPLOADS)]
            answered = sum(await asyncio.gather(*uploads))
            grown = (rss_bytes(orchestrator.pid) - before) // MIB
        await wait_for(lambda: _holds_nothing(orchestrator), "the bytes to be given back")
        async with load_of(orchestrator, smaller) as load:
            pass
        explain(load.results)
        goal = f"{UPLOADS} bodies of 16 MiB, max_held_bytes {BOUND_MIB} MiB: at most {MOST_MIB} MiB more"
        return [
            Verdict(goal, f"{grown} MiB, {answered} answered 503", grown <= MOST_MIB and answered > 0),
            none_failed(load.results, "after that"),
            _answered_throughout(silences),
        ]


async def _upload(port: int, stack: AsyncExitStack) -> bool:
    """Send all of a body but its last byte, and keep the connection; return whether that was refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stack.callback(writer.transport.abort)
    writer.write(UPLOAD_HEAD)
    piece = b" " * MIB
    with suppress(ConnectionError):
        for start in range(0, UPLOAD, MIB):
            writer.write(piece[: UPLOAD - start])
            await writer.drain()
    with suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(2.0):  # the others are waited for until they end, in vain
            return (await reader.read(100)).startswith(b"HTTP/1.1 503")
    return False


async def _holds_nothing(orchestrator: Orchestrator) -> bool:
    return not (await orchestrator.metrics())["baton_held_bytes"]


@asynccontextmanager
async def watched(orchestrator: Orchestrator) -> AsyncIterator[list[str]]:
    """Ask for `/health` all the time; yield what went wrong with that, which may still grow."""
    silences: list[str] = []
    asking = asyncio.create_task(_ask_health(orchestrator.port, silences))
    try:
        yield silences
    finally:
        asking.cancel()


async def _ask_health(port: int, silences: list[str]) -> None:
    """Ask as who looks after a server does: it is down if `TRIES` probes in a row come to nothing.

    One alone may: of more who connect in the same moment than fit, the first give way before they could ask.
    """
    unanswered = 0
    while True:
        found = await _health(port)
        unanswered = 0 if found is None else unanswered + 1
        if found is not None and unanswered >= TRIES:
            silences.append(found)
        await asyncio.sleep(0.1)


async def _health(port: int) -> str | None:
    """Return what was wrong with the answer; None if nothing was."""
    try:
        answer = await fetch(port, "/health")
    except Failed as failed:
        return str(failed)
    return None if answer.status in (200, 503) else f"HTTP {answer.status}"


def _answered_throughout(silences: list[str]) -> Verdict:
    shown = "; ".join(sorted(set(silences))[:3])
    found = f"{len(silences)} x {shown}" if silences else "nothing"
    return Verdict(f"/health is never unanswered {TRIES} times in a row", found, not silences)
