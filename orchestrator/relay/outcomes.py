"""How routing policies hear what became of the legs that they have chosen workers for."""

from __future__ import annotations

from typing import Final

from orchestrator.legs.ledger import KvLease
from orchestrator.legs.retry import Failure
from orchestrator.relay.job import Job
from orchestrator.routing.policies.base import End, Outcome

_ANSWERED: Final = End.ANSWERED  # a look-up by member is a call in Python
_REFUSED: Final = End.REFUSED
_FAILED: Final = End.FAILED
_CANCELLED: Final = End.CANCELLED


def tell_prefilled(job: Job, lease: KvLease) -> None:
    """The prefill leg has answered."""
    choice = job.plan.prefill_choice
    if choice is not None and choice.is_awaited:
        cached_tokens = lease.handoff.prefill_cached_tokens
        choice.ended(Outcome(_ANSWERED, job.scope.now(), cached_tokens))


def tell_failed(job: Job, failure: Failure) -> None:
    """The leg to `job.worker` has failed, so that nothing more comes of the plan."""
    if job.plan.is_awaited:
        now = job.scope.now()
        end = _REFUSED if failure in (Failure.REFUSED, Failure.BUSY) else _FAILED
        job.plan.choice_of(job.worker).ended(Outcome(end, now))
        job.plan.close(now)


def tell_ended(job: Job) -> None:
    """The request has ended, whether or not it was answered."""
    if job.plan.is_awaited:
        job.plan.close(job.scope.now(), _end_of(job))


def _end_of(job: Job) -> End:
    """That of the leg which is to answer the client."""
    if job.scope.is_stopped:
        return _CANCELLED
    return _ANSWERED if job.scope.exchange.is_complete else _FAILED
