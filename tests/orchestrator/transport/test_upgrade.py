"""What comes back on a connection that asks for another protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from orchestrator.transport.upgrade import CLOSED, SWITCHED, Upgrade

AGREED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: Ours/1\r\n\r\n"


@pytest.fixture
def asked() -> Iterator[Upgrade]:
    loop = asyncio.new_event_loop()
    yield Upgrade(b"GET / HTTP/1.1\r\n\r\n", b"ours/1", loop)
    loop.close()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_answer_may_come_in_pieces_and_more_behind_it(asked: Upgrade, size: int) -> None:
    sent = AGREED + b"frames"
    for at in range(0, len(sent), size):
        asked.data_received(sent[at : at + size])
    asked.data_received(b" and more")
    assert (asked.status.result(), asked.rest) == (SWITCHED, b"frames and more")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", 404),
        (b"HTTP/1.0 426 \r\n\r\n", 426),
        (b"HTTP/1.1 403\r\nx: y\r\n\r\n", 403),
        (AGREED.replace(b"Ours/1", b"Ours/2"), 500),
        (AGREED.replace(b"Upgrade: Ours", b"X-Upgrade: Ours"), 500),
        (b"HTTP/2 101 \r\nupgrade: ours/1\r\n\r\n", 500),
        (b"HTTP/1.1 1010 \r\nupgrade: ours/1\r\n\r\n", 500),
        (b"SSH-2.0-OpenSSH\r\n\r\n", 500),
        (b"HTTP/1.1 101 Switching Protocols\r\nx: " + b"y" * 16 * 1024, 500),
    ],
)
def test_any_other_answer_is_a_refusal(asked: Upgrade, answer: bytes, status: int) -> None:
    asked.data_received(answer)
    assert asked.status.result() == status


def test_a_connection_that_ends_without_an_answer(asked: Upgrade) -> None:
    asked.data_received(AGREED[:-1])
    asked.connection_lost(None)
    assert asked.status.result() == CLOSED
