"""A table has the life of a worker: the states it can be in, what can happen to it, and the state after that.

Who sees what: probes see ANSWERED, REFUSED, FAILED, MISSED, SILENT, UNFIT and WITHDRAWN
(`workers/health.py`), legs see REFUSED, LOST, STALLED, ERRED, DENIED and PROVEN (the flow), the operator
drains, SLOW is what figures say (`control/worker_watch.py`), NEEDED follows from what happens to others of
the pool.

A client could cause what a leg saw as DENIED, so it only has the worker looked at; a probe, in which no
client has a part, says UNFIT.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class WorkerState(StrEnum):
    """READY takes requests, SUSPECT takes them only if its pool has no other, PROBING takes one at a time."""

    STARTING = "starting"  # never answered a probe yet
    READY = "ready"
    SUSPECT = "suspect"  # lost a leg, missed a probe, or was drained: a probe, which is due at once, decides
    EJECTED = "ejected"  # on suspicion; asked again after a pause that grows
    PROBING = "probing"  # half open: back from being ejected, until a leg succeeds
    DRAINING = "draining"  # the operator wants it free, or it does so itself: legs end, none begins
    GONE = "gone"  # nobody listens there; probes bring it back
    UNFIT = "unfit"  # it is there, but not for us: another key, another model; probes bring it back


class Event(StrEnum):
    """These events can happen to a worker."""

    ANSWERED = "answered"  # a probe found it well
    REFUSED = "refused"  # a connection was refused: its process is not there
    FAILED = "failed"  # a probe found it ill, or was cut off
    MISSED = "missed"  # a probe got no answer in its time
    SILENT = "silent"  # a probe got none, and nothing was heard on any leg for too long
    LOST = "lost"  # a leg was reset or cut short
    STALLED = "stalled"  # a hand-off did not get on, though probes are answered
    ERRED = "erred"  # too many legs in a row were answered with a 5xx
    DENIED = "denied"  # a leg was answered as no worker of ours answers
    UNFIT = "unfit"  # a probe was, or it found another model there
    PROVEN = "proven"  # a leg on trial succeeded
    SLOW = "slow"  # it is far slower than its peers
    NEEDED = "needed"  # more than half of what is left of its pool is ejected
    WITHDRAWN = "withdrawn"  # it says itself that it wants no new legs
    DRAIN = "drain"
    UNDRAIN = "undrain"


NEVER = float("-inf")  # a moment before all others


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """A suspicion says until when a worker is kept from its share; only the process that probes knows it."""

    ejections: int = 0  # in a row
    retry_at: float = NEVER  # ejected: when it is probed again
    doubted: float = NEVER  # when it became suspect
    verdict_at: float = NEVER  # suspect: until when it must give a sign of life
    serves_since: float = NEVER  # when it was last taken into full service


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """An event can change this of a worker (`workers/lifecycle.py`). Moments are by the judge's clock."""

    state: WorkerState
    epoch: int  # how often it has come into service
    failures: int  # legs in a row that were answered with a 5xx; 0 once one succeeded
    suspicion: Suspicion
    warm_from: float  # when its slow start began
    credit: float  # in slow start: towards its next turn (`workers/pools.py`)


_STARTING, _READY, _SUSPECT = WorkerState.STARTING, WorkerState.READY, WorkerState.SUSPECT
_EJECTED, _PROBING = WorkerState.EJECTED, WorkerState.PROBING
_DRAINING, _GONE, _UNFIT = WorkerState.DRAINING, WorkerState.GONE, WorkerState.UNFIT

# An event that is not listed changes nothing. If half of its pool is out, a worker is SUSPECT, not EJECTED.
_TABLE: dict[WorkerState, dict[Event, WorkerState]] = {
    _STARTING: {Event.ANSWERED: _READY, Event.UNFIT: _UNFIT},
    _READY: {
        Event.REFUSED: _GONE,
        Event.FAILED: _SUSPECT,
        Event.MISSED: _SUSPECT,
        Event.LOST: _SUSPECT,
        Event.DENIED: _SUSPECT,
        Event.UNFIT: _UNFIT,
        Event.STALLED: _SUSPECT,
        Event.SILENT: _EJECTED,
        Event.ERRED: _EJECTED,
        Event.SLOW: _EJECTED,
        Event.DRAIN: _DRAINING,
        Event.WITHDRAWN: _DRAINING,
    },
    _SUSPECT: {
        Event.ANSWERED: _READY,
        Event.REFUSED: _GONE,
        Event.FAILED: _EJECTED,
        Event.SILENT: _EJECTED,
        Event.ERRED: _EJECTED,
        Event.UNFIT: _UNFIT,
        Event.DRAIN: _DRAINING,
        Event.WITHDRAWN: _DRAINING,
    },
    _EJECTED: {
        Event.ANSWERED: _PROBING,
        Event.UNFIT: _UNFIT,
        Event.REFUSED: _GONE,
        Event.NEEDED: _SUSPECT,
        Event.DRAIN: _DRAINING,
        Event.WITHDRAWN: _DRAINING,
    },
    _PROBING: {
        Event.PROVEN: _READY,
        Event.REFUSED: _GONE,
        Event.FAILED: _EJECTED,
        Event.MISSED: _EJECTED,
        Event.SILENT: _EJECTED,
        Event.LOST: _EJECTED,
        Event.STALLED: _EJECTED,
        Event.ERRED: _EJECTED,
        Event.UNFIT: _UNFIT,
        Event.NEEDED: _SUSPECT,
        Event.DRAIN: _DRAINING,
        Event.WITHDRAWN: _DRAINING,
    },
    _DRAINING: {
        Event.REFUSED: _GONE,
        Event.SILENT: _GONE,
        Event.UNDRAIN: _SUSPECT,
    },
    _GONE: {Event.ANSWERED: _READY, Event.UNFIT: _UNFIT},
    _UNFIT: {Event.ANSWERED: _READY, Event.REFUSED: _GONE},
}

IN_SERVICE = frozenset({_READY, _SUSPECT, _PROBING, _DRAINING})  # legs run there
SERVING = IN_SERVICE - {_DRAINING}  # nobody has taken them out
NOT_TAKEN_OUT = SERVING | {_GONE}  # of those that are gone nobody knows what has ended them
FULL_SERVICE = frozenset({_READY, _SUSPECT})
ON_SUSPICION = frozenset({_EJECTED, _PROBING})  # kept from their share: never more than half of a pool
REACHABLE = FULL_SERVICE | ON_SUSPICION  # what that half is counted from


def next_state(state: WorkerState, event: Event) -> WorkerState:
    """Return the state after `event`: the same one where it changes nothing."""
    return _TABLE[state].get(event, state)
