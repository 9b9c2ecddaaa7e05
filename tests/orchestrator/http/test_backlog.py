from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.http.backlog import MANY_HELD, MAX_HELD, MAX_STEP, Backlog


def backlog(*reads: bytes) -> Backlog:
    made = Backlog()
    for read in reads:
        made.hold(read)
    return made


@given(
    st.lists(st.binary(min_size=1, max_size=20), max_size=200), st.lists(st.integers(1, 30)), st.booleans()
)
def test_what_is_held_is_taken_in_order(reads: list[bytes], sizes: list[int], joins: bool) -> None:
    held, taken, whole = backlog(*reads), b"", b"".join(reads)
    assert held.size == len(whole)
    for size in sizes:
        if joins:
            held.join()
        if held.size:
            piece = held.take(size)
            assert 1 <= len(piece) <= size
            taken += piece
        assert held.size == len(whole) - len(taken)
    while held.size:
        taken += held.take(len(whole))
    assert taken == whole


def test_many_reads_are_joined_and_few_are_not() -> None:
    few = backlog(*[b"a"] * MANY_HELD)
    few.join()
    assert few.take(1000) == b"a"
    many = backlog(*[b"a"] * (MANY_HELD + 1))
    many.take(1)
    many.hold(b"b")
    many.join()
    assert many.take(1000) == b"a" * MANY_HELD + b"b"
    assert many.size == 0


def test_joining_takes_pieces_of_reads_as_well() -> None:
    held = backlog(b"abc", *[b"d"] * MANY_HELD)
    assert held.take(1) == b"a"
    held.join()
    assert held.take(3) == b"bcd"


@pytest.mark.parametrize(
    ("data", "is_head_next", "size"),
    [
        (b"GET / HTTP/1.1\r\n\r\nrest", True, 18),
        (b"GET / HTTP/1.1\r\n", True, MAX_STEP),
        (b"a" * MAX_STEP + b"\r\n\r\n", True, MAX_STEP),
        (b"GET / HTTP/1.1\r\n\r\nrest", False, MAX_STEP),
    ],
)
def test_a_step_ends_with_a_head(data: bytes, is_head_next: bool, size: int) -> None:
    assert backlog(data).step(is_head_next) == size


def test_a_step_ends_with_a_head_in_the_rest_of_a_read() -> None:
    held = backlog(b"rest" + b"GET / HTTP/1.1\r\n\r\n")
    held.take(4)
    assert held.step(is_head_next=True) == 18


def test_reading_pauses_above_the_limit() -> None:
    held = backlog(b"a" * MAX_HELD)
    assert not held.is_to_pause
    held.hold(b"a")
    assert held.is_to_pause
    held.take(1)
    assert not held.is_to_pause


def test_reading_pauses_while_the_body_is_unwanted() -> None:
    held = backlog()
    held.is_body_unwanted = True
    assert held.is_to_pause
    held.is_body_unwanted = False
    assert not held.is_to_pause


def test_what_is_not_served_is_forgotten() -> None:
    held = backlog(b"abc", b"d")
    held.clear()
    assert held.size == 0
    held.hold(b"e")
    assert held.take(9) == b"e"
