"""Large forms go to their worker as they come in, on real sockets: who waits for whom, and who ends what."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.api.audio import PATHS
from orchestrator.api.upload import KEPT_BYTES
from orchestrator.http.limits import ServerLimits
from orchestrator.workers.states import WorkerState
from tests.orchestrator.api.test_one_leg import EVENTS
from tests.orchestrator.raw_http import LAX, Everywhere, RawClient, serving, until
from tests.orchestrator.raw_http import Site as Server
from tests.orchestrator.scripted import ScriptedWorker, Site, of_json, page
from tests.orchestrator.wire.test_forms import form

PATH = PATHS[0]
LIMITS = replace(LAX, uploads=frozenset(PATHS), max_upload_bytes=512 * 1024 * 1024, sweep_s=0.01)
TYPE = b"multipart/form-data; boundary=b0"
ANSWER = {"text": "hello"}
MODEL = ("model", b"m", "")
PIECE = 256 * 1024
Hear = Callable[["Worker", asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]


def speech(size: int) -> tuple[str, bytes, str]:
    return ("file", bytes(range(256)) * (size // 256), '; filename="a.wav"')


LARGE = speech(4 * KEPT_BYTES)


async def body_of(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """Read a request's body, however it is framed."""
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    length = fields.get(b"content-length")
    if length is not None:
        return await reader.readexactly(int(length))
    assert fields[b"transfer-encoding"] == b"chunked"
    pieces = []
    while size := int(await reader.readline(), 16):
        pieces.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return b"".join(pieces)


class Worker(ScriptedWorker):
    """It hears as a test says."""

    def __init__(self) -> None:
        super().__init__("decode")
        self.hear: Hear = Worker.listen
        self.heard: list[tuple[bytes, bytes]] = []  # heads and bodies
        self.begun = 0
        self.ended = asyncio.Event()  # a connection with a form has
        self.goes_on = asyncio.Event()

    async def listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        self.heard.append((head, await body_of(reader, head)))
        writer.write(of_json(ANSWER))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.transport.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                if path in PATHS:
                    self.begun += 1
                    try:
                        await self.hear(self, reader, writer, head)
                    finally:
                        self.ended.set()
                else:
                    writer.write(self._answer(path, await body_of(reader, head) if b"POST" in head else b""))


class World:
    def __init__(self, site: Site, workers: list[Worker], server: Server) -> None:
        self.site, self.workers, self.server = site, workers, server
        self.worker = workers[0]

    @property
    def seats_taken(self) -> int:
        return sum(known.in_flight for known in self.site.registry.workers)

    async def wait_rest(self) -> None:
        """Nothing is open, and nothing held."""
        plane, gate = self.site.core.data_plane, self.site.core.flow._routes["m"].gate
        await until(lambda: not plane.open)
        await until(lambda: not self.seats_taken and gate.free == gate.seats)
        assert plane.held.bodies == plane.held.incoming == 0


@contextlib.asynccontextmanager
async def world(count: int = 1, limits: ServerLimits = LIMITS, **options: Any) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        workers = [Worker() for _ in range(count)]
        for worker in workers:
            await worker.serve(stack)
        site = Site([*workers], {}, None)
        site.prober.start()
        stack.push_async_callback(site.aclose)
        for worker in workers:
            await site.wait_state(worker, WorkerState.READY)
        plane = site.core.data_plane
        server = await stack.enter_async_context(serving(Everywhere(plane.handle), limits))
        server.protocol.shared.held = plane.held
        made = World(site, workers, server)
        yield made
        await made.wait_rest()


def run(test: Callable[[World], Awaitable[None]], count: int = 1, limits: ServerLimits = LIMITS) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), world(count, limits) as made:
            await test(made)

    asyncio.run(main())


def head_of(framing: bytes, *more: bytes) -> bytes:
    lines = [b"POST %b HTTP/1.1" % PATH.encode(), b"Host: a", b"Content-Type: " + TYPE, framing, *more]
    return b"\r\n".join([*lines, b"", b""])


