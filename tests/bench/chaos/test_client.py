"""The clients of `make chaos`, in front of servers that answer as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from itertools import islice
from random import Random
from typing import Any

import pytest

from bench.chaos.client import FIGURES, End, Load, Result, ask, fetch, fetch_json, questions
from bench.shared.bodies import MODEL
from bench.shared.processes import Failed, free_port
from worker.sim.questions import Question, completion

Reply = Callable[[str], bytes]  # from the path of a request to bytes; none: the connection ends
QUESTION = completion("What is prefill?", 3, is_stream=False)
ERROR = {"error": {"message": "no", "type": "Unavailable", "code": 503}}


def response(document: object, status: int = 200) -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def whole(text: str) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": "length"}]}


RIGHT = response(whole(QUESTION.answer))


@asynccontextmanager
async def serving(reply: Reply) -> AsyncIterator[int]:
    """On a port of this machine, one answer per request."""

    open_connections: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer, reply))
        open_connections.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            await asyncio.gather(*open_connections)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reply: Reply) -> None:
    while (head := await read_head(reader)) and (answer := reply(head.split()[1].decode())):
        writer.write(answer)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """And the body, which is left out. Empty at the end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.rpartition(b": ")[2]))
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    return head


def answered(reply: Reply, *, asks_process: bool = False) -> Result:
    async def test() -> Result:
        async with serving(reply) as port:
            return await ask(port, QUESTION, asks_process=asks_process)

    return asyncio.run(test())


# --- one request --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "end"),
    [
        pytest.param(RIGHT, End.RIGHT, id="right"),
        pytest.param(response(ERROR, 503), End.ERROR, id="error"),
        pytest.param(response(whole("nonsense")), End.WRONG, id="wrong"),
        pytest.param(b"", End.CUT, id="cut"),
    ],
)
def test_an_answer_is_judged(reply: bytes, end: End) -> None:
    result = answered(lambda path: reply)
    assert result.end is end
    assert result.has_failed is bool(result.why) is (end is not End.RIGHT)
    assert result.began <= result.ended


def test_nobody_listens() -> None:
    assert asyncio.run(ask(free_port(), QUESTION)).end is End.REFUSED


def test_the_process_is_asked_on_the_same_connection() -> None:
    pages = {FIGURES: response({"pid": 77}), QUESTION.path: RIGHT}
    result = answered(pages.__getitem__, asks_process=True)
    assert (result.end, result.process) == (End.RIGHT, 77)


def test_a_connection_that_ends_before_its_process_is_known_is_cut() -> None:
    result = answered(lambda path: b"", asks_process=True)
    assert (result.end, result.process) == (End.CUT, None)


def fetched(get: Callable[[int, str], Coroutine[Any, Any, object]], reply: bytes) -> object:
    async def test() -> object:
        async with serving(lambda path: reply) as port:
            return await get(port, "/page")

    return asyncio.run(test())


def test_a_page_is_fetched() -> None:
    assert fetched(fetch_json, response({"a": 1})) == {"a": 1}


@pytest.mark.parametrize(
    ("get", "reply", "why"), [(fetch_json, response({}, 404), "HTTP 404"), (fetch, b"", "cut short")]
)
def test_a_page_that_is_not_there(get: Any, reply: bytes, why: str) -> None:
    with pytest.raises(Failed, match=f"/page on port .*{why}"):
        fetched(get, reply)


# --- many ---------------------------------------------------------------------------------------


def test_questions_are_of_all_kinds_and_the_same_for_a_seed() -> None:
    first, again = (list(islice(questions(Random(1), 5), 8)) for _ in range(2))
    assert first == again
    assert len({question.prompt for question in first}) == 8
    kinds = {(question.path, question.is_stream) for question in first}
    assert len(kinds) == 4
    assert {question.body["model"] for question in first} == {MODEL}


def run_load(asked: list[Question], during: Callable[[Load], Coroutine[Any, Any, None]]) -> Load:
    async def test() -> Load:
        async with serving(lambda path: RIGHT) as port:
            async with Load(port, asked, clients=2) as load:
                await during(load)
            return load

    return asyncio.run(test())


def test_all_questions_of_a_load_are_asked() -> None:
    async def nothing(load: Load) -> None:
        assert load.begun == 0

    load = run_load([QUESTION] * 5, nothing)
    assert [result.end for result in load.results] == [End.RIGHT] * 5
    assert (load.begun, load.open) == (5, 0)


def test_a_load_that_is_stopped_asks_no_more() -> None:
    async def stop(load: Load) -> None:
        await load.reach(3)
        load.stop()

    load = run_load([QUESTION] * 1000, stop)
    assert 3 <= len(load.results) == load.begun < 1000


def test_waiting_for_more_requests_than_there_are() -> None:
    with pytest.raises(Failed, match="only 2 requests have ended, not 3"):
        run_load([QUESTION] * 2, lambda load: load.reach(3))


def test_a_load_whose_block_fails_is_given_up() -> None:
    async def fail(load: Load) -> None:
        raise Failed("no")

    with pytest.raises(Failed, match="no"):
        run_load([QUESTION] * 1000, fail)
