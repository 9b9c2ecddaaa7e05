"""Active probes: who is there, what they can decode, how long a prompt may be."""

from __future__ import annotations

import asyncio

import httpx
import msgspec

from orchestrator.wire.info import WorkerInfo
from orchestrator.workers import Registry, Worker, WorkerState


class _ModelCard(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


class _WrongModelError(Exception):
    """The worker answers, but not for the model that the config says."""


class Prober:
    """Probes every worker of a registry until closed. One task per worker, none on a request's path."""

    def __init__(
        self,
        registry: Registry,
        *,
        credential: str | None,
        interval_s: float = 1.0,
        timeout_s: float = 5.0,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        """`credential` is what workers want as bearer token. `client`, if given, is closed by `aclose`."""
        self._registry = registry
        self._interval_s = interval_s
        self._client = client or httpx.AsyncClient(
            headers={"authorization": f"Bearer {credential}"} if credential else {},
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self._wake = {worker.name: asyncio.Event() for worker in registry.workers}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._registry.on_gone(lambda worker: self._wake[worker.name].set())
        self._tasks = [
            asyncio.create_task(self._watch(worker), name=f"probe {worker.name}")
            for worker in self._registry.workers
        ]

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    async def _watch(self, worker: Worker) -> None:
        wake = self._wake[worker.name]
        while True:
            await self._probe(worker)
            try:
                async with asyncio.timeout(self._interval_s):
                    await wake.wait()
            except TimeoutError:
                continue
            wake.clear()
            await asyncio.sleep(self._interval_s / 10)  # a worker that was just refused is not back at once

    async def _probe(self, worker: Worker) -> None:
        try:
            (await self._get(worker, "/health")).raise_for_status()
            if worker.state is not WorkerState.READY:
                await self._get_acquainted(worker)
                self._registry.mark_ready(worker)
        except (httpx.HTTPError, msgspec.MsgspecError, _WrongModelError) as error:
            self._registry.mark_gone(worker, f"{type(error).__name__}: {error}")

    async def _get_acquainted(self, worker: Worker) -> None:
        """A worker that comes (back) may be another version with other abilities: ask each time."""
        info = await self._info(worker)
        answer = await self._get(worker, "/v1/models")
        answer.raise_for_status()
        cards = msgspec.json.decode(answer.content, type=_ModelList).data
        served = worker.address.served_model
        lengths = [card.max_model_len for card in cards if card.id == served]
        if not lengths:
            raise _WrongModelError(f"it serves {[card.id for card in cards]}, not {served!r}")
        self._registry.announce(worker, info, lengths[0])

    async def _info(self, worker: Worker) -> WorkerInfo | None:
        answer = await self._get(worker, "/baton/info")
        if answer.status_code == httpx.codes.OK:
            return msgspec.json.decode(answer.content, type=WorkerInfo)
        return None

    async def _get(self, worker: Worker, path: str) -> httpx.Response:
        return await self._client.get(worker.address.url + path)