def sized(body: bytes, *more: bytes) -> bytes:
    return head_of(b"Content-Length: %d" % len(body), *more) + body


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def in_chunks(body: bytes, size: int = 100_000) -> bytes:
    framed = b"".join([chunk(body[at : at + size]) for at in range(0, len(body), size)])
    return head_of(b"Transfer-Encoding: chunked") + framed + chunk(b"")


@pytest.mark.parametrize("framed", [sized, in_chunks])
@pytest.mark.parametrize("order", [(MODEL, LARGE), (LARGE, MODEL), (LARGE,)])
def test_a_large_form_reaches_one_worker_as_it_is(framed: Any, order: Any) -> None:
    body = form(*order, ("language", b"en", ""))

    async def test(at: World) -> None:
        for _ in range(2):
            answer = await at.server.ask(framed(body))
            assert (answer.status, answer.json()) == (200, ANSWER)
        for head, heard in at.worker.heard:
            assert heard == body
            assert (b"content-length" in head) == (framed is sized)
            assert head.count(b"content-type: " + TYPE) == 1

    run(test)


def test_a_connection_serves_one_large_form_after_the_other() -> None:
    body = form(LARGE, MODEL)

    async def test(at: World) -> None:
        async with at.server.client() as client:
            for framed in (sized(body), in_chunks(body), sized(body)):
                answer = await client.ask(framed)
                assert (answer.status, answer.closes) == (200, False)
        assert [heard for _, heard in at.worker.heard] == [body] * 3

    run(test)


@pytest.mark.parametrize("order", [(MODEL, LARGE), (LARGE, MODEL)])
def test_the_worker_gets_its_own_name_of_the_model(order: Any) -> None:
    async def test(at: World) -> None:
        known = at.site.known(at.worker)
        known.address = replace(known.address, served_model="own/name")
        assert (await at.server.ask(sized(form(*order)))).status == 200
        ((head, heard),) = at.worker.heard
        renamed = form(*[("model", b"own/name", "") if field is MODEL else field for field in order])
        assert heard == renamed
        assert (b"content-length: %d\r\n" % len(renamed) in head) == (order[0] is MODEL)

    run(test)


def test_an_answer_may_be_a_stream_though_that_is_said_last() -> None:
    async def hear(
        worker: Worker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
    ) -> None:
        await body_of(reader, head)
        writer.write(page(EVENTS, fields="content-type: text/event-stream\r\n"))

    async def test(at: World) -> None:
        at.worker.hear = hear
        answer = await at.server.ask(sized(form(LARGE, ("stream", b"true", ""))))
        assert (answer.status, answer.body) == (200, EVENTS)
        assert answer.headers["transfer-encoding"] == "chunked"

    run(test)


def test_a_client_that_waits_for_100_is_told_to_go_on() -> None:
    async def test(at: World) -> None:
        body = form(MODEL, LARGE)
        async with at.server.client() as client:
            client.send(head_of(b"Content-Length: %d" % len(body), b"Expect: 100-continue"))
            assert (await client.answer()).status == 100
            assert (await client.ask(body)).json() == ANSWER

    run(test)


# --- who waits for whom ---------------------------------------------------------------------------


def test_a_worker_that_takes_nothing_keeps_the_client_from_sending() -> None:
    body = form(MODEL, speech(64 * 1024 * 1024))

    async def hear(
        worker: Worker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
    ) -> None:
        await worker.goes_on.wait()
        await worker.listen(reader, writer, head)

    async def test(at: World) -> None:
        at.worker.hear = hear
        async with at.server.client() as client:
            client.send(sized(body))
            await until(lambda: at.worker.begun == 1)
            (scope,) = at.site.core.data_plane.open
            seen = -1
            while seen != scope.exchange.body_size:  # until no more comes
                seen = scope.exchange.body_size
                await asyncio.sleep(0.2)
            assert seen < 16 * 1024 * 1024  # with what the kernel has
            assert at.site.core.data_plane.held.size < 2 * 1024 * 1024
            at.worker.goes_on.set()
            assert (await client.answer()).json() == ANSWER
        assert at.worker.heard[0][1] == body

    run(test)


