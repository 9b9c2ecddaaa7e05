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

    prefill: PrefillLeg | None = None  # that has ended, and whose hand-off the decode leg builds on
    retries: Retries | None = None  # once a leg has failed
    attempt_began = 0.0  # when the attempt under way did; 0.0: the first one does with the permit
    first_handoff: Handoff | None = None  # of the first prefill: what it says, the client is told
    continuation: Continuation | None = None  # once another worker goes on with the stream

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

    def note_prefilled(self) -> None:
        """Note that the KV cache of the prompt is there, or has gone over."""
        if not self.scope.has_begun:
            self.scope.record.prefill_done = self.scope.now()
