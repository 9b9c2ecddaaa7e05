from __future__ import annotations

from itertools import product

import pytest

from orchestrator.workers.states import IN_SERVICE, ON_SUSPICION, REACHABLE, Event, WorkerState, next_state

# The table once more, as one line per state: the state after each event in the order of `Event`.
# A dot is no change; the others are the first letters of states, X is EJECTED.
EVENTS = (
    "answered refused failed missed silent lost stalled erred denied unfit proven slow needed withdrawn"
    " drain undrain"
)
TABLE = {
    "starting": "R . . . . . . . . U . . . . . .",
    "ready": "   . G S S X S S X S U . X . D D .",
    "suspect": " R G X . X . . X . U . . . D D .",
    "ejected": " P G . . . . . . . U . . S D D .",
    "probing": " . G X X X X X X . U R . S D D .",
    "draining": ". G . . G . . . . . . . . . . S",
    "gone": "    R . . . . . . . . U . . . . . .",
    "unfit": "   R G . . . . . . . . . . . . . .",
}
LETTERS = {
    "R": "ready",
    "S": "suspect",
    "X": "ejected",
    "P": "probing",
    "D": "draining",
    "G": "gone",
    "U": "unfit",
}


def test_the_table_here_has_every_cell() -> None:
    assert [event.value for event in Event] == EVENTS.split()
    assert [state.value for state in WorkerState] == list(TABLE)


@pytest.mark.parametrize(("state", "event"), list(product(WorkerState, Event)))
def test_every_cell(state: WorkerState, event: Event) -> None:
    letter = TABLE[state].split()[list(Event).index(event)]
    assert next_state(state, event) == LETTERS.get(letter, state)


def test_every_state_can_be_reached_and_left() -> None:
    moves = {(state, next_state(state, event)) for state, event in product(WorkerState, Event)}
    moves = {(before, after) for before, after in moves if before is not after}
    assert {after for _, after in moves} == set(WorkerState) - {WorkerState.STARTING}
    assert {before for before, _ in moves} == set(WorkerState)


def test_who_is_ejected_or_gone_has_no_legs() -> None:
    out = {WorkerState.EJECTED, WorkerState.GONE, WorkerState.UNFIT, WorkerState.STARTING}
    assert not out & IN_SERVICE
    assert ON_SUSPICION < REACHABLE
