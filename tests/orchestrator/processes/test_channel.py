from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import msgspec

from orchestrator.config.keys import Key
from orchestrator.processes.channel import (
    Channel,
    Cut,
    Replaced,
    ServingBegun,
    Start,
    Stop,
    ToProcess,
    ToSupervisor,
)
from orchestrator.processes.membership import Report, Snapshot
from orchestrator.processes.sharing import Note, Shared
from orchestrator.wire.info import WorkerInfo
from orchestrator.workers.snapshot import WorkerSnapshot
from orchestrator.workers.states import Event, WorkerState
from tests.orchestrator.cluster import address

Ends = Callable[[Channel[ToSupervisor], Channel[ToProcess]], Awaitable[None]]

WORKER = WorkerSnapshot(
    address=address("decode", 0),
    slot=2,
    state=WorkerState.READY,
    epoch=3,
    is_drained=False,
    warm_from=float("-inf"),
    info=WorkerInfo(role="decode", model="m", decodes=["json"], engine="sim", engine_version="1"),
    max_model_len=4096,
    last_error=None,
)
START = Start(
    index=1,
    row=2,
    rows=5,
    row_size=64,
    slots=65,
    config=b"{}",
    transport="json",
    started=1.5,
    keys=[Key("alice", b"digest")],
    snapshot=Snapshot(1, (WORKER,)),
)


def over_a_socketpair(scenario: Ends) -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        supervisor = await Channel.open(ours, msgspec.msgpack.Decoder(ToSupervisor))
        process = await Channel.open(theirs, msgspec.msgpack.Decoder(ToProcess))
        try:
            await scenario(supervisor, process)
        finally:
            supervisor.close()
            process.close()

    asyncio.run(run())


def test_messages_arrive_whole_and_in_order() -> None:
    down = [START, Snapshot(2, (WORKER,) * 5000), Replaced(), Stop(), Cut()]
    up = [ServingBegun(), Report("m/decode/0", 3, Event.REFUSED, "refused")]

    async def scenario(supervisor: Channel[ToSupervisor], process: Channel[ToProcess]) -> None:
        for message in down:
            supervisor.send(message)
        for message in up:
            process.send(message)
        assert [await process.receive() for _ in down] == down
        assert [await supervisor.receive() for _ in up] == up

    over_a_socketpair(scenario)


def test_the_end_of_the_other_side_is_told() -> None:
    async def scenario(supervisor: Channel[ToSupervisor], process: Channel[ToProcess]) -> None:
        supervisor.send(Stop())
        supervisor.close()
        assert await process.receive() == Stop()
        assert await process.receive() is None

    over_a_socketpair(scenario)


def test_an_end_in_the_middle_of_a_message_is_an_end() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        process = await Channel.open(theirs, msgspec.msgpack.Decoder(ToProcess))
        with ours:
            ours.sendall((100).to_bytes(4, "big") + b"not all")
        assert await process.receive() is None
        process.close()

    asyncio.run(run())


def test_nothing_happens_when_nobody_is_there_to_be_told() -> None:
    async def scenario(supervisor: Channel[ToSupervisor], process: Channel[ToProcess]) -> None:
        process.close()
        assert await supervisor.receive() is None
        for _ in range(100):
            supervisor.send(Stop())
            await supervisor.drain()

    over_a_socketpair(scenario)


def test_an_offer_is_dropped_if_the_other_side_does_not_read() -> None:
    offered = Shared([Note("m", "prefill", bytes(100_000))])

    async def scenario(supervisor: Channel[ToSupervisor], process: Channel[ToProcess]) -> None:
        for _ in range(200):
            supervisor.offer(offered)
        supervisor.send(Stop())
        count = 0
        while (message := await process.receive()) != Stop():
            assert message == offered
            count += 1
        assert 10 <= count < 60
        supervisor.offer(offered)
        assert await process.receive() == offered

    over_a_socketpair(scenario)
