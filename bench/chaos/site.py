"""There is this to break: simulated workers, orchestrators and `baton up`, each a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from bench.chaos.client import fetch, fetch_json
from bench.shared.baton import baton, config, metrics, sim_worker, urls
from bench.shared.processes import Failed, free_port

ROLES = ("prefill", "decode")
IN_SERVICE = {"ready", "suspect", "probing"}  # probing: it gets requests one at a time, when there are any
EACH = 4  # workers
WAIT_LIMIT_S = 60.0
Change = Callable[[], Awaitable[None]]
LOOK_EVERY_S = 0.01
# A prompt of 80 tokens takes 8 ms, its transfer 4, a token of the answer 5: long enough to be in every phase.
LATENCY = {"prefill_us_per_token": 100.0, "transfer_us_per_token": 50.0, "decode_ms_per_token": 5.0}
LATENCY_OPTIONS = [
    part for key, value in LATENCY.items() for part in (f"--{key.replace('_', '-')}", str(value))
]
MARKER = "BATON_CHAOS"  # in the environment of what must not be left behind
RUNNING = "vllm:num_requests_running"
# Numbers of /metrics that count what requests take and give back.
HELD = ("baton_requests_in_flight", "baton_worker_in_flight", "baton_kv_leases", "baton_kv_leases_leaked")


class Worker:
    """A simulated worker can be started again at the same place."""

    def __init__(self, role: str, port: int, side_channel: int) -> None:
        self.role = role
        self.port = port
        self._side_channel = side_channel
        self._stack = ExitStack()
        self._pid: int | None = None

    async def start(self) -> None:
        """Return when it listens."""
        options = ("--role", self.role, "--side-channel-port", str(self._side_channel), *LATENCY_OPTIONS)
        started = sim_worker(*options, port=self.port)
        self._pid = (await asyncio.to_thread(self._stack.enter_context, started)).pid

    def signal(self, number: signal.Signals) -> None:
        assert self._pid is not None
        os.kill(self._pid, number)

    async def restart(self) -> None:
        """Start it anew, whatever has become of it."""
        await self.stop()
        await self.start()

    async def stop(self) -> None:
        if self._pid is not None:
            self.signal(signal.SIGCONT)
            self._pid = None
            await asyncio.to_thread(self._stack.close)

    async def add_faults(self, *found: Mapping[str, Any]) -> None:
        await fetch(self.port, "/sim/faults", json.dumps(found).encode())

    async def faults(self) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = await fetch_json(self.port, "/sim/faults")
        return shown

    async def clear_faults(self) -> None:
        await fetch(self.port, "/sim/faults", method="DELETE")

    async def running(self) -> int:
        """Count the requests that it serves."""
        page = (await fetch(self.port, "/metrics")).text
        samples = [line for line in page.splitlines() if line.startswith(RUNNING)]
        return int(sum(float(line.rpartition(" ")[2]) for line in samples))

    async def held(self) -> dict[str, int]:
        ledger = await fetch_json(self.port, "/sim/ledger")
        pinned = {block for pin in ledger["pins"] for block in pin["block_ids"]}
        return {
            "running": ledger["in_flight"],
            "pinned": len(ledger["pins"]),
            "other blocks in use": ledger["blocks_used"] - len(pinned),
        }


class Pools:
    """There are workers of both roles."""

    def __init__(self) -> None:
        self.prefill, self.decode = (
            [Worker(role, free_port(), free_port()) for _ in range(EACH)] for role in ROLES
        )

    @property
    def workers(self) -> list[Worker]:
        return [*self.prefill, *self.decode]

    async def __aenter__(self) -> Pools:
        await asyncio.gather(*(worker.start() for worker in self.workers))
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    async def held(self) -> dict[str, int]:
        """Add up what all workers hold."""
        found = await asyncio.gather(*(worker.held() for worker in self.workers))
        return {name: sum(held[name] for held in found) for name in found[0]}

    async def wait_idle(self) -> None:
        """Return once what others left behind has expired."""

        async def is_idle() -> bool:
            return not any((await self.held()).values())

        await wait_for(is_idle, "the workers to be idle")


class Orchestrator:
    """An orchestrator runs; its pages say how it is."""

    def __init__(self, port: int, admin: int, pid: int = 0) -> None:
        self.port = port
        self.pid = pid
        self._admin = admin

    async def wait_ready(self, processes: int, workers: int) -> None:
        """Return once all its processes serve, and so many workers are in service."""

        async def is_ready() -> bool:
            states = [process["state"] for process in await self.processes()]
            in_service = [state for state in (await self.worker_states()).values() if state in IN_SERVICE]
            return states == ["serving"] * processes and len(in_service) == workers

        await wait_for(is_ready, "all processes and workers")

    async def is_ready(self) -> bool:
        return (await fetch(self.port, "/ready")).status == 200

    async def processes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await fetch_json(self._admin, "/admin/processes")
        return found

    async def worker_states(self) -> dict[int, str]:
        """Return the workers' states by port."""
        workers = await fetch_json(self._admin, "/admin/workers")
        return {worker["address"]["port"]: worker["state"] for worker in workers}

    async def metrics_page(self) -> str:
        return (await fetch(self._admin, "/metrics")).text

    async def metrics(self) -> dict[str, float]:
        return metrics(await self.metrics_page())

    async def held(self) -> dict[str, int]:
        found = await self.metrics()
        return {name.removeprefix("baton_").replace("_", " "): int(found[name]) for name in HELD}


