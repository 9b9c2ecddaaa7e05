from __future__ import annotations

import asyncio
from typing import Any

import pytest

from worker.load import FORGET_S, MOST_SENDERS, Figures, LegCounting, LoadMeter, Sender

US, THEM = Sender(b"us", b""), Sender(b"them", b"")


class Engine:
    def __init__(self) -> None:
        self.asked: list[int | None] = []
        self.figures = Figures(running=2, waiting=1, prompt_tokens=30, kv=0.25, seats=8)

    def __call__(self, rank: int | None) -> Figures:
        self.asked.append(rank)
        return self.figures


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def metered(**options: Any) -> tuple[LoadMeter, Clock]:
    clock = Clock()
    return LoadMeter(Engine(), "r1", clock=clock, **options), clock


def test_each_orchestrator_is_told_what_the_others_have_there() -> None:
    meter, _ = metered()
    for sender, legs in ((US, 3), (THEM, 2), (Sender(b"", b""), 1)):
        for _ in range(legs):
            meter.begin(sender)
    assert meter.report(US).others == 3
    assert meter.report(THEM).others == 4
    assert meter.report(Sender(b"", b"")).others == 5
    meter.end(US)
    assert meter.report(THEM).others == 3
    assert (meter.report(US).running, meter.report(US).waiting) == (2, 3)  # five legs, three in the engine


def test_legs_that_the_engine_has_not_do_not_count_in_the_header_of_the_last() -> None:
    meter, _ = metered()
    for _ in range(4):
        meter.begin(US)
    meter.note_asked(US)
    meter.note_asked(THEM)
    assert meter.header(US) == b"0,2,1,30,250,8,2"
    assert meter.header(THEM) == b"4,2,1,30,250,8,2"


def test_an_engine_of_several_is_asked_for_by_its_rank() -> None:
    meter, _ = metered()
    meter.begin(Sender(b"them", b"0"))
    meter.begin(Sender(b"them", b"1"))
    assert meter.report(Sender(b"us", b"1")).others == 1
    assert meter.report(Sender(b"us", b"")).others == 2
    assert Sender.of([(b"x-baton-from", b"a" * 99), (b"x-data-parallel-rank", b"x")]) == (b"a" * 64, b"")


def test_a_process_of_several_does_not_say_whose_legs_there_are() -> None:
    meter, _ = metered(is_whole=False)
    meter.begin(THEM)
    report = meter.report(US)
    assert (report.others, report.senders) == (None, None)
    assert meter.header(US) == b",2,1,30,250,8,"


def test_draining_waits_for_those_who_may_still_send() -> None:
    meter, clock = metered()
    meter.note_asked(US)
    meter.note_asked(THEM)
    clock.now += 1
    meter.drain()
    assert meter.report(US).state == "draining"
    assert meter.report(US).unaware == 2
    clock.now += 1
    meter.drain()  # again changes nothing
    meter.note_asked(US)
    assert meter.report(US).unaware == 1
    clock.now += FORGET_S  # they are not there any more
    assert meter.report(US).unaware == 0
    meter.undrain()
    assert meter.report(US).state == "serving"


def test_whoever_names_itself_anew_each_time_takes_no_memory() -> None:
    meter, _ = metered()
    for number in range(10 * MOST_SENDERS):
        meter.note_asked(Sender(b"%d" % number, b""))
    senders = meter.report(US).senders
    assert senders is not None
    assert senders <= MOST_SENDERS + 1


def test_only_legs_are_counted_and_their_answers_tell_the_load() -> None:
    meter, _ = metered()
    seen: list[int | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(meter.report(THEM).others)
        headers = (
            [(b"Content-Type", b"text/event-stream; charset=utf-8")] if "stream" in scope["path"] else []
        )
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["path"].endswith("broken"):
            raise ConnectionError

    async def asked(method: str, path: str, *headers: tuple[bytes, bytes]) -> list[Any]:
        sent: list[Any] = []
        scope = {"type": "http", "method": method, "path": path, "headers": headers}

        async def send(message: Any) -> None:
            sent.append(message)

        await LegCounting(app, lambda: meter)(scope, None, send)  # type: ignore[arg-type]
        return list(sent[0]["headers"])

    ours = (b"x-baton-from", b"us")
    load = (b"x-baton-load", b"0,2,1,30,250,8,1")
    assert asyncio.run(asked("POST", "/v1/chat/completions", ours)) == [load]
    assert asyncio.run(asked("POST", "/v1/chat/completions")) == []  # a client's own
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/baton/end"), ("POST", "/tokenize")):
        assert asyncio.run(asked(method, path, ours)) == []
    assert len(asyncio.run(asked("POST", "/v1/stream", ours))) == 1
    with pytest.raises(ConnectionError):
        asyncio.run(asked("POST", "/v1/broken", ours))
    assert seen == [1, 1, 0, 0, 0, 1, 1]
    assert meter.report(THEM).others == 0
