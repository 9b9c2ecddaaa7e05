"""Workers are at all addresses of a name, for instance of a headless Service or of a group of containers.

A resolver may leave addresses out for a moment (one of several servers, an answer that is cut to fit), so one
that is missing is looked for a second time before it is taken for gone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from random import Random
from typing import Final, NoReturn

from orchestrator.config.options import DiscoverConfig, join_address, split_address
from orchestrator.discovery.base import PoolKey, Source, SourceAway, Take
from orchestrator.wire.member import Member, MemberSet

INTERVAL_S: Final = 2.0  # between two questions
SOON_S: Final = 0.5  # when an address was missing
JITTER: Final = 0.2
PATIENCE_S: Final = 10.0


def dns_source(config: DiscoverConfig, pools: Sequence[PoolKey], random: Random) -> Source:
    host, port = split_address(config.dns or "")
    return DnsSource(host, port, pools, random)


class DnsSource(Source):
    """It asks the system's resolver, in a thread, for A and AAAA records. A member's uid is its address."""

    def __init__(self, host: str, port: int, pools: Sequence[PoolKey], random: Random) -> None:
        self._host = host
        self._port = port
        self._pools = pools
        self._random = random

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
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(PATIENCE_S):
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
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