# --- who is refused, and what has ended then ------------------------------------------------------


async def ask_beginning(at: World, client: RawClient, *more: bytes) -> None:
    """Send more than is kept of a large form, and wait until the worker has a part of it."""
    client.send(head_of(b"Content-Length: 100000000", *more) + form(MODEL, LARGE)[:-8])
    await until(lambda: at.worker.begun == 1)


def test_a_client_that_leaves_ends_the_leg() -> None:
    async def test(at: World) -> None:
        for way in (RawClient.reset, RawClient.half_close):
            at.worker.begun = 0
            at.worker.ended.clear()
            async with at.server.client() as client:
                await ask_beginning(at, client)
                way(client)
                await at.worker.ended.wait()
                await at.wait_rest()
        assert not at.worker.heard

    run(test)


def test_a_client_that_leaves_is_missed_though_nothing_is_read() -> None:
    async def hear(worker: Worker, *streams: Any) -> None:
        await worker.goes_on.wait()

    async def test(at: World) -> None:
        at.worker.hear = hear
        async with at.server.client() as client:
            client.send(sized(form(MODEL, speech(64 * 1024 * 1024))))
            (connection,) = await connections(at)
            await until(lambda: connection._reader.is_paused)
            assert at.seats_taken == 1
            client.reset()
            await at.wait_rest()
        at.worker.goes_on.set()

    run(test)


async def connections(at: World) -> list[Any]:
    await until(lambda: at.worker.begun == 1)
    return list(at.server.state.connections)


def test_a_client_that_is_too_slow_is_told_so() -> None:
    async def test(at: World) -> None:
        async with at.server.client() as client:
            await ask_beginning(at, client)
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (408, "request_timeout")
            assert answer.closes
        await at.worker.ended.wait()
        assert at.site.known(at.worker).state is WorkerState.READY

    run(test, limits=replace(LIMITS, body_idle_timeout_s=0.2))


def test_a_deadline_is_one_for_uploads_too() -> None:
    async def test(at: World) -> None:
        async with at.server.client() as client:
            await ask_beginning(at, client, b"x-request-timeout: 0.3")
            plane = at.site.core.data_plane
            while plane.open:
                plane_now = plane.time()
                for scope in tuple(plane.open):
                    scope.sweep(plane_now)
                await asyncio.sleep(0.01)
            answer = await client.answer()
            assert (answer.status, answer.headers["x-should-retry"]) == (504, "false")
            assert answer.closes
        await at.worker.ended.wait()

    run(test)


@pytest.mark.parametrize("framed", [sized, in_chunks])
def test_a_form_that_is_too_large_is_refused(framed: Any) -> None:
    async def test(at: World) -> None:
        answer = await at.server.ask(framed(form(MODEL, speech(22 * 1024 * 1024))))
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert answer.closes
        assert at.worker.begun == (framed is in_chunks)
        assert not at.worker.heard
        assert (await at.server.ask(framed(form(MODEL, speech(18 * 1024 * 1024))))).status == 200

    run(test, limits=replace(LIMITS, max_upload_bytes=20 * 1024 * 1024))


@pytest.mark.parametrize(
    ("field", "status", "param"),
    [
        (("kv_transfer_params", b"{}", ""), 400, "kv_transfer_params"),
        (("vllm_xargs", b'{"kv_transfer_params":""}', ""), 400, "vllm_xargs"),
        (("stream", b"perhaps", ""), 400, "stream"),
        (("model", b"other", ""), 404, "model"),
        (("model", b"\xff", ""), 400, None),
    ],
)
def test_what_no_client_may_say_is_not_said_late(field: Any, status: int, param: str | None) -> None:
    async def test(at: World) -> None:
        answer = await at.server.ask(sized(form(LARGE, field)))
        assert (answer.status, answer.error["param"]) == (status, param)
        await at.worker.ended.wait()
        assert not at.worker.heard
        assert at.site.known(at.worker).state is WorkerState.READY

    run(test)


