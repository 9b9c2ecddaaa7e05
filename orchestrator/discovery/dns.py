"""Workers are at all addresses of a name, for instance of a headless Service or of a group of containers.

A resolver may leave addresses out for a moment (one of several servers, an answer that is cut to fit), so one
that is missing is looked for a second time before it is taken for gone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any, Final, NoReturn

from orchestrator.config.options import DiscoverConfig, join_address, split_address
from orchestrator.discovery.base import PoolKey, Source, SourceAway, Take
from orchestrator.loop.bounded_calls import BoundedCalls
from orchestrator.wire.member import Member, MemberSet

INTERVAL_S: Final = 2.0  # between two questions
SOON_S: Final = 0.5  # when an address was missing
JITTER: Final = 0.2
PATIENCE_S: Final = 10.0

Resolve = Callable[[str, int], Awaitable[Sequence[tuple[Any, ...]]]]  # as `socket.getaddrinfo`


def dns_source(config: DiscoverConfig, pools: Sequence[PoolKey], random: Random) -> Source:
    host, port = split_address(config.dns or "")
    return DnsSource(host, port, pools, random)


class DnsSource(Source):
    """It asks the system's resolver for A and AAAA records. A member's uid is its address."""

    def __init__(
        self,
        host: str,
        port: int,
        pools: Sequence[PoolKey],
        random: Random,
        resolve: Resolve | None = None,
    ) -> None:
        """`resolve` is asked instead of the system's resolver."""
        self._host = host
        self._port = port
        self._pools = pools
        self._random = random
        self._resolve = resolve or _system_resolver(host)

    async def watch(self, take: Take) -> NoReturn:
        last: frozenset[str] = frozenset()
        while True:
            found = await self._resolved()
            take(
                MemberSet(
                    tuple(self._member(pool, host) for pool in self._pools for host in sorted(found | last))
                )
            )
            is_missing, last = bool(last - found), found
            pause_s = SOON_S if is_missing else INTERVAL_S
            await asyncio.sleep(pause_s * self._random.uniform(1 - JITTER, 1 + JITTER))

    async def _resolved(self) -> frozenset[str]:
        try:
            async with asyncio.timeout(PATIENCE_S):
                found = await self._resolve(self._host, self._port)
        except TimeoutError as error:
            raise SourceAway(f"the resolver does not answer for {self._host}") from error
        except socket.gaierror as error:
            raise SourceAway(f"{self._host} cannot be resolved: {error.strerror}") from error
        except (OSError, UnicodeError) as error:
            raise SourceAway(f"{self._host} cannot be resolved: {error}") from error
        return frozenset(str(address[0]) for *_, address in found)

    def _member(self, pool: PoolKey, host: str) -> Member:
        model, role = pool
        address = join_address(host, self._port)
        return Member(uid=address, name=address, model=model, role=role, url=f"http://{address}")


def _system_resolver(host: str) -> Resolve:
    """Return a resolver whose threads nobody waits for: one may take minutes while its servers are silent."""
    calls = BoundedCalls(f"resolve {host}", PATIENCE_S)
    return lambda name, port: calls.make(socket.getaddrinfo, name, port, type=socket.SOCK_STREAM)
