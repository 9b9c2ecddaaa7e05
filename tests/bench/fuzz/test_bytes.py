from __future__ import annotations

from random import Random

from bench.fuzz.__main__ import QUICK_SECONDS, arguments_of
from bench.fuzz.bytes import conversation


def sent(seed: int, count: int) -> list[bytes]:
    random = Random(seed)
    return [b"".join(conversation(random)) for _ in range(count)]


def test_a_seed_makes_the_same_bytes_again() -> None:
    assert sent(1, 50) == sent(1, 50)
    assert sent(1, 50) != sent(2, 50)


def test_some_are_right_and_some_are_not() -> None:
    found = sent(1, 300)
    assert len(set(found)) > 290
    assert any(b"RTSP/1.1" in data for data in found)
    assert any(b"HTTP/1.1\r\nHost: localhost\r\n" in data for data in found)


def test_a_quick_run_takes_less_than_a_minute() -> None:
    assert QUICK_SECONDS < 60
    assert arguments_of(["--quick", "--seed", "3"]).seed == 3
