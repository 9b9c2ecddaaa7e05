from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice, repeat
from random import Random

import pytest

from bench.shared.processes import Failed, free_port
from bench.soak.load import Answer, Cancel, Connection, Kind, Phase, Request, Tally, kinds, run_load, schedule

KINDS = {kind.name: kind for kind in kinds()}
CHAT, STREAM = KINDS["chat"], KINDS["stream"]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


# --- the requests -------------------------------------------------------------------------------


def test_a_seed_gives_the_same_requests_again() -> None:
    first, second = (list(islice(schedule(Random(5), 0.1), 500)) for _ in range(2))
    assert first == second
    assert first != list(islice(schedule(Random(6), 0.1), 500))


def test_all_kinds_and_phases_occur_in_their_shares() -> None:
    drawn = list(islice(schedule(Random(1), 0.1), 10_000))
    cancels = [request.cancel for request in drawn if request.cancel]
    assert {request.kind for request in drawn} == set(KINDS.values())
    assert {cancel.phase for cancel in cancels} == set(Phase)
    assert {cancel.is_reset for cancel in cancels} == {True, False}
    assert 800 < len(cancels) < 1200
    assert 800 < sum(request.needs_connection for request in drawn) < 1200


def test_large_bodies_have_64_kilobytes() -> None:
    assert 60_000 < len(KINDS["64 KB chat"].body) < 70_000


# --- what is counted ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answer", "problem"),
    [
        (CHAT, Answer(200, b'"usage":{}}'), None),
        (STREAM, Answer(200, b"data: [DONE]\n\n"), None),
        (KINDS["bad JSON"], Answer(400, b"}"), None),
        (CHAT, Answer(502, b"}"), "chat: HTTP 502 }"),
        (KINDS["bad JSON"], Answer(200, b"}"), "bad JSON: HTTP 200 }"),
        (STREAM, Answer(200, b"data: {}\n\n"), "stream: ends with b'data: {}\\n\\n'"),
    ],
)
def test_an_answer_must_be_what_its_kind_asks_for(kind: Kind, answer: Answer, problem: str | None) -> None:
    assert answer.problem(kind) == problem


def test_tally_tells_cancelled_from_cut_short() -> None:
    tally = Tally()
    leaving = Request(CHAT, False, Cancel(Phase.WAITING, 0.0, False))
    tally.note(leaving, None)
    tally.note(leaving, Answer(200, b"}"))  # too late to leave
    tally.note(Request(CHAT, False, None), None)
    assert tally.cancelled == {Phase.WAITING: 1}
    assert tally.answered == {"chat": 1}
    assert tally.problems == {"chat: cut short": 1}
    assert tally.requests == 3


# --- on the wire --------------------------------------------------------------------------------


class Server:
    """Answers each request; notes what came before a client left."""

    def __init__(self, answer: bytes = OK) -> None:
        self.answer = answer
        self.begun: asyncio.Queue[int] = asyncio.Queue()  # bytes of no whole request, per connection

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = b""
        with suppress(ConnectionResetError):
            while data := await reader.read(1 << 20):
                received += data
                while len(received) >= len(CHAT.encode()):
                    received = received[len(CHAT.encode()) :]
                    writer.write(self.answer)
        self.begun.put_nowait(len(received))
        writer.close()


async def _load(
    server: Server, requests: Iterator[Request], count: int, clients: int = 1
) -> tuple[Tally, list[int]]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        tally = await run_load(port, requests, count=count, clients=clients, on_end=lambda tally: None)
        return tally, [await server.begun.get() for _ in range(tally.connections)]


def load(server: Server, request: Request, count: int, clients: int = 1) -> Tally:
    return asyncio.run(_load(server, repeat(request), count, clients))[0]


def test_connections_are_kept() -> None:
    tally = load(Server(), Request(CHAT, False, None), count=20, clients=2)
    assert (tally.answered, tally.connections) == ({"chat": 20}, 2)


def test_a_request_may_want_a_connection_of_its_own() -> None:
    assert load(Server(), Request(CHAT, True, None), count=5).connections == 5


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_client_leaves_while_it_sends(is_reset: bool) -> None:
    leaving = repeat(Request(CHAT, False, Cancel(Phase.SENDING, 0.5, is_reset)))
    tally, begun = asyncio.run(_load(Server(), leaving, count=3))
    assert (tally.cancelled, tally.connections) == ({Phase.SENDING: 3}, 3)
    assert max(begun) <= len(CHAT.encode()) // 2


class HastyTransport(asyncio.Transport):
    """A server that answers as soon as anything comes."""

    def __init__(self, client: Connection) -> None:
        super().__init__()
        self._client = client

    def write(self, data: object) -> None:
        self._client.data_received(OK)

    def is_closing(self) -> bool:
        return False


@pytest.mark.parametrize(("phase", "is_open"), [(Phase.SENDING, False), (Phase.WAITING, True)])
def test_a_connection_is_not_used_again_after_half_a_request(phase: Phase, is_open: bool) -> None:
    async def main() -> None:
        connection = Connection()
        connection.connection_made(HastyTransport(connection))
        assert await connection.ask(CHAT.encode(), Cancel(phase, 0.5, False)) == Answer(200, b"{}")
        assert connection.is_open is is_open

    asyncio.run(main())


def test_a_client_leaves_while_it_waits() -> None:
    tally = load(Server(answer=b""), Request(CHAT, False, Cancel(Phase.WAITING, 0.0, False)), count=3)
    assert tally.cancelled == {Phase.WAITING: 3}


def test_a_client_leaves_while_it_reads() -> None:
    half = Server(answer=OK[:20])
    tally = load(half, Request(CHAT, False, Cancel(Phase.READING, 10, False)), count=3)
    assert tally.cancelled == {Phase.READING: 3}


def test_a_client_that_would_leave_after_the_answer_is_answered() -> None:
    tally = load(Server(), Request(CHAT, False, Cancel(Phase.READING, 1000, False)), count=3)
    assert (tally.answered, tally.connections) == ({"chat": 3}, 1)


def test_an_answer_that_closes_is_followed_by_a_new_connection() -> None:
    closing = Server(OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    assert load(closing, Request(CHAT, False, None), count=3).connections == 3


def test_silence_ends_the_load() -> None:
    async def main() -> None:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            requests = repeat(Request(CHAT, False, None))
            await run_load(port, requests, count=1, clients=1, on_end=lambda tally: None, stall_s=0.0)

    with pytest.raises(Failed, match=r"^no request has ended for 0 s, 0 before$"):
        asyncio.run(main())


def test_nobody_who_listens_ends_the_load() -> None:
    load = run_load(free_port(), schedule(Random(1), 0.1), count=1, clients=1, on_end=lambda tally: None)
    with pytest.raises(Failed, match=r"^cannot connect after 0 requests: "):
        asyncio.run(load)
