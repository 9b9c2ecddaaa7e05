"""A worker is drained: it is told that it gets no more requests, and those that it has come to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import httpx

# Until every orchestrator has noticed that the member is draining, and sends nothing new.
NOTICE_S: Final = 3.0
# A decode worker pulls the KV cache of a prefill that has just ended; it begins with that at once.
PULLED_S: Final = 1.0
POLL_S: Final = 0.25
_TIMEOUT_S: Final = 5.0


async def drain(url: str, key: str | None, limit_s: float, is_over: Callable[[], bool]) -> bool:
    """Drain the worker at `url`; returns whether it serves nothing any more.

    False if that is not so after `limit_s`, if nobody can say, or as soon as `is_over` says that it need not
    be waited for.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            asyncio.timeout(limit_s),
            httpx.AsyncClient(base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False) as client,
        ):
            await client.post("/baton/drain")
            return await _wait_free(client, is_over)
    except (TimeoutError, httpx.HTTPError):
        return False


async def _wait_free(client: httpx.AsyncClient, is_over: Callable[[], bool]) -> bool:
    loop = asyncio.get_running_loop()
    noticed_at = loop.time() + NOTICE_S
    free_since: float | None = None
    while not is_over():
        count = _under_way(await client.get("/baton/ready"))
        if count is None and loop.time() > noticed_at:
            return False
        free_since = None if count != 0 else free_since or loop.time()
        if free_since is not None and loop.time() > max(noticed_at, free_since + PULLED_S):
            return True
        await asyncio.sleep(POLL_S)
    return False


def _under_way(answer: httpx.Response) -> int | None:
    """Return how many requests a worker has; None if it does not say."""
    try:
        report: Any = answer.json()
        return int(report["running"]) + int(report["waiting"])
    except (ValueError, TypeError, LookupError):
        return None
