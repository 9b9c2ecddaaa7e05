from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from bench.shared.bodies import small_chat
from bench.shared.mock_answers import END_BODIES, EVENT_BODY, NOT_FOUND_STATUS, PREFILLED
from bench.shared.mock_steps import Counts, Steps
from bench.shared.mock_streams import MockStreams, check_fits
from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    END,
    HEAD,
    MAX_PAYLOAD,
    OPEN,
    PING,
    RESET_CANCELLED,
    U16,
    U32,
    WINDOW,
    FrameReader,
    frame,
    reset,
)

Frame = tuple[int, bool, int, bytes]
POST = b"POST /v1/chat/completions\r\ncontent-type: application/json\r\n"
KV = small_chat(kv_transfer_params={"do_remote_decode": True})


class Written:
    """What is written is kept, write by write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.has_more = asyncio.Event()

    def write(self, data: bytes) -> None:
        self.writes.append(data)
        self.has_more.set()

    def is_closing(self) -> bool:
        return False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Only the protocol itself is tested."""

    def frames(self) -> list[Frame]:
        """Return all frames behind the answer to the upgrade."""
        found: list[Frame] = []
        stream = b"".join(self.writes).partition(b"\r\n\r\n")[2]
        FrameReader(lambda *one: found.append(one)).feed(stream)
        return found


class Worker:
    def __init__(self, events: int, gap_s: float = 0.0) -> None:
        self.counts = Counts()
        self.written = Written()
        self.connection = MockStreams(self.written, Steps(events, gap_s, self.counts), self.counts)

    def get(self, *frames: bytes) -> None:
        self.connection.data_received(b"".join(frames))

    async def wait_frames(self, count: int) -> list[Frame]:
        while len(found := self.written.frames()) < count:
            self.written.has_more.clear()
            await asyncio.wait_for(self.written.has_more.wait(), 30)
        return found


def asks(stream: int, body: bytes) -> bytes:
    return frame(OPEN, stream, POST) + frame(BODY | END, stream, body)


def run(events: int, gap_s: float, test: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
    async def with_worker() -> None:
        await test(Worker(events, gap_s))

    asyncio.run(with_worker())


def test_a_step_of_all_streams_leaves_in_one_write() -> None:
    async def test(worker: Worker) -> None:
        worker.get(*(asks(stream, small_chat(stream=True)) for stream in range(1, 9)))
        frames = await worker.wait_frames(8 * (1 + 2 + len(END_BODIES)))
        kinds = [kind for kind, *_ in frames]
        assert (kinds.count(HEAD), kinds.count(DATA)) == (8, 8 * (2 + len(END_BODIES)))
        assert [payload for _, _, stream, payload in frames if stream == 5][1:] == [
            *[EVENT_BODY] * 2,
            *END_BODIES,
        ]
        assert [stream for kind, is_last, stream, _ in frames if is_last] == [*range(1, 9)]
        assert len(worker.written.writes) == 3  # with the answer to the upgrade, and that is with the first
        assert (worker.counts.requests, worker.counts.events) == (8, 16)
        assert not worker.connection.under_way

    run(2, 0.01, test)


def test_requests_are_answered_as_in_http() -> None:
    async def test(worker: Worker) -> None:
        worker.get(asks(1, KV), frame(OPEN | END, 2, b"GET /nowhere\r\n"))
        prefill_head, prefill, not_found, _ = await worker.wait_frames(4)
        assert prefill == (DATA, True, 1, PREFILLED.body)
        assert U16.unpack_from(prefill_head[3])[0] == 200
        assert U16.unpack_from(not_found[3])[0] == NOT_FOUND_STATUS

    run(1, 0.0, test)


def test_large_bodies_get_credit_before_the_window_is_used_up() -> None:
    async def test(worker: Worker) -> None:
        whole = KV + b" " * (4 * WINDOW)
        pieces = [whole[at : at + MAX_PAYLOAD] for at in range(0, len(whole), MAX_PAYLOAD)]
        worker.get(frame(OPEN, 1, POST))
        for sent, piece in enumerate(pieces[:-1], start=1):
            worker.get(frame(BODY, 1, piece))
            await asyncio.sleep(0)
            given = sum(U32.unpack(one[3])[0] for one in worker.written.frames() if one[0] == CREDIT)
            assert MAX_PAYLOAD <= WINDOW + given - sent * MAX_PAYLOAD <= WINDOW
        worker.get(frame(BODY | END, 1, pieces[-1]))
        frames = await worker.wait_frames(len(worker.written.frames()) + 2)
        assert frames[-1] == (DATA, True, 1, PREFILLED.body)

    run(1, 0.0, test)


def test_a_stream_that_is_reset_gets_no_more_events() -> None:
    async def test(worker: Worker) -> None:
        worker.get(asks(1, small_chat(stream=True)), asks(2, small_chat(stream=True)))
        worker.get(reset(1, RESET_CANCELLED))
        frames = await worker.wait_frames(2 + 1 + 2 + len(END_BODIES))
        assert sum(stream == 1 for _, _, stream, _ in frames) == 2  # head and first event

    run(2, 0.01, test)


def test_a_ping_is_answered_with_its_bytes() -> None:
    async def test(worker: Worker) -> None:
        worker.get(frame(PING, 0, b"12345678"), frame(PING | END, 0, b"abcdefgh"))
        assert await worker.wait_frames(1) == [(PING, True, 0, b"12345678")]

    run(1, 0.0, test)


def test_streams_that_would_need_credit_are_refused_at_the_start() -> None:
    check_fits(64)
    with pytest.raises(ValueError, match="do not fit into a window of 262144 bytes"):
        check_fits(10_000)
