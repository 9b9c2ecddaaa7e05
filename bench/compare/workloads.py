"""A comparison has these workloads."""

from __future__ import annotations

from dataclasses import dataclass

from bench.compare.measures import ClosedLoop, HeldStreams, Measure, OpenLoop
from bench.shared.bodies import agentic_chat, long_chat, small_chat, token_ids

SMALL = small_chat()
STREAM = small_chat(stream=True)


@dataclass(frozen=True)
class Workload:
    """`worker` are options of the decode worker. Every sample gets a newly started router if it `is_fresh`.

    If it `is_wide`, routers may use the core of the load too. Two processes on a single one displace each
    other at every wake-up, which is not how anybody runs them.
    """

    name: str
    title: str
    measure: Measure
    worker: tuple[str, ...] = ()
    is_fresh: bool = False
    is_wide: bool = False


WORKLOADS = [
    Workload("small", f"small chat, {len(SMALL)} bytes, 32 connections", ClosedLoop(SMALL)),
    Workload("chat", "chat of 100 messages, 233 KB, 32 connections", ClosedLoop(long_chat())),
    Workload(
        "agentic",
        "agentic chat with tools, 1 MB, 8 connections",
        ClosedLoop(agentic_chat(), connections=8),
    ),
    Workload(
        "ids",
        "completion of 40,000 token ids, 245 KB, 32 connections",
        ClosedLoop(token_ids(), path="/v1/completions"),
    ),
    Workload(
        "sse",
        "128 SSE streams of 64 events, in steps of 5 ms; latencies are those of whole streams",
        ClosedLoop(STREAM, connections=128, unit="event"),
        worker=("--events", "64", "--gap-ms", "5"),
    ),
    Workload(
        "held",
        "2,000 open streams, silent after their first event",
        HeldStreams(STREAM),
        worker=("--events", "2", "--gap-ms", "3600000"),
        is_fresh=True,
    ),
    Workload(
        "fresh",
        f"small chat, {len(SMALL)} bytes, every request on a fresh connection, 32 at a time",
        ClosedLoop(SMALL, keep_alive=False),
    ),
    Workload("scale", "small chat, 32 connections, routers on all cores", ClosedLoop(SMALL), is_wide=True),
    Workload(
        "latency",
        f"open loop: {OpenLoop.rate} streamed chats per second on a seeded schedule, 8 events at once",
        OpenLoop(),
        worker=("--events", "8"),
    ),
]
