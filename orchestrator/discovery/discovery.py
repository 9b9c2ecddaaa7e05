"""Discovery keeps the workers of all pools that say `discover` as their sources have them.

It belongs to the process whose registry decides: the only one, or the supervisor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from random import Random
from typing import Final

from orchestrator.config.options import Config, DiscoverConfig, PoolConfig
from orchestrator.discovery import SOURCES
from orchestrator.discovery.base import MakeSource, PoolKey
from orchestrator.discovery.feed import Feed
from orchestrator.discovery.followed import FollowedPool
from orchestrator.telemetry.events import Events
from orchestrator.workers.registry import Registry

LOOK_S: Final = 1.0  # how soon it shows that a worker does not answer that an empty list has kept

Wanted = Mapping[DiscoverConfig, tuple[PoolKey, ...]]


class Discovery:
    """It has a feed for each source, which works from `start` to `aclose`."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        events: Events,
        random: Random,
        sources: Mapping[str, MakeSource] = SOURCES,
    ) -> None:
        """`random` makes the jitter of pauses."""
        self._config = config
        self._registry = registry
        self._events = events
        self._random = random
        self._sources = sources
        self._pools = {key: FollowedPool(registry, key, pool) for key, pool in _discovered(config)}
        self._feeds: dict[tuple[DiscoverConfig, tuple[PoolKey, ...]], tuple[Feed, asyncio.Task[None]]] = {}
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the sources. Call this inside the event loop that changes the registry."""
        self._looking = asyncio.create_task(self._look_forever(), name="look at discovered workers")
        self._follow()

    async def aclose(self) -> None:
        tasks = [task for _, task in self._feeds.values()]
        if self._looking is not None:
            tasks.append(self._looking)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def reconfigure(self, config: Config) -> None:
        """Follow the sources of another config from now on; workers stay until its first sets come."""
        self._config = config
        if self._looking is not None:
            self._follow()

    def _follow(self) -> None:
        """Follow the sources that the config has, and no others."""
        wanted = sources_of(self._config)
        for key in self._feeds.keys() - set(wanted.items()):
            _, task = self._feeds.pop(key)
            task.cancel()
        for discover, pools in wanted.items():
            if (discover, pools) not in self._feeds:
                feed = self._made(discover, pools)
                self._feeds[discover, pools] = feed, asyncio.create_task(feed.run(), name=feed.status.name)
        self._registry.sources = [feed.status for feed, _ in self._feeds.values()]

    def _made(self, discover: DiscoverConfig, pools: tuple[PoolKey, ...]) -> Feed:
        source = self._sources[discover.kind](discover, pools, self._random)
        others = self._pools.keys() - set(pools)
        ours = {key: self._pools[key] for key in pools}
        return Feed(discover.name, source, ours, others, self._events, self._random)

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for feed, _ in self._feeds.values():
                feed.look_again()


def sources_of(config: Config) -> Wanted:
    """Return the sources of a config, each with the pools that it is for."""
    found: dict[DiscoverConfig, tuple[PoolKey, ...]] = {}
    for key, pool in _discovered(config):
        if pool.discover is not None:
            found[pool.discover] = (*found.get(pool.discover, ()), key)
    return found


def _discovered(config: Config) -> Iterator[tuple[PoolKey, PoolConfig]]:
    for model in config.models:
        for role, pool in model.pools():
            if pool.discover is not None:
                yield (model.name, role), pool
