"""Each bug that is planted here breaks an invariant on some of the first schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.api.base import Endpoint
from orchestrator.failover.tokenize import Ids
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.handoff_watch import HandoffWatch
from orchestrator.legs.ledger import KvLease
from orchestrator.legs.leg import Leg
from orchestrator.legs.releases import Releases
from orchestrator.legs.retry import Retries
from orchestrator.relay.flow import Flow
from orchestrator.relay.scope import RequestScope
from orchestrator.telemetry.counters import Telemetry
from orchestrator.transport.answer import Answer
from orchestrator.wire.sse import EventStream
from orchestrator.wire.usage import Kv
from orchestrator.workers.health import Prober
from orchestrator.workers.pools import ROLES, Pools
from tests.simulation.seeds import problems

SEEDS = range(1000)

Plant = Callable[[pytest.MonkeyPatch], None]


def nothing(*args: Any, **options: Any) -> None:
    """What a forgotten call does."""


# --- hand-offs ----------------------------------------------------------------------------------


def no_release_leg(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Releases, "release", nothing)


def no_release_for_a_prefill_that_has_just_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Releases, "abandon_prefill", lambda releases, leg: leg.abort())


def a_prefill_is_closed_and_not_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("orchestrator.legs.releases.GRACE_S", 0.0)
    patch.setattr("orchestrator.legs.releases.LAST_WORDS_S", ())


def a_decode_leg_is_dropped_and_taken_for_pulled(patch: pytest.MonkeyPatch) -> None:
    def drop(releases: Releases, leg: Any, prefill: Any, lease: KvLease) -> None:
        leg.abort()
        lease.consume()

    patch.setattr(Releases, "abandon_decode", drop)


def a_handoff_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Releases, "settle", nothing)


def a_used_handoff_is_sent_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KvLease, "use", nothing)


def the_handoff_of_somebody_else(patch: pytest.MonkeyPatch) -> None:
    decode, kept = LegBodies.decode, []

    def decode_with_the_last(bodies: LegBodies, codec: Any, model: str, handoff: Any) -> Any:
        kept.append(handoff)
        return decode(bodies, codec, model, kept[-2] if len(kept) > 1 else handoff)

    patch.setattr(LegBodies, "decode", decode_with_the_last)


def a_recompute_is_silent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("orchestrator.wire.sse.kv_outcome", lambda usage: Kv.TRANSFERRED)


def what_begins_after_the_lease_is_relayed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("orchestrator.legs.ledger.MARGIN", -100.0)


def a_frozen_engine_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HandoffWatch, "_look_for_stall", nothing)


# --- streams ------------------------------------------------------------------------------------


def a_chunk_is_relayed_twice(patch: pytest.MonkeyPatch) -> None:
    feed = EventStream.feed
    patch.setattr(EventStream, "feed", lambda events, chunk: feed(events, chunk) * 2)


def the_tail_of_a_chunk_is_dropped(patch: pytest.MonkeyPatch) -> None:
    feed = EventStream.feed

    def feed_without_tail(events: EventStream, chunk: bytes) -> bytes:
        whole = feed(events, chunk)
        events._whole = None
        return whole

    patch.setattr(EventStream, "feed", feed_without_tail)


def a_short_stream_looks_fine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EventStream, "finish", nothing)


def no_error_event(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Endpoint, "error_event", lambda endpoint, error: b"")


def a_stream_begins_again_after_bytes_were_sent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ids, "followed_by", lambda prompt, said: prompt)


def hidden_usage_is_shown(patch: pytest.MonkeyPatch) -> None:
    make = EventStream.__init__
    patch.setattr(
        EventStream, "__init__", lambda events, **options: make(events, **(options | {"hides_usage": False}))
    )


# --- lifetimes ----------------------------------------------------------------------------------


def a_place_is_kept_when_a_leg_fails(patch: pytest.MonkeyPatch) -> None:
    give_back = Leg.__exit__

    def give_back_after_success(leg: Leg, kind: Any, error: Any, trace: Any) -> None:
        give_back(leg, kind, error, trace)
        if error is not None:
            leg.worker.count_leg(1)

    patch.setattr(Leg, "__exit__", give_back_after_success)


def a_client_that_leaves_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestScope, "_client_left", nothing)


def no_sweep(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestScope, "sweep", nothing)


def legs_are_not_closed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Answer, "abort", nothing)


def a_client_that_left_stays_in_flight(patch: pytest.MonkeyPatch) -> None:
    finish = Telemetry.finish

    def finish_others(telemetry: Telemetry, record: Any) -> None:
        if record.status == 499:
            record.in_flight_cell = -1
        finish(telemetry, record)

    patch.setattr(Telemetry, "finish", finish_others)


# --- workers ------------------------------------------------------------------------------------


def gone_workers_get_requests(patch: pytest.MonkeyPatch) -> None:
    update = Pools.update

    def update_with_more_only(pools: Pools, members: Any) -> None:
        before = {role: getattr(pools, role) for role in ROLES}
        update(pools, members)
        for role, workers in before.items():
            if len(workers) > len(getattr(pools, role)):
                setattr(pools, role, workers)

    patch.setattr(Pools, "update", update_with_more_only)


def a_lost_leg_is_not_replaced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flow, "_may_help", lambda flow, request, failure: False)


def whoever_loses_workers_is_sent_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Retries, "is_poison", lambda retries, failure, worker, was_in_service: False)


def the_retry_budget_is_not_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Retries, "close", nothing)


async def no_end(*args: Any) -> None:
    """What closes nothing."""


def probes_go_on_after_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Prober, "aclose", no_end)


BUGS: list[tuple[Plant, str]] = [
    (no_release_leg, "nobody released"),
    (no_release_for_a_prefill_that_has_just_ended, "nobody released"),
    (a_prefill_is_closed_and_not_ended, "nobody was told of"),
    (a_decode_leg_is_dropped_and_taken_for_pulled, "which the ledger has as consumed"),
    (a_handoff_is_forgotten, "leaked leases"),
    (a_used_handoff_is_sent_again, "was sent 2 times"),
    (the_handoff_of_somebody_else, "was sent 2 times"),
    (a_recompute_is_silent, "its KV is said to be"),
    (what_begins_after_the_lease_is_relayed, "began after its lease"),
    (a_frozen_engine_is_not_noticed, "whose engine stood still"),
    (a_chunk_is_relayed_twice, "it got '"),
    (the_tail_of_a_chunk_is_dropped, "it got '"),
    (a_short_stream_looks_fine, "its answer is no whole answer"),
    (no_error_event, "its answer is no whole answer"),
    (a_stream_begins_again_after_bytes_were_sent, "it got '"),
    (hidden_usage_is_shown, "it got the usage"),
    (a_place_is_kept_when_a_leg_fails, "seats on"),
    (a_client_that_leaves_is_not_noticed, "went on after it had left"),
    (no_sweep, "its request never ended"),
    (legs_are_not_closed, "after its request"),
    (a_client_that_left_stays_in_flight, "requests in flight"),
    (gone_workers_get_requests, "out of service"),
    (a_lost_leg_is_not_replaced, "was not replaced"),
    (whoever_loses_workers_is_sent_on, "were lost with it"),
    (the_retry_budget_is_not_given_back, "replacements in the budget"),
    (probes_go_on_after_the_end, "a task is left"),
]


@pytest.mark.pure  # each replaces a method
@pytest.mark.parametrize(("plant", "symptom"), BUGS, ids=[plant.__name__ for plant, _ in BUGS])
def test_a_planted_bug_is_found(plant: Plant, symptom: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in SEEDS:
        if any(symptom in problem for problem in problems(seed)):
            return
    pytest.fail(f"none of {len(SEEDS)} schedules shows {symptom!r}")
