from __future__ import annotations

import asyncio
from typing import Any

import pytest

from orchestrator.errors import ClientError, ClientGone, RequestTimeout
from orchestrator.http.body import HIGH_WATER, MAX_PIECES, Body
from orchestrator.http.carrier import Carrier
from tests.orchestrator.raw_http import run, until

__all__ = ["run"]  # fixture

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
pytestmark = pytest.mark.pure  # extends Carrier


class Connection(Carrier):
    """Notes what a body asks of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.write = self.asked.append  # type: ignore[assignment]

    def pause_reading(self) -> None:
        self.asked.append("pause")

    def resume_reading(self) -> None:
        self.asked.append("resume")

    def await_whole_body(self) -> None:
        self.asked.append("whole body")

    def answered(self) -> None:
        raise NotImplementedError

    def cut(self, *, resets: bool) -> None:
        raise NotImplementedError


def body(*, awaits_continue: bool = False) -> tuple[Body, list[Any]]:
    connection = Connection()
    return Body(connection, awaits_continue), connection.asked


def read(made: Body, *, is_answered: bool = False) -> bytes:
    """Of a body for which nobody has to wait."""
    return asyncio.run(made.read(is_answered))


async def reading(made: Body) -> asyncio.Task[bytes]:
    task = asyncio.create_task(made.read(is_answered=False))
    await until(lambda: made.waiters is not None)
    return task


def test_a_body_that_is_there_is_read_without_asking_for_it() -> None:
    made, asked = body()
    for piece in (b"ab", b"c"):
        made.take(piece)
    made.end()
    assert read(made) == b"abc"
    assert asked == []


def test_a_body_is_read_once() -> None:
    made, _ = body()
    made.end()
    assert read(made) == b""
    with pytest.raises(RuntimeError, match="read before"):
        read(made)


def test_a_body_that_is_still_to_come_is_asked_for_and_waited_for(run: Any) -> None:
    async def main() -> None:
        made, asked = body()
        made.take(b"a")
        task = await reading(made)
        made.take(b"b")
        assert not task.done()
        made.end()
        assert await task == b"ab"
        assert asked == ["resume"]

    run(main)


def test_a_client_that_waits_for_it_is_told_to_go_on_once(run: Any) -> None:
    async def main() -> None:
        made, asked = body(awaits_continue=True)
        task = await reading(made)
        assert asked == [CONTINUE, "whole body", "resume"]
        assert not made.awaits_continue
        made.end()
        assert await task == b""

    run(main)


def test_a_client_is_not_told_to_go_on_behind_an_answer_or_a_piece_of_the_body() -> None:
    made, asked = body(awaits_continue=True)
    made.want(is_answered=True)
    assert made.awaits_continue
    made.take(b"a")
    made.want(is_answered=False)
    assert asked == ["resume", "resume"]


def test_more_pieces_than_are_worth_an_object_each_are_joined(run: Any) -> None:
    async def main() -> None:
        made, _ = body()
        task = await reading(made)
        for _ in range(2 * MAX_PIECES + 3):
            made.take(b"ab")
        assert len(made.pieces) == 1
        made.end()
        assert await task == b"ab" * (2 * MAX_PIECES + 3)

    run(main)


@pytest.mark.parametrize("whole", [True, False])
def test_reading_stops_above_the_high_water_mark_unless_the_whole_is_wanted(whole: bool, run: Any) -> None:
    async def main() -> None:
        made, asked = body()
        task = await reading(made) if whole else None
        asked.clear()
        made.take(b"a" * HIGH_WATER)
        assert asked == []
        made.take(b"a")
        assert asked == ([] if whole else ["pause"])
        made.end()
        if task is not None:
            await task

    run(main)


def test_piece_by_piece() -> None:
    made, asked = body()
    made.take(b"a" * HIGH_WATER)
    assert made.read_piece() == b"a" * HIGH_WATER
    assert made.read_piece() == b""
    made.take(b"b")
    made.take(b"c")
    assert made.read_piece() == b"bc"
    assert asked == []


def test_who_waits_for_pieces_is_woken_by_each_and_by_the_end(run: Any) -> None:
    async def main() -> None:
        made, _ = body()
        for happen in (lambda: made.take(b"a"), made.end, made.leave, lambda: made.fail(ClientError("no"))):
            waiting = asyncio.create_task(made.wait())
            await asyncio.sleep(0)
            happen()
            await waiting

    run(main)


def test_the_first_failure_is_the_readers(run: Any) -> None:
    async def main() -> None:
        made, _ = body()
        task = await reading(made)
        made.take(b"a")
        made.fail(RequestTimeout("slow"))
        made.fail(ClientError("later"))
        made.leave()
        with pytest.raises(RequestTimeout, match="slow"):
            await task
        assert made.is_discarding
        assert made.pieces == []

    run(main)


def test_a_client_that_leaves_takes_only_what_is_not_whole_with_it(run: Any) -> None:
    async def main() -> None:
        made, _ = body()
        task = await reading(made)
        made.leave()
        with pytest.raises(ClientGone):
            await task

    run(main)
    whole, _ = body()
    whole.take(b"abc")
    whole.end()
    whole.leave()
    assert read(whole) == b"abc"


def test_what_nobody_will_read_is_not_kept() -> None:
    made, asked = body()
    made.take(b"a")
    made.discard()
    made.take(b"b" * (HIGH_WATER + 1))
    made.end()
    assert made.pieces == []
    assert asked == []
    assert made.is_received