@asynccontextmanager
async def orchestrating(
    pools: Pools, processes: int = 1, files: int | None = None, **options: Any
) -> AsyncIterator[Orchestrator]:
    """Run one in front of all the workers, and yield it once it is ready.

    `files` bounds its descriptors, `options` are more of its config.
    """
    port, admin = free_port(), free_port()
    workers = {role: urls(*(worker.port for worker in getattr(pools, role))) for role in ROLES}
    document = config(port, workers, admin=f"127.0.0.1:{admin}", processes=processes, **options)
    with baton("orchestrator", document, port, files=files) as process:
        orchestrator = Orchestrator(port, admin, process.pid)
        await orchestrator.wait_ready(processes, len(pools.workers))
        yield orchestrator


class Launcher:
    """`baton up` has an orchestrator and workers of its own."""

    def __init__(self, pid: int, marker: str, orchestrator: Orchestrator) -> None:
        self.pid = pid
        self._marker = marker
        self.orchestrator = orchestrator

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def wait_gone(self) -> int:
        """Wait for the end of all that it started; return how many are left after the limit."""
        with contextlib.suppress(Failed):
            await wait_for(self._is_gone, "the end of all processes")
        return len(set(marked(self._marker)))

    async def _is_gone(self) -> bool:
        return not any(marked(self._marker))


@asynccontextmanager
async def launched() -> AsyncIterator[Launcher]:
    """Run `baton up`, and yield it once its orchestrator is ready."""
    port, admin = free_port(), free_port()
    document = config(port, {role: _simulated_pool() for role in ROLES}, admin=f"127.0.0.1:{admin}")
    marker = uuid4().hex
    with baton("up", document, port, env={MARKER: marker}) as process:
        orchestrator = Orchestrator(port, admin)
        await orchestrator.wait_ready(1, len(ROLES) * EACH)
        yield Launcher(process.pid, marker, orchestrator)


def _simulated_pool() -> dict[str, Any]:
    workers = [{"port": free_port(), "side_channel_port": free_port()} for _ in range(EACH)]
    return {"engine": "sim", "workers": workers, "sim": LATENCY}


async def wait_for(
    condition: Callable[[], Awaitable[object]], what: str, limit_s: float = WAIT_LIMIT_S
) -> float:
    """Ask until `condition` is true; return how many seconds that took. Raises `Failed` after the limit.

    Who does not answer is asked again: it may be starting, or ending.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        with contextlib.suppress(Failed):
            if await condition():
                return loop.time() - began
        if loop.time() - began > limit_s:
            raise Failed(f"waited {limit_s:.0f} s for {what}")
        await asyncio.sleep(LOOK_EVERY_S)


def marked(marker: str) -> Iterator[int]:
    """Yield the processes that have this in their environment. A zombie has none."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if marker.encode() in path.read_bytes():
                yield int(path.parent.name)
