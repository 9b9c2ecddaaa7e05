"""A worker is drained: it is told that it gets no more requests, and those that it has come to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import httpx

from orchestrator.wire.load import DRAIN_PATH, READY_PATH, LoadReport, read_report

# A decode worker pulls the KV cache of a prefill that has just ended; it begins with that at once. And legs
# may be on their way when the last orchestrator hears that the worker wants none.
STILL_S: Final = 1.0
POLL_S: Final = 0.25
_TIMEOUT_S: Final = 5.0


async def drain(url: str, key: str | None, limit_s: float, is_over: Callable[[], bool]) -> bool:
    """Drain the worker at `url`; returns whether it serves nothing any more.

    False if that is not so after `limit_s`, if the worker cannot say, or as soon as `is_over` says that it
    need not be waited for.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            asyncio.timeout(limit_s),
            httpx.AsyncClient(base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False) as client,
        ):
            await client.post(DRAIN_PATH)
            return await _wait_free(client, is_over)
    except (TimeoutError, httpx.HTTPError):
        return False


async def _wait_free(client: httpx.AsyncClient, is_over: Callable[[], bool]) -> bool:
    loop = asyncio.get_running_loop()
    free_since: float | None = None
    while not is_over():
        answer = await client.get(READY_PATH)
        report = read_report(answer.status_code, answer.content)
        if report is None:
            return False
        free_since = (free_since or loop.time()) if is_free(report) else None
        if free_since is not None and loop.time() >= free_since + STILL_S:
            return True
        await asyncio.sleep(POLL_S)
    return False


def is_free(report: LoadReport) -> bool:
    """Return whether a worker has no requests, and every orchestrator knows that it wants none."""
    return report.is_draining and report.busy == 0 and report.unaware == 0
