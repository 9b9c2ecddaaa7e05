"""Pools that follow a source, beside a registry whose workers answer probes as a test says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from random import Random

from orchestrator.config.options import PoolConfig
from orchestrator.discovery.base import PoolKey, Source
from orchestrator.discovery.feed import Feed
from orchestrator.discovery.followed import FollowedPool
from orchestrator.telemetry.events import Events
from orchestrator.wire.member import Member, MemberSet
from orchestrator.workers.registry import Registry
from orchestrator.workers.worker import Worker

MODEL = "m"
DECODE: PoolKey = (MODEL, "decode")
PREFILL: PoolKey = (MODEL, "prefill")


def member(
    name: str, uid: str | None = None, port: int = 1, pool: PoolKey = DECODE, **more: object
) -> Member:
    model, role = pool
    url = f"http://10.0.0.{port}:8000"
    return Member(uid=uid or f"uid-{name}", name=name, model=model, role=role, url=url, **more)  # type: ignore[arg-type]


class Never(Source):
    async def watch(self, take: Callable[[MemberSet], None]) -> None:  # type: ignore[override]
        raise AssertionError("nobody runs the feed")


class Followed:
    """A registry whose pools of `m` follow what `lists` is called with, or `source`."""

    def __init__(
        self,
        source: Source | None = None,
        pools: tuple[PoolKey, ...] = (DECODE,),
        options: PoolConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        others: tuple[PoolKey, ...] = (),
    ) -> None:
        self.registry = Registry((), [MODEL], "json", random=Random(0), time=clock)
        self.events = Events(time=lambda: 0.0)
        discover = options or PoolConfig.model_validate({"discover": {"dns": "h:1"}})
        self.pools: Mapping[PoolKey, FollowedPool] = {
            key: FollowedPool(self.registry, key, discover) for key in pools
        }
        self.feed = Feed("test", source or Never(), self.pools, others, self.events, Random(0), clock)

    def lists(self, *members: Member, **more: object) -> None:
        self.feed.take(MemberSet(members, **more))  # type: ignore[arg-type]

    def worker(self, name: str, pool: PoolKey = DECODE) -> Worker:
        found = self.registry.find("/".join((*pool, name)))
        assert found is not None
        return found

    def answer(self, *names: str) -> None:
        """Have workers answer their probes, all that there are if none is named."""
        for worker in self.registry.workers:
            if not names or worker.address.name.rpartition("/")[2] in names:
                self.registry.judge.mark_ready(worker)

    def names(self) -> list[str]:
        return [worker.name.removeprefix(f"{MODEL}/") for worker in self.registry.workers]

    def serving(self) -> list[str]:
        """Return the names of those that new legs go to."""
        pools = self.registry.pools[MODEL]
        return sorted(worker.name.rpartition("/")[2] for worker in (*pools.prefill, *pools.decode))

    def told(self, kind: str) -> list[str]:
        return [event.message for event in self.events.after() if event.kind == kind]
