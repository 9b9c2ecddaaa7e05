"""What the legs and the attempts of one request share."""

from __future__ import annotations

import msgspec

from orchestrator.admission import Gate
from orchestrator.embeddings import Wanted
from orchestrator.ledger import KvLease
from orchestrator.relay import RequestScope
from orchestrator.retry import Retries
from orchestrator.routing.planner import Plan
from orchestrator.wire.continuation import Continuation
from orchestrator.wire.legs import LegBodies
from orchestrator.wire.shapes import Handoff, RequestView
from orchestrator.workers import Worker


class Job(msgspec.Struct):
    """One request on its way through the workers: what its legs and its attempts share."""

    scope: RequestScope
    view: RequestView
    bodies: LegBodies
    gate: Gate  # that its permit is of
    plan: Plan
    id: str  # ours, for the workers
    headers: bytes  # of the client, for the workers
    path: str  # of the legs
    worker: Worker  # that the last leg went to
    epoch: int = -1  # of that worker, then
    legs: int = 0  # sent
    avoid: tuple[Worker, ...] = ()  # workers that have failed it
    is_plain: bool = False  # send JSON and no ids, whatever the worker announces
    lease: KvLease | None = None  # of the prefill that the decode leg builds on
    retries: Retries | None = None  # once a leg has failed
    embeddings: Wanted | None = None  # what is made of the worker's answer
    first_handoff: Handoff | None = None  # of the first prefill: what it says, the client is told
    continuation: Continuation | None = None  # once another worker goes on with the stream
