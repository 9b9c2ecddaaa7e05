"""Sends legs: the encoding that the worker takes, our headers, and what its success says of a worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from orchestrator.errors import BatonError, WorkerAnswered, WorkerError, WorkerOut
from orchestrator.loop.offload import Offload
from orchestrator.relay.job import Job
from orchestrator.relay.scope import RequestScope
from orchestrator.telemetry.counters import FallbackReason, Telemetry
from orchestrator.transport.base import Answer, Upstream
from orchestrator.wire.codec import CODECS, JSON, Codec, NotEncodable, Parts, TooLarge, transcoded
from orchestrator.wire.ends import PATH as END
from orchestrator.wire.ends import end_body
from orchestrator.wire.headers import header_block
from orchestrator.workers.registry import Registry, Worker
from orchestrator.workers.states import IN_SERVICE, WorkerState

MakeBody = Callable[[Codec, str], Parts]

_MAX_END_ANSWER_BYTES: Final = 64 * 1024  # it has none, an error page may

_READY: Final = WorkerState.READY
_log: Final = logging.getLogger("baton.dispatch")


class Dispatcher:
    """Sends the legs of all requests; one per process."""

    def __init__(
        self,
        registry: Registry,
        upstream: Upstream,
        offload: Offload,
        *,
        telemetry: Telemetry,
        credential: str | None,
    ) -> None:
        """`credential` is what workers want as bearer token."""
        self._registry = registry
        self._upstream = upstream
        self._offload = offload
        self._telemetry = telemetry
        authorization = [(b"authorization", f"Bearer {credential}".encode())] if credential else []
        self._headers = {
            codec.name: header_block([*codec.headers, *authorization]) for codec in CODECS.values()
        }

    def send(
        self, job: Job, worker: Worker, make_body: MakeBody, headers: bytes = b""
    ) -> Coroutine[Any, Any, Answer]:
        """Send one leg. What it returns raises `WorkerUnreachable`: not one byte of it was written."""
        codec = JSON if job.is_plain else worker.codec
        if codec is not JSON:
            document = job.bodies.to_transcode(codec)
            if document is not None:
                return self._send_transcoded(job, worker, make_body, headers, document)
        return self._send(job, worker, codec, make_body, headers)

    def _send(
        self, job: Job, worker: Worker, codec: Codec, make_body: MakeBody, headers: bytes
    ) -> Coroutine[Any, Any, Answer]:
        codec, parts = self._encode(worker, codec, make_body)
        job.worker, job.epoch = worker, worker.epoch
        job.legs += 1
        attempt = f"x-request-id: {job.id}-{job.legs}\r\n".encode()
        block = self._headers[codec.name] + headers + attempt + job.headers
        return self._upstream.send(worker.origin, "POST", job.path, block, parts)

    async def _send_transcoded(
        self, job: Job, worker: Worker, make_body: MakeBody, headers: bytes, document: bytes
    ) -> Answer:
        """The same for a large body, which is encoded in another process."""
        codec = worker.codec
        is_encodable, common = await self._offload.run(transcoded, document)
        if is_encodable:
            job.bodies.adopt(codec, common)
        else:
            self._telemetry.transport_fallback(FallbackReason.NOT_ENCODABLE)
            codec = JSON
        return await self._send(job, worker, codec, make_body, headers)

    async def ask(self, job: Job, worker: Worker, path: str, body: bytes, limit: int) -> bytes:
        """A question beside the legs, in JSON: the answer's body. Raises as a leg does."""
        return await self._ask(worker, path, body, limit, scope=job.scope)

    async def _ask(
        self,
        worker: Worker,
        path: str,
        body: bytes,
        limit: int,
        *,
        scope: RequestScope | None = None,
        success: int = 200,
    ) -> bytes:
        answer = await self._upstream.send(worker.origin, "POST", path, self._headers[JSON.name], [body])
        if scope is not None:
            scope.watch(worker, answer)
        try:
            content = await answer.read(limit)
        finally:
            answer.abort()
        if answer.status != success:
            raise worker_answered(answer, content)
        return content

    async def end_leg(self, job: Job, worker: Worker) -> bool:
        """Ask a worker to end the last leg that it got, and to answer it all the same; False if it cannot."""
        if worker.unendable_epoch == worker.epoch:
            return False
        body = end_body(f"{job.id}-{job.legs}")
        try:
            await self._ask(worker, END, body, _MAX_END_ANSWER_BYTES, success=202)
        except WorkerAnswered:  # 404: plain vLLM, or something else
            worker.unendable_epoch = worker.epoch
            return False
        except WorkerError:
            return False
        return True

    def note_success(self, job: Job, worker: Worker) -> None:
        """A worker took a leg. If that had to be plain JSON, it had refused what it announced."""
        if job.is_plain:
            job.is_plain = False
            self._telemetry.transport_fallback(FallbackReason.REFUSED)
            self._registry.distrust(worker)
            _log.warning("%s refused what it announced: it gets plain JSON from now on", worker.name)
        elif worker.proven_epoch != worker.epoch:
            worker.proven_epoch = worker.epoch
        if worker.failures:
            worker.failures = 0

    def _encode(self, worker: Worker, codec: Codec, make_body: MakeBody) -> tuple[Codec, Parts]:
        model = worker.address.served_model
        try:
            return codec, make_body(codec, model)
        except TooLarge:
            self._telemetry.transport_fallback(FallbackReason.TOO_LARGE)
        except NotEncodable:
            self._telemetry.transport_fallback(FallbackReason.NOT_ENCODABLE)
        return JSON, make_body(JSON, model)


def may_be_refusal(job: Job, answer: Answer, worker: Worker) -> bool:
    """Whether an error may be due to a form that the worker announced and has not yet taken."""
    is_plain = job.is_plain or (worker.codec is JSON and not worker.token_ids)
    return answer.status in (400, 415, 422) and not is_plain and worker.proven_epoch != worker.epoch


def look_again(job: Job, worker: Worker) -> None:
    """It was chosen before others were waited for. Raises `WorkerOut` if it has been lost since."""
    if worker.state is not _READY and worker.state not in IN_SERVICE:
        job.worker = worker
        raise WorkerOut(f"{worker.name} fell out of service before its leg was sent")


def note_unreachable(registry: Registry, worker: Worker, error: BatonError) -> None:
    """Tell the registry that a connection could not be made: refused is certain, too slow a suspicion."""
    why = repr(error.__cause__ or error)
    if isinstance(error.__cause__, TimeoutError):
        registry.note_lost(worker, worker.epoch, why)
    else:
        registry.mark_gone(worker, why)


def worker_answered(answer: Answer, content: bytes) -> WorkerAnswered:
    """A worker's own error, to be raised."""
    return WorkerAnswered(
        answer.status,
        content,
        content_type=answer.headers.get(b"content-type", b"application/json"),
        retry_after=answer.headers.get(b"retry-after"),
    )
