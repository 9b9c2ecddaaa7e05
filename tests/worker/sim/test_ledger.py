from __future__ import annotations

from worker.sim.ledger import Ledger, Pin


def pin(request_id: str = "r", deadline: float = 30.0) -> Pin:
    return Pin(request_id, [1, 2], b"digest", 20, deadline)


def test_a_pin_is_pulled_once() -> None:
    ledger = Ledger()
    ledger.pin(pin())
    assert ledger.pull("r", [1, 2]) == pin()
    assert ledger.pull("r", [1, 2]) is None
    assert (ledger.pinned, ledger.pulled, ledger.unknown) == (1, 1, 1)


def test_only_the_blocks_that_were_pinned_can_be_pulled() -> None:
    ledger = Ledger()
    ledger.pin(pin())
    assert ledger.pull("r", [1, 3]) is None
    assert ledger.pull("other", [1, 2]) is None
    assert ledger.pull("r", [1, 2]) is not None


def test_a_lost_pin_can_be_released_but_not_pulled() -> None:
    ledger = Ledger()
    ledger.pin(pin(), is_lost=True)
    assert ledger.pull("r", [1, 2]) is None
    assert ledger.release("r") == pin()
    assert ledger.release("r") is None
    assert ledger.released == 1


def test_leases_end() -> None:
    ledger = Ledger()
    ledger.pin(pin("early", 30.0))
    ledger.pin(pin("late", 31.0))
    assert ledger.expire(29.9) == []
    assert ledger.next_deadline() == 30.0
    assert ledger.expire(30.0) == [pin("early", 30.0)]
    assert ledger.pull("early", [1, 2]) is None
    assert ledger.expired == 1
    assert ledger.next_deadline() == 31.0


def test_a_lease_can_be_extended() -> None:
    ledger = Ledger()
    ledger.pin(pin("r", 30.0))
    ledger.extend("r", 60.0)
    ledger.extend("unknown", 60.0)
    assert ledger.expire(59.0) == []
    assert ledger.next_deadline() == 60.0


def test_it_describes_itself() -> None:
    ledger = Ledger()
    ledger.pin(pin(deadline=30.0))
    assert ledger.describe(now=10.0) == {
        "pins": [{"request_id": "r", "block_ids": [1, 2], "num_tokens": 20, "expires_in_s": 20.0}],
        "pinned": 1,
        "pulled": 0,
        "pushed": 0,
        "released": 0,
        "expired": 0,
        "unknown": 0,
    }
