from __future__ import annotations

import pytest

from orchestrator.config.options import LEASE_S
from orchestrator.legs.connectors.base import Handoff
from orchestrator.legs.ledger import MARGIN, KvLease, LeaseLedger
from orchestrator.telemetry.counters import Layout, LeaseState, Telemetry
from tests.orchestrator.cluster import registry_of


class Books:
    """A ledger whose clock a test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.telemetry = Telemetry(Layout(["m"], []))
        self.ledger = LeaseLedger(self.telemetry, lambda: self.now)
        self.worker = registry_of({"prefill": 1}).workers[0]

    def lease(self) -> KvLease:
        return self.ledger.lease(self.worker, Handoff(b"{}", None))

    def counts(self) -> dict[LeaseState, int]:
        self.ledger.sweep()
        row, first = self.telemetry.row, self.telemetry.layout.leases
        return {state: row[first + state] for state in LeaseState if row[first + state]}


def test_a_finished_prefill_is_held() -> None:
    books = Books()
    lease = books.lease()
    assert lease.state is LeaseState.HELD
    assert books.ledger.open == {lease}
    assert books.counts() == {LeaseState.HELD: 1}
    assert books.ledger.is_good(lease)


def test_a_used_hand_off_is_never_good_again() -> None:
    books = Books()
    lease = books.lease()
    lease.use()
    assert not books.ledger.is_good(lease)
    assert books.counts() == {LeaseState.USED: 1}


def test_the_answer_of_the_decode_worker_consumes_it() -> None:
    books = Books()
    lease = books.lease()
    lease.use()
    lease.consume()
    lease.consume()
    assert books.counts() == {LeaseState.CONSUMED: 1}
    assert books.ledger.open == set()


def test_a_leg_that_was_refused_unread_leaves_the_blocks_owed() -> None:
    books = Books()
    lease = books.lease()
    lease.use()
    lease.unuse()
    assert books.counts() == {LeaseState.HELD: 1}
    lease.release()
    assert books.counts() == {LeaseState.RELEASED: 1}


def test_what_was_used_is_not_released() -> None:
    books = Books()
    lease = books.lease()
    lease.use()
    lease.release()
    assert lease.state is LeaseState.USED


@pytest.mark.parametrize("is_used", [False, True])
def test_a_lease_that_nobody_ends_expires(is_used: bool) -> None:
    books = Books()
    lease = books.lease()
    if is_used:
        lease.use()
    books.now += LEASE_S - 0.1
    books.ledger.sweep()
    assert lease in books.ledger.open
    books.now += 0.1
    books.ledger.sweep()
    assert books.counts() == {LeaseState.EXPIRED: 1}
    assert books.ledger.open == set()


def test_a_hand_off_is_not_sent_near_the_end_of_its_lease() -> None:
    books = Books()
    lease = books.lease()
    books.now += LEASE_S * (1 - MARGIN) - 0.001
    assert books.ledger.is_good(lease)
    books.now += 0.001
    assert not books.ledger.is_good(lease)


def test_a_restarted_worker_has_forgotten_its_blocks() -> None:
    books = Books()
    lease = books.lease()
    books.worker.epoch += 1
    assert not books.ledger.is_good(lease)


def test_what_ended_stays_as_it_ended() -> None:
    books = Books()
    lease = books.lease()
    lease.use()
    lease.consume()
    lease.unuse()
    lease.release()
    books.now += 2 * LEASE_S
    books.ledger.sweep()
    assert books.counts() == {LeaseState.CONSUMED: 1}


@pytest.mark.parametrize(("is_used", "is_handed_back", "leaks"), [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_a_lease_that_somebody_forgot_is_counted(is_used: int, is_handed_back: int, leaks: int) -> None:
    books = Books()
    lease = books.lease()
    if is_used:
        lease.use()
    lease.is_handed_back = bool(is_handed_back)
    books.now += LEASE_S
    books.ledger.sweep()
    assert books.telemetry.row[books.telemetry.layout.leases_leaked] == leaks
