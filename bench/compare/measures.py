"""A measure is what is done to a router, and what is read: one class per kind of load."""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import httpx
import uvloop

from bench.compare import wrk
from bench.compare.cluster import JSON, Target
from bench.compare.held_streams import held_streams
from bench.shared.bodies import MODEL, small_chat
from bench.shared.figures import Column, Sample
from bench.shared.load import run_load
from bench.shared.processes import (
    Failed,
    cpu_seconds,
    lacks_files,
    last_line,
    peak_rss_bytes,
    python,
    rss_bytes,
    wait_idle,
)


class Measure(Protocol):
    """A kind of load has columns of figures; a table is about the first one."""

    @property
    def columns(self) -> list[Column]: ...

    def lacks(self) -> str | None:
        """Say what is missing on this machine to apply this load, or return None."""

    def prepare(self, target: Target) -> None:
        """Warm the router up. Raises `Failed` if it does not serve these requests."""

    def sample(self, target: Target, seconds: int) -> Sample:
        """Take the figures of one round. Raises `Failed` if a request failed."""


PEAK_RSS = Column("peak_rss_mb", "peak RSS MB", 1, "max")


@dataclass(frozen=True)
class ClosedLoop:
    """wrk holds connections, each with one request at a time. CPU is that of the router's process tree.

    Requests and events are counted by the decode worker, so that what was under way at the end counts too.
    """

    body: bytes
    path: str = "/v1/chat/completions"
    connections: int = 32
    unit: Literal["request", "event"] = "request"
    keep_alive: bool = True

    @property
    def columns(self) -> list[Column]:
        return [
            Column("cpu_us", f"CPU us/{self.unit}", 1),
            Column("per_second", f"{self.unit}s/s", 0),
            Column("p50_ms", "p50 ms", 2),
            Column("p99_ms", "p99 ms", 2),
            PEAK_RSS,
        ]

    def lacks(self) -> str | None:
        return wrk.lacks()

    def prepare(self, target: Target) -> None:
        check_answer(httpx.post(target.url + self.path, content=self.body, headers=JSON, timeout=60))
        self._run(target, 1)
        wait_idle(target.pid)

    def sample(self, target: Target, seconds: int) -> Sample:
        cpu, count = cpu_seconds(target.pid), self._count(target)
        load = self._run(target, seconds)
        cpu, count = cpu_seconds(target.pid) - cpu, self._count(target) - count
        wait_idle(target.pid)  # a router that is still at work would take the next one's core
        if not count:
            raise Failed(f"answered nothing in {seconds} s")
        return {
            "cpu_us": cpu / count * 1e6,
            "per_second": count / load.seconds,
            "p50_ms": load.p50_ms,
            "p99_ms": load.p99_ms,
            "peak_rss_mb": peak_rss_bytes(target.pid) / 1e6,
        }

    def _run(self, target: Target, seconds: int) -> wrk.Load:
        return wrk.run(
            target.url + self.path,
            self.body,
            connections=self.connections,
            seconds=seconds,
            keep_alive=self.keep_alive,
        )

    def _count(self, target: Target) -> int:
        counts = httpx.get(f"http://127.0.0.1:{target.decode}/mock/counts").json()
        return int(counts[f"{self.unit}s"])


def check_answer(answer: httpx.Response) -> None:
    """Raises `Failed` unless it is a whole chat completion, or a whole stream of events."""
    if answer.status_code != httpx.codes.OK:
        raise Failed(f"HTTP {answer.status_code}: {' '.join(answer.text.split())[:160]}")
    is_stream = answer.headers["content-type"].startswith("text/event-stream")
    if not (_is_whole_stream(answer.text) if is_stream else _is_completion(answer.content)):
        raise Failed(f"not an answer: {' '.join(answer.text.split())[:160]}")


def _is_whole_stream(text: str) -> bool:
    return "data: {" in text and text.rstrip().endswith("data: [DONE]")


def _is_completion(content: bytes) -> bool:
    try:
        return bool(json.loads(content).get("choices"))
    except ValueError:
        return False


@dataclass(frozen=True)
class OpenLoop:
    """`baton bench`: chats come by a schedule, the same for all, whether or not the last ones are answered.

    Latencies are counted from when a request was due. A sample is longer than others by `stretch`: the 99th
    percentile of two seconds is that of sixteen requests, and differed by half between rounds.
    """

    rate: int = 800
    stretch: int = 5

    @property
    def columns(self) -> list[Column]:
        return [
            Column("p50_ms", "p50 ms", 3),
            Column("p99_ms", "p99 ms", 3),
            Column("ttft_p50_ms", "first event p50", 3),
            Column("ttft_p99_ms", "p99", 3),
            Column("per_second", "requests/s", 0),
        ]

    def lacks(self) -> str | None:
        return None

    def prepare(self, target: Target) -> None:
        self.sample(target, 1)

    def sample(self, target: Target, seconds: int) -> Sample:
        with tempfile.NamedTemporaryFile() as file:
            options = ["--model", MODEL, "--rate", str(self.rate), "--duration", str(self.stretch * seconds)]
            command = python("-m", "launch.cli", "bench", target.url, *options, "--output", file.name)
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise Failed(last_line(ended.stderr))
            step = json.load(file)["steps"][0]
        return _open_loop_sample(step)


def _open_loop_sample(step: dict[str, Any]) -> Sample:
    """Read a step of a result of `baton bench`. Raises `Failed` if it counts errors."""
    if step["errors"]:
        raise Failed(f"{step['requests'] - step['ok']} of {step['requests']} failed: {step['errors']}")
    end_to_end, first_event = step["times"]["e2e"], step["times"]["ttft"]
    return {
        "p50_ms": end_to_end["p50"],
        "p99_ms": end_to_end["p99"],
        "ttft_p50_ms": first_event["p50"],
        "ttft_p99_ms": first_event["p99"],
        "per_second": step["ok"] / step["seconds"],
    }


@dataclass(frozen=True)
class HeldStreams:
    """Streams are open and silent: this tells what one of them takes of memory.

    A router keeps the memory that it once had: start another one for every sample.
    """

    body: bytes
    streams: int = 2000

    @property
    def columns(self) -> list[Column]:
        return [
            Column("rss_kb_per_stream", "RSS KB/stream", 1),
            Column("idle_rss_mb", "RSS MB before", 1),
            Column("held_rss_mb", f"with {self.streams} streams", 1),
            PEAK_RSS,
        ]

    def lacks(self) -> str | None:
        return lacks_files(2 * self.streams + 200)

    def prepare(self, target: Target) -> None:
        result = uvloop.run(run_load(target.port, small_chat(), requests=300, connections=16))
        if result.failed:
            raise Failed(f"{result.failed} of {result.requests} requests failed")

    def sample(self, target: Target, seconds: int) -> Sample:
        wait_idle(target.pid)
        before = rss_bytes(target.pid)
        held = uvloop.run(self._rss_with_streams(target))
        return {
            "rss_kb_per_stream": (held - before) / self.streams / 1e3,
            "idle_rss_mb": before / 1e6,
            "held_rss_mb": held / 1e6,
            "peak_rss_mb": peak_rss_bytes(target.pid) / 1e6,
        }

    async def _rss_with_streams(self, target: Target) -> int:
        async with held_streams(target.port, self.body, self.streams):
            await asyncio.to_thread(wait_idle, target.pid)
            return rss_bytes(target.pid)
