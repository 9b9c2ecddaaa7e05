"""How long does it take from a deletion in Kubernetes until no new leg goes to that pod?

    python -m bench.discovery [--pods 100] [--times 200]

The API server is that of the tests, over sockets, in the same event loop; the pools are real, and the garbage
collector has the policy of a process that serves.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections.abc import Callable
from random import Random
from statistics import quantiles

import uvloop

from orchestrator.config.options import KubernetesConfig, PoolConfig
from orchestrator.discovery.base import PoolKey
from orchestrator.discovery.feed import Feed
from orchestrator.discovery.followed import FollowedPool
from orchestrator.discovery.kubernetes import KubernetesSource
from orchestrator.loop.garbage import tune
from orchestrator.telemetry.events import Events
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import WorkerState
from tests.orchestrator.discovery.fake_kubernetes import FakeKubernetes, Json, endpoint

POOL: PoolKey = ("m", "decode")
PER_SLICE = 100  # endpoints: Kubernetes' default
LIMIT_S = 60.0
POLL_S = 0.002


class Site:
    """An API server, and a registry that follows it."""

    def __init__(self, url: str, server: FakeKubernetes, pods: int) -> None:
        self.server = server
        self.registry = Registry((), ["m"], "json")
        config = KubernetesConfig(service=server.service, namespace=server.namespace, url=url)
        options = PoolConfig.model_validate({"discover": {"kubernetes": {"service": server.service}}})
        pool = FollowedPool(self.registry, POOL, options)
        source = KubernetesSource(config, [POOL], Random(0))  # jitter
        self.feed = Feed("bench", source, {POOL: pool}, (), Events(), Random(0))
        self._changed = asyncio.Event()
        self.registry.news.changed.add(self._changed.set)
        self.pods: dict[str, Json] = {}
        for index in range(pods):
            self.pods[f"u{index}"] = endpoint(f"10.0.{index // 250}.{1 + index % 250}", f"u{index}")
        self.write()

    def write(self) -> None:
        """Write those slices that differ."""
        uids = sorted(self.pods, key=lambda uid: int(uid[1:]))
        for first in range(0, 10_000, PER_SLICE):
            name = f"s-{first}"
            found = [self.pods[uid] for uid in uids if first <= int(uid[1:]) < first + PER_SLICE]
            before = self.server.slices.get(name, {}).get("endpoints")
            if found != (before or []):
                self.server.put(name, *found)

    def takes(self, uid: str) -> bool:
        return any(worker.name.endswith(f"/pod-{uid}") for worker in self.registry.pools["m"].decode)

    async def settled(self, uid: str, *, is_taken: bool) -> None:
        while self.takes(uid) is not is_taken:
            self._changed.clear()
            for worker in self.registry.workers:
                if worker.state is WorkerState.STARTING:
                    self.registry.judge.mark_ready(worker)
            await self._changed.wait()


async def measure(pods: int, times: int) -> None:
    server = FakeKubernetes()
    async with server.listening() as url:
        site = Site(url, server, pods)
        following = asyncio.create_task(site.feed.run())
        await site.settled(f"u{pods - 1}", is_taken=True)
        await until(lambda: bool(server.watches))
        tune()
        told = [await delete(site, f"u{index % pods}", is_cut=False) for index in range(times)]
        cut = [await delete(site, f"u{index % pods}", is_cut=True) for index in range(max(times // 10, 2))]
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    report("told by the watch", told)
    report("while the watch was cut", cut)


async def delete(site: Site, uid: str, *, is_cut: bool) -> float:
    """Delete a pod, and return after how many seconds it was out of the pools; then bring it back."""
    site.server.hold(is_still=is_cut)
    pod = site.pods.pop(uid)
    site.write()
    began = time.perf_counter()
    if is_cut:
        site.server.cut('{"type": "DEL')
    async with asyncio.timeout(LIMIT_S):
        await site.settled(uid, is_taken=False)
        took = time.perf_counter() - began
        site.registry.settle()
        await until(lambda: bool(site.server.watches))
        site.pods[uid] = pod
        site.write()
        await site.settled(uid, is_taken=True)
    return took


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # a server in the same loop
        await asyncio.sleep(POLL_S)


def report(what: str, seconds: list[float]) -> None:
    cuts = quantiles(seconds, n=100)
    print(f"{what:24} p50 {cuts[49] * 1e3:7.1f} ms  p99 {cuts[98] * 1e3:7.1f} ms  n {len(seconds)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=100)
    parser.add_argument("--times", type=int, default=200)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(arguments.pods, arguments.times))


if __name__ == "__main__":
    main()
