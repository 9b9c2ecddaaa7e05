from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from bench.compare.held_streams import held_streams
from bench.shared.bodies import small_chat
from bench.shared.processes import Failed, free_port, python, running

pytestmark = pytest.mark.processes

HOUR = ("--events", "2", "--gap-ms", "3600000")


@pytest.fixture
def port() -> Iterator[int]:
    port = free_port()
    with running(python("-m", "bench.shared.mock_worker", "--port", str(port), *HOUR), port):
        yield port


async def hold(port: int, count: int) -> int:
    """Events that the worker has sent while the streams are held."""
    async with held_streams(port, small_chat(stream=True), count):
        answer = await asyncio.to_thread(httpx.get, f"http://127.0.0.1:{port}/mock/counts")
    return int(answer.json()["events"])


def test_every_stream_has_had_its_first_event(port: int) -> None:
    assert asyncio.run(hold(port, 150)) == 150


def test_streams_that_do_not_open_are_an_error(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.compare.held_streams.LIMIT_S", 0.0)
    with pytest.raises(Failed, match=r"of 3 streams open after 0 s$"):
        asyncio.run(hold(port, 3))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
            "a stream was refused: HTTP/1.1 503 Service Unavailable",
        ),
        (b"", "a stream was refused: closed"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\n\n", "a stream ended before its first event"),
    ],
)
def test_streams_that_are_refused_or_end_are_an_error(answer: bytes, reason: str) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]")
        writer.write(answer)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(respond, "127.0.0.1", 0)
        async with server, held_streams(server.sockets[0].getsockname()[1], small_chat(), 1):
            pass

    with pytest.raises(Failed) as failed:
        asyncio.run(main())
    assert str(failed.value) == reason
