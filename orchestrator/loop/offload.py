"""Work on large bodies, which would hold the event loop up, is done in a process of its own.

msgspec and orjson keep the interpreter's lock while they work: a thread would hold the loop up all the same.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Concatenate, ParamSpec, TypeVar

from orchestrator.errors import BatonError
from orchestrator.form import take_form

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Mailboxes that wait for the next call, and what they may hold in memory meanwhile.
_MAX_KEPT = 2
_MAX_KEPT_BYTES = 8 * 1024 * 1024

_log = logging.getLogger("baton.offload")


class Offload:
    """An offload is a process beside an event loop: it starts with the first call and ends with `aclose`.

    A call costs 0.3 ms, and 0.2 ms more for each MiB in or out. So what takes less than 200 us is done in
    place: callers know how many bytes of theirs that is.
    """

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None
        self._starting = asyncio.Lock()
        self._mailboxes: list[_Mailbox] = []  # not in use

    async def run(
        self,
        function: Callable[Concatenate[bytes, _P], tuple[_T, bytes]],
        data: bytes,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> tuple[_T, bytes]:
        """Return what `function(data, *args)` returns elsewhere: something small and something large.

        It must be a module's function without side effects; what it raises is raised here. If the process is
        killed, all calls under way are made once more, in a fresh one; `BatonError` if that one does not live
        either. Cancelling drops the result.
        """
        if not hasattr(os, "memfd_create"):  # not Linux: right, but not as quick
            return await asyncio.to_thread(function, data, *args, **kwargs)
        try:
            return await self._try(function, data, *args, **kwargs)
        except BrokenProcessPool:
            _log.warning("the process for large bodies was killed; starting another")
        try:
            return await self._try(function, data, *args, **kwargs)
        except BrokenProcessPool as error:
            raise BatonError("the process for large bodies was killed twice") from error

    async def aclose(self) -> None:
        """End the process; the call that it works on is finished, others are cancelled.

        This can be repeated.
        """
        executor, self._executor = self._executor, None
        if executor is not None:
            await asyncio.to_thread(executor.shutdown, cancel_futures=True)
        while self._mailboxes:
            self._mailboxes.pop().close()

    async def _try(
        self,
        function: Callable[Concatenate[bytes, _P], tuple[_T, bytes]],
        data: bytes,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> tuple[_T, bytes]:
        executor = await self._started()
        mailbox = self._mailboxes.pop() if self._mailboxes else _Mailbox()
        call: Future[tuple[_T, int]] | None = None
        try:
            mailbox.write(data)
            call = executor.submit(_work, mailbox.path, len(data), function, args, kwargs)
            small, size = await asyncio.wrap_future(call)
            return small, mailbox.read(size)
        except BrokenProcessPool:
            if self._executor is executor:  # the first to notice
                self._executor = None
            raise
        finally:
            self._put_back(mailbox, call)

    async def _started(self) -> ProcessPoolExecutor:
        async with self._starting:
            if self._executor is None:
                self._executor = await asyncio.to_thread(_start)
            return self._executor

    def _put_back(self, mailbox: _Mailbox, call: Future[Any] | None) -> None:
        """Keep or close a mailbox: a cancelled call may still be at work on it, so nobody else may get its
        path.
        """
        if call is not None and not call.done():
            call.add_done_callback(lambda _: mailbox.close())
        elif len(self._mailboxes) < _MAX_KEPT and mailbox.size <= _MAX_KEPT_BYTES:
            self._mailboxes.append(mailbox)
        else:
            mailbox.close()


class _Mailbox:
    """A mailbox is a file in memory, by which a body gets to the process and back.

    Through the executor's pipes, 64 KiB at a time, 1.4 MB in and 2.8 MB out take seven times as long.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("baton-offload")
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.size = 0  # at most, so far

    def write(self, data: bytes) -> None:
        self.size = max(self.size, len(data))
        _write(self._fd, data)

    def read(self, size: int) -> bytes:
        self.size = max(self.size, size)
        return os.pread(self._fd, size, 0)

    def close(self) -> None:
        os.close(self._fd)


def _write(fd: int, data: bytes) -> None:
    if os.pwrite(fd, data, 0) != len(data):
        raise MemoryError(f"no room for {len(data)} bytes")


def _start() -> ProcessPoolExecutor:
    """Start the process in some 10 ms.

    It is spawned: a fork would copy the event loop and every connection.
    """
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
    executor.submit(os.getpid)  # the process is not started before the first call
    return executor


# --- in the other process -----------------------------------------------------------------------


def _begin() -> None:
    """Leave Ctrl-C to the parent, which ends this process, and end when the parent dies. Import its form."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    take_form(os.environ)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def _work(
    path: str, size: int, function: Callable[..., tuple[_T, bytes]], args: Any, kwargs: Any
) -> tuple[_T, int]:
    """Return the function's small result, and how many bytes of the large one are in the mailbox."""
    fd = os.open(path, os.O_RDWR)
    try:
        small, large = function(os.pread(fd, size, 0), *args, **kwargs)
        _write(fd, large)
        return small, len(large)
    finally:
        os.close(fd)
