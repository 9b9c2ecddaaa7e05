"""The dispatcher sends what legs are made of, and asks workers what is to be asked beside the legs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from orchestrator.errors import OutOfResources, WorkerAnswered, WorkerError, WorkerUnreachable
from orchestrator.http.ids import IdSource
from orchestrator.loop.offload import Offload
from orchestrator.telemetry.counters import FallbackReason, Telemetry
from orchestrator.transport.base import Answer, Upstream
from orchestrator.wire.codec import CODECS, JSON, NotEncodable, TooLarge, transcoded
from orchestrator.wire.headers import header_block
from orchestrator.wire.info import END_PATH as END
from orchestrator.wire.info import end_body
from orchestrator.workers.registry import Registry
from orchestrator.workers.worker import Worker

_MAX_END_ANSWER_BYTES: Final = 64 * 1024  # it has none, an error page may

_log: Final = logging.getLogger("baton.dispatch")


class Dispatcher:
    """All legs of a process are sent with this."""

    def __init__(
        self,
        registry: Registry,
        upstream: Upstream,
        offload: Offload,
        telemetry: Telemetry,
        ids: IdSource,
        credential: str | None,
        time: Callable[[], float],
    ) -> None:
        """`credential` is what workers want as bearer token. `upstream` and `offload` stay the caller's."""
        self.registry = registry
        self.ids = ids
        self.time = time
        self.upstream = upstream
        self._offload = offload
        self._telemetry = telemetry
        authorization = [(b"authorization", f"Bearer {credential}".encode())] if credential else []
        self.headers: Final = {  # of a leg, by the name of its codec, as header blocks
            codec.name: header_block([*codec.headers, *authorization]) for codec in CODECS.values()
        }

    def ask(self, worker: Worker, path: str, body: bytes) -> Coroutine[Any, Any, Answer]:
        """Send a worker a question beside the legs, as JSON. It raises as `Upstream.send` does."""
        return self.upstream.send(worker.origin, "POST", path, self.headers[JSON.name], [body])

    async def end_leg(self, worker: Worker, id: str) -> bool:
        """Ask a worker to end the leg of this `x-request-id`, and to answer it all the same; False if it
        cannot.
        """
        if worker.unendable_epoch == worker.epoch:
            return False
        try:
            await self._ask_to_end(worker, id)
        except WorkerAnswered:  # 404: plain vLLM, or something else
            worker.unendable_epoch = worker.epoch
            return False
        except (WorkerError, OutOfResources):
            return False
        return True

    async def _ask_to_end(self, worker: Worker, id: str) -> None:
        answer = await self.ask(worker, END, end_body(id))
        try:
            content = await answer.read(_MAX_END_ANSWER_BYTES)
        finally:
            answer.abort()
        if answer.status != 202:
            raise worker_answered(answer, content)

    async def transcode(self, document: bytes) -> bytes | None:
        """Make msgpack of a large document, in another process; return None if msgpack cannot carry it, which
        is counted.
        """
        is_encodable, common = await self._offload.run(transcoded, document)
        if is_encodable:
            return common
        self._telemetry.transport_fallback(FallbackReason.NOT_ENCODABLE)
        return None

    def note_not_encodable(self, error: NotEncodable) -> None:
        """Count a leg that goes as JSON though its worker takes more."""
        is_too_large = isinstance(error, TooLarge)
        self._telemetry.transport_fallback(
            FallbackReason.TOO_LARGE if is_too_large else FallbackReason.NOT_ENCODABLE
        )

    def note_refused_form(self, worker: Worker) -> None:
        """Note that a worker took as plain JSON what it had refused in a form that it announced."""
        self._telemetry.transport_fallback(FallbackReason.REFUSED)
        worker.distrust()
        _log.warning("%s refused what it announced: it gets plain JSON from now on", worker.name)

    def note_unreachable(self, worker: Worker, error: WorkerUnreachable) -> None:
        """Tell the registry that a connection could not be made: refused is certain, too slow a suspicion."""
        cause = cause_of(error)
        why = repr(cause)
        if isinstance(cause, TimeoutError):
            self.registry.note_lost(worker, worker.epoch, why)
        else:
            self.registry.mark_gone(worker, why)


def cause_of(error: BaseException) -> BaseException:
    """Return what an error was raised from, or itself. Of compiled code only the context tells that."""
    return error.__cause__ or error.__context__ or error


def worker_answered(answer: Answer, content: bytes) -> WorkerAnswered:
    """Return a worker's own error, to be raised."""
    return WorkerAnswered(
        answer.status,
        content,
        content_type=answer.headers.get(b"content-type", b"application/json"),
        retry_after=answer.headers.get(b"retry-after"),
    )
