"""Routing policies that want to hear of it are told here what became of legs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

import msgspec

from orchestrator.legs.connectors.base import Handoff
from orchestrator.legs.leg import AnswerLeg
from orchestrator.legs.retry import Failure
from orchestrator.relay.admitted import AdmittedRequest
from orchestrator.routing.plan import Plan
from orchestrator.routing.policies.base import End, Outcome

_ANSWERED: Final = End.ANSWERED  # a look-up by member is a call in Python
_REFUSED: Final = End.REFUSED
_FAILED: Final = End.FAILED
_CANCELLED: Final = End.CANCELLED
_LIST: Final = msgspec.json.Decoder(list[int])
_BASE64: Final = msgspec.json.Decoder(bytes)


class Prefilled(Outcome):
    """A prefill leg has ended with an answer."""

    __slots__ = ("_handoff",)

    def __init__(self, moment: float, handoff: Handoff) -> None:
        self.end = _ANSWERED  # not by the base: this is made for each request
        self.moment = moment
        self.cached_tokens = handoff.prefill_cached_tokens
        self._handoff = handoff

    def prompt_tokens(self) -> int | None:
        return self._handoff.prompt_tokens()

    def prompt_ids(self) -> Sequence[int] | None:
        ids = self._handoff.token_ids
        if ids is None:
            return None
        if ids.is_list:
            return _LIST.decode(ids.json)
        return array("i", ids.packed or _BASE64.decode(ids.json))


def tell_prefilled(plan: Plan, handoff: Handoff | None, moment: float) -> None:
    """Tell that the prefill leg has answered; `handoff` is None if its answer hands nothing over."""
    choice = plan.prefill_choice
    if choice is not None and choice.policy is not None:
        choice.ended(Outcome(_ANSWERED, moment) if handoff is None else Prefilled(moment, handoff))
        plan.wants_ends = plan.decode_choice.policy is not None


def tell_begun(request: AdmittedRequest, leg: AnswerLeg) -> None:
    """Tell that the first event of a stream has come, unless the hand-off is not the plan's own."""
    plan = request.plan
    made_by = None if leg.lease is None else leg.lease.worker
    if made_by is plan.prefill:
        plan.begun(leg.sent, request.scope.record.first_byte)


def tell_failed(request: AdmittedRequest, failure: Failure) -> None:
    """Tell that the last leg has failed, so that nothing more comes of the plan."""
    now = request.scope.now()
    end = _REFUSED if failure in (Failure.REFUSED, Failure.BUSY) else _FAILED
    if request.legs.last is not None:
        request.plan.choice_of(request.legs.last).ended(Outcome(end, now))
    request.plan.close(now)


def tell_ended(request: AdmittedRequest) -> None:
    """Tell that the request has ended, whether or not it was answered."""
    if request.plan.owes():
        request.plan.close(request.scope.now(), _end_of(request))


def _end_of(request: AdmittedRequest) -> End:
    """Return how the leg ended that is to answer the client."""
    if request.scope.is_stopped:
        return _CANCELLED
    return _ANSWERED if request.scope.exchange.is_complete else _FAILED