def test_a_form_without_an_end_is_refused() -> None:
    async def test(at: World) -> None:
        answer = await at.server.ask(sized(form(MODEL, LARGE)[:-6]))
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")
        await at.worker.ended.wait()
        assert not at.worker.heard

    run(test)


def test_where_models_have_several_names_the_form_is_kept_until_it_has_said_one() -> None:
    async def test(at: World) -> None:
        at.site.core.flow.rename({"ears": "m"})
        named = ("model", b"ears", "")
        assert (await at.server.ask(sized(form(LARGE, named)))).status == 200
        ((head, heard),) = at.worker.heard
        assert heard == form(LARGE, MODEL)
        assert b"content-length: %d\r\n" % len(heard) in head
        answer = await at.server.ask(sized(form(speech(20 * 1024 * 1024), named)))
        assert (answer.status, answer.error["param"]) == (400, "model")
        assert at.worker.begun == 1

    run(test)


# --- workers that do not hear to the end ----------------------------------------------------------


@pytest.mark.parametrize("status", ["413 Content Too Large", "400 Bad Request"])
def test_a_worker_that_refuses_early_is_believed(status: str) -> None:
    async def hear(
        worker: Worker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
    ) -> None:
        await reader.readexactly(1000)
        writer.write(of_json({"error": {"message": "no", "type": "BadRequestError"}}, status))
        await writer.drain()
        while await reader.read(65536):
            pass

    async def test(at: World) -> None:
        at.worker.hear = hear
        async with at.server.client() as client:
            client.send(sized(form(MODEL, speech(64 * 1024 * 1024))))
            answer = await client.answer()
            assert (answer.status, answer.error["message"]) == (int(status[:3]), "no")
            assert answer.closes
        await at.worker.ended.wait()
        assert at.site.known(at.worker).state is WorkerState.READY

    run(test)


async def hang_up(
    worker: Worker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
) -> None:
    await reader.readexactly(1000)
    if worker.goes_on.is_set():
        await reader.readexactly(3 * KEPT_BYTES)
    writer.transport.abort()


def test_a_worker_that_is_lost_in_the_middle_ends_the_request() -> None:
    async def test(at: World) -> None:
        for worker in at.workers:
            worker.hear = hang_up
            worker.goes_on.set()
        async with at.server.client() as client:
            answer = await client.ask(sized(form(MODEL, LARGE) + b"\r\n" * 10_000_000))
            assert (answer.status, answer.error["code"]) == (502, "upload_lost")
            assert "x-should-retry" not in answer.headers
        assert sum(worker.begun for worker in at.workers) == 1

    run(test, count=2)


@pytest.mark.parametrize("rest_size", [0, 2 * KEPT_BYTES])
def test_what_is_kept_is_sent_to_another_worker(rest_size: int) -> None:
    rest = form(speech(rest_size), MODEL) if rest_size else b""
    beginning = form(speech(KEPT_BYTES))
    body = beginning[: -len(b"--b0--\r\n")] + rest if rest else beginning

    async def test(at: World) -> None:
        first_lost = asyncio.Event()

        async def lose(worker: Worker, *streams: Any) -> None:
            for other in at.workers:
                other.hear = Worker.listen
            await hang_up(worker, *streams)
            first_lost.set()

        for worker in at.workers:
            worker.hear = lose
        async with at.server.client() as client:
            client.send(head_of(b"Transfer-Encoding: chunked") + chunk(body[: len(body) - len(rest)]))
            await first_lost.wait()
            answer = await client.ask((chunk(rest) if rest else b"") + chunk(b""))
            assert (answer.status, answer.json()) == (200, ANSWER)
        assert [heard for worker in at.workers for _, heard in worker.heard] == [body]

    run(test, count=2)
