"""An admitted request holds what its attempts share."""

from __future__ import annotations

from orchestrator.api.base import Conversion
from orchestrator.api.view import RequestView
from orchestrator.failover.continuation import Continuation
from orchestrator.legs.connectors.base import Handoff
from orchestrator.legs.leg import Legs, PrefillLeg
from orchestrator.legs.retry import Retries
from orchestrator.relay.route import Route
from orchestrator.relay.scope import RequestScope
from orchestrator.routing.plan import Plan


class AdmittedRequest:
    """A request that was given a permit is on its way through the workers."""

    __slots__ = (
        "attempt_began",
        "continuation",
        "conversion",
        "first_handoff",
        "legs",
        "plan",
        "prefill",
        "retries",
        "revision",
        "route",
        "scope",
        "view",
    )

    def __init__(
        self,
        scope: RequestScope,
        view: RequestView,
        route: Route,
        legs: Legs,
        plan: Plan,
        conversion: Conversion | None,
    ) -> None:
        """`view` is the client's, `conversion` what is made for it of the worker's whole answer."""
        self.scope = scope
        self.view = view
        self.route = route
        self.legs = legs
        self.plan = plan
        self.conversion = conversion
        self.prefill: PrefillLeg | None = None  # that has ended, and whose hand-off the decode leg builds on
        self.retries: Retries | None = None  # once a leg has failed
        self.attempt_began = 0.0  # when the attempt under way did; 0.0: the first one does with the permit
        self.revision: str | None = None  # of the worker that has begun its stream
        self.first_handoff: Handoff | None = None  # of the first prefill: what it says, the client is told
        self.continuation: Continuation | None = None  # once another worker goes on with the stream

    def note_prefilled(self, moment: float, sent: float) -> None:
        """Note that the KV cache of the prompt is there, or has gone over, since this moment; its leg was
        `sent`.
        """
        record = self.scope.record
        if not self.scope.has_begun:
            record.prefill_done = moment
        elif record.attempts is not None:
            record.attempts.prefill_done = moment
        if record.trail is not None:
            record.trail.prefill_sent = sent
