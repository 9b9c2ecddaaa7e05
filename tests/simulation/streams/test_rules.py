from __future__ import annotations

import pytest

from orchestrator.wire.streams import (
    BODY,
    DATA,
    END,
    HEAD,
    LAST,
    LEAVE,
    OPEN,
    PING,
    RESET_CANCELLED,
    credit,
    frame,
    reset,
)
from tests.simulation.streams.rules import Rules

WINDOW = 10
ASK = b"GET /v1/baton/streams HTTP/1.1\r\nhost: a\r\n\r\n"
CONSENT = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: baton-streams/1\r\n\r\n"
OPENED = frame(OPEN | END, 1, b"GET /\n")


class Between:
    """Both ends; everything arrives, unless it is written alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rules = Rules(WINDOW, lambda: self.now)
        self.to_worker(ASK)
        self.to_client(CONSENT)

    def to_worker(self, data: bytes) -> None:
        self.rules.towards_worker.written(data)
        self.rules.towards_worker.read(data)

    def to_client(self, data: bytes) -> None:
        self.rules.towards_orchestrator.written(data)
        self.rules.towards_orchestrator.read(data)


def test_what_may_be_sent() -> None:
    between = Between()
    between.to_worker(frame(OPEN, 1, b"POST /\n") + frame(BODY, 1, bytes(WINDOW)))
    between.to_client(credit(1, 7))
    between.to_worker(frame(BODY | END, 1, bytes(7)))
    between.to_client(frame(HEAD, 1, b"\0\xc8") + frame(DATA, 1, bytes(4)))
    assert between.rules.not_over == [1]
    between.to_worker(credit(1, 4) + frame(LEAVE, 1) + frame(PING, 0, bytes(8)))
    between.to_client(frame(DATA | END, 1, bytes(10)) + frame(PING | END, 0, bytes(8)) + frame(LAST, 0))
    assert between.rules.problems == []
    assert between.rules.not_over == []
    assert between.rules.is_multiplexed
    assert not between.rules.is_http


FROM_CLIENT = {
    "a number twice": (OPENED + OPENED, "OPEN of stream 1 has a number that was used"),
    "number 0": (frame(OPEN, 0), "OPEN of stream 0 has a number that was used"),
    "too much": (
        frame(OPEN, 1) + frame(BODY, 1, bytes(WINDOW + 2)),
        "BODY of stream 1 is 2 bytes beyond the credit",
    ),
    "after the end": (OPENED + frame(BODY, 1, b"a"), "BODY of stream 1 comes after its END"),
    "after its reset": (
        frame(OPEN, 1) + reset(1, RESET_CANCELLED) + frame(BODY, 1, b"a"),
        "BODY of stream 1 comes after its own reset",
    ),
    "never opened": (frame(BODY, 3, b"a"), "BODY of stream 3 is for a stream that was never opened"),
    "credit for nothing": (OPENED + credit(1, 1), "CREDIT of stream 1 gives more credit than it has read"),
    "not its own": (OPENED + frame(DATA, 1), "DATA of stream 1 is not for this side to send"),
}


@pytest.mark.parametrize(("data", "problem"), FROM_CLIENT.values(), ids=FROM_CLIENT)
def test_what_the_orchestrator_may_not_send(data: bytes, problem: str) -> None:
    between = Between()
    between.to_worker(data)
    assert between.rules.problems == [problem]


FROM_WORKER = {
    "no head": (frame(DATA, 1, b"a"), "DATA of stream 1 comes before its head"),
    "two heads": (frame(HEAD, 1) + frame(HEAD, 1), "HEAD of stream 1 comes twice"),
    "too much": (
        frame(HEAD, 1) + frame(DATA, 1, bytes(WINDOW + 1)),
        "DATA of stream 1 is 1 bytes beyond the credit",
    ),
    "after the end": (frame(HEAD | END, 1) + frame(DATA, 1), "DATA of stream 1 comes after its END"),
    "unasked": (frame(HEAD, 2), "HEAD of stream 2 is for a stream that was never opened"),
    "ping": (frame(PING, 2, bytes(8)), "PING of stream 2 belongs to no stream"),
}


@pytest.mark.parametrize(("data", "problem"), FROM_WORKER.values(), ids=FROM_WORKER)
def test_what_a_worker_may_not_send(data: bytes, problem: str) -> None:
    between = Between()
    between.to_worker(OPENED)
    between.to_client(data)
    assert between.rules.problems == [problem]


def test_a_reset_counts_once_it_has_been_read() -> None:
    between = Between()
    between.to_worker(OPENED)
    between.rules.towards_worker.written(reset(1, RESET_CANCELLED))
    between.to_client(frame(HEAD, 1))
    assert between.rules.problems == []
    between.rules.towards_worker.read(reset(1, RESET_CANCELLED))
    between.to_client(frame(DATA, 1, b"a"))
    assert between.rules.problems == []
    between.now = 0.1
    between.to_client(frame(DATA, 1, b"a"))
    assert between.rules.problems == ["DATA of stream 1 comes after it has read a reset"]


def test_nothing_is_opened_after_the_last() -> None:
    between = Between()
    between.to_client(frame(LAST, 0))
    between.to_worker(OPENED)
    assert between.rules.problems == ["OPEN of stream 1 comes although the worker takes no more"]


def test_frames_wait_for_the_upgrade() -> None:
    rules = Rules(WINDOW, lambda: 0.0)
    rules.towards_worker.written(ASK + OPENED)
    assert rules.problems == ["frames are sent before the upgrade is accepted"]


def test_plain_http_is_none_of_its_business() -> None:
    rules = Rules(WINDOW, lambda: 0.0)
    rules.towards_worker.written(b"GET / HTTP/1.1\r\n\r\n")
    rules.towards_orchestrator.written(b"HTTP/1.1 200 OK\r\n\r\n")
    assert (rules.is_multiplexed, rules.is_http, rules.problems) == (False, True, [])
