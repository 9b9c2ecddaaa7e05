"""What this machine lacks says nothing about a worker."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import httpx
import pytest

from orchestrator.errors import OutOfResources, WorkerUnreachable
from orchestrator.transport import shortage
from orchestrator.transport.base import Origin
from orchestrator.transport.pool import PooledUpstream
from orchestrator.transport.shortage import is_shortage
from tests.orchestrator.transport.harness import PeerConnection, fixed, get, peer, replies, scenario


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


OURS = {
    "descriptors of the process": OSError(errno.EMFILE, "Too many open files"),
    "descriptors of the machine": OSError(errno.ENFILE, "Too many open files in system"),
    "buffers": OSError(errno.ENOBUFS, "No buffer space available"),
    "memory": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "ports": OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"),
    "a resolver that does not answer": socket.gaierror(socket.EAI_AGAIN, "Temporary failure"),
    "one of two addresses": OSError(
        "Multiple exceptions: [Errno 111] refused, [Errno 24] Too many open files"
    ),
    "deep down": raised_from(
        httpx.ConnectError("All connection attempts failed"),
        raised_from(
            OSError("All connection attempts failed"),
            ExceptionGroup("several", [ConnectionRefusedError(111, "no"), OSError(errno.EMFILE, "too many")]),
        ),
    ),
}
THEIRS = {
    "nothing": None,
    "refused": ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    "reset": ConnectionResetError(errno.ECONNRESET, "Connection reset"),
    "no way there": OSError(errno.EHOSTUNREACH, "No route to host"),
    "too slow": TimeoutError(),
    "no such name": socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    "two addresses": OSError("Multiple exceptions: [Errno 111] refused, [Errno 111] refused"),
    "no host name": UnicodeError("label empty or too long"),
}


@pytest.mark.parametrize("name", OURS)
def test_what_is_ours(name: str) -> None:
    assert is_shortage(OURS[name])


@pytest.mark.parametrize("name", THEIRS)
def test_what_is_theirs(name: str) -> None:
    assert not is_shortage(THEIRS[name])


def test_without_descriptors_a_name_that_is_not_found_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "_can_open", lambda: False)
    assert is_shortage(THEIRS["no such name"])


def failing(*errors: Exception) -> PooledUpstream:
    """The first connections fail so; the others are made."""
    left = list(errors)

    async def connect(*arguments: Any, **options: Any) -> Any:
        if left:
            raise left.pop(0)
        return await asyncio.get_running_loop().create_connection(*arguments, **options)

    return PooledUpstream(connect=connect)


@pytest.mark.parametrize("name", [name for name in OURS if name != "deep down"])
def test_a_leg_that_we_cannot_send_is_no_workers_fault(name: str) -> None:
    async def main() -> None:
        upstream = failing(OURS[name])  # type: ignore[arg-type]
        with pytest.raises(OutOfResources) as caught:
            await get(upstream, Origin("127.0.0.1", 1))
        assert caught.value.__cause__ is OURS[name]
        assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (
            503,
            "out_of_resources",
            1,
        )
        await upstream.aclose()

    asyncio.run(main())


def test_a_leg_that_the_worker_does_not_take_still_is() -> None:
    async def main() -> None:
        upstream = failing(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))
        with pytest.raises(WorkerUnreachable):
            await get(upstream, Origin("127.0.0.1", 1))
        await upstream.aclose()

    asyncio.run(main())


@scenario
async def test_idle_connections_are_given_up_for_the_one_that_is_needed() -> None:
    async with peer(replies(fixed(b"ok"))) as one, peer(replies(fixed(b"ok"))) as two:
        failures: list[Exception] = []

        async def connect(*arguments: Any, **options: Any) -> Any:
            if failures:
                raise failures.pop()
            return await asyncio.get_running_loop().create_connection(*arguments, **options)

        upstream = PooledUpstream(connect=connect)
        assert await get(upstream, one.origin) == (200, b"ok")
        assert upstream.stats().idle == 1
        failures.append(OSError(errno.EMFILE, "Too many open files"))
        assert await get(upstream, two.origin) == (200, b"ok")
        assert upstream.stats().idle == 1
        failures.extend([OSError(errno.EMFILE, "Too many open files")] * 2)
        with pytest.raises(OutOfResources):
            await get(upstream, one.origin)
        assert upstream.stats().idle == 0
        await upstream.aclose()


@scenario
async def test_a_leg_that_is_to_be_sent_again_and_cannot_be_is_not_the_workers_loss() -> None:
    failures: list[Exception] = []

    async def connect(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return await asyncio.get_running_loop().create_connection(*arguments, **options)

    async def script(connection: PeerConnection) -> None:
        await connection.request()
        await connection.send(fixed(b"ok"))
        await connection.request()
        connection.close()

    async with peer(script) as worker:
        upstream = PooledUpstream(connect=connect)
        assert await get(upstream, worker.origin) == (200, b"ok")
        failures.extend([OSError(errno.EMFILE, "Too many open files")] * 3)
        with pytest.raises(OutOfResources):
            await get(upstream, worker.origin)
        await upstream.aclose()
