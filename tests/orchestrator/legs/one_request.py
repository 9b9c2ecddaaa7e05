"""The legs of one request over workers in memory, without the flow that makes them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from orchestrator.api.view import view_request
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors import NIXL
from orchestrator.legs.connectors.base import Connector
from orchestrator.legs.leg import Legs
from orchestrator.telemetry.counters import FallbackReason
from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest
from orchestrator.wire.info import Encoding, TokenIdsForm
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import announcement
from tests.orchestrator.fakes import JSON, FakeCluster
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
LIMIT = 10_000  # bytes of an answer
TRUSTED = (WorkerState.READY, 0, True)

Test = Callable[["OneRequest"], Awaitable[None]]


class OneRequest:
    """A cluster with a prefill and a decode worker, and the legs of one request to them."""

    def __init__(self, document: dict[str, Any] = CHAT, connector: Connector = NIXL, **options: Any) -> None:
        self.cluster = FakeCluster(**options)
        self.prefill = self.cluster.worker("prefill/0")
        self.decode = self.cluster.worker("decode/0")
        self.legs = self.another(document, connector)

    def another(self, document: dict[str, Any] = CHAT, connector: Connector = NIXL) -> Legs:
        """The legs of one more request."""
        bodies = LegBodies(view_request(json.dumps(document).encode()), "/v1/chat/completions", connector)
        return Legs(self.cluster.core.dispatcher, "m", bodies, b"accept: text/plain\r\n")

    def serve(self, worker: Worker, handler: LegHandler) -> None:
        self.cluster.upstream.serve(worker.origin, handler)

    def announce(self, worker: Worker, *decodes: Encoding, token_ids: tuple[TokenIdsForm, ...] = ()) -> None:
        self.cluster.registry.announce(
            worker, Introduction(announcement(*decodes, token_ids=token_ids), None)
        )

    def told_of(self, worker: Worker) -> tuple[WorkerState, int, bool]:
        """What the registry knows of a worker, and whether the pools take it as any other."""
        return worker.state, worker.failures, self.cluster.registry.pools["m"].is_steady

    def sent_to(self, worker: Worker) -> list[MemoryRequest]:
        return [leg for leg in self.cluster.upstream.requests if leg.origin == worker.origin]

    def fallbacks(self) -> dict[FallbackReason, int]:
        row, first = self.cluster.telemetry.row, self.cluster.telemetry.layout.fallbacks
        return {reason: row[first + reason] for reason in FallbackReason if row[first + reason]}


def run(test: Test, **options: Any) -> None:
    """Run a test over legs of its own; at its end no place on a worker is taken."""

    async def main() -> None:
        one = OneRequest(**options)
        await test(one)
        assert (one.prefill.in_flight, one.decode.in_flight) == (0, 0)
        await one.cluster.aclose()

    run_virtually(main())


def header(leg: MemoryRequest, name: bytes) -> bytes | None:
    return dict(leg.headers).get(name)


# What a worker says of a model, or an adapter, that it does not have: an error that any client may cause.
NO_MODEL = (
    b'{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":"model","code":404}}'
)


def answers(status: int, body: bytes = b"{}", headers: dict[bytes, bytes] = JSON) -> LegHandler:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(status, body, headers)

    return worker


async def cuts_short(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.cut_short()


async def says_garbage(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.garbage()


async def hangs(request: MemoryRequest, reply: MemoryReply) -> None:
    await reply.hang()
