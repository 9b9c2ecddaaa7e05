"""What the legs and the attempts of one request share."""

from __future__ import annotations

from orchestrator.api.embeddings import Wanted
from orchestrator.api.view import RequestView
from orchestrator.failover.continuation import Continuation
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.nixl import Handoff
from orchestrator.legs.ledger import KvLease
from orchestrator.legs.retry import Retries
from orchestrator.relay.admission import Gate
from orchestrator.relay.scope import RequestScope
from orchestrator.routing.planner import Plan
from orchestrator.workers.registry import Worker


class Job:
    """One request on its way through the workers: what its legs and its attempts share."""

    plan: Plan
    worker: Worker  # that the last leg went to
    epoch = -1  # of that worker, then
    legs = 0  # sent
    avoid: tuple[Worker, ...]  # workers that have failed it
    is_plain = False  # send JSON and no ids, whatever the worker announces
    lease: KvLease | None = None  # of the prefill that the decode leg builds on
    retries: Retries | None = None  # once a leg has failed
    embeddings: Wanted | None = None  # what is made of the worker's answer
    first_handoff: Handoff | None = None  # of the first prefill: what it says, the client is told
    continuation: Continuation | None = None  # once another worker goes on with the stream

    def __init__(
        self,
        scope: RequestScope,
        view: RequestView,
        bodies: LegBodies,
        *,
        gate: Gate,
        plan: Plan,
        id: str,
        headers: bytes,
        path: str,
    ) -> None:
        """`gate`: that the permit is of. `id`: ours, for the workers. `headers`: of the client, for them.
        `path`: of the legs.
        """
        self.scope = scope
        self.view = view
        self.bodies = bodies
        self.gate = gate
        self.plan = plan
        self.id = id
        self.headers = headers
        self.path = path
        self.worker = plan.decode
        self.avoid = ()

    def aside(self) -> Job:
        """What work beside the request needs, which outlasts it: the last leg, and who has failed so far."""
        other = Job(
            self.scope,
            self.view,
            self.bodies,
            gate=self.gate,
            plan=self.plan,
            id=self.id,
            headers=self.headers,
            path=self.path,
        )
        other.worker = self.worker
        other.epoch = self.epoch
        other.legs = self.legs
        other.avoid = self.avoid
        other.is_plain = self.is_plain
        return other
