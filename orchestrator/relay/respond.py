"""Answers the client with what a decode worker sends: whole, or as a stream of events."""

from __future__ import annotations

import logging
from typing import Final

from orchestrator.api.embeddings import Embeddings, Wanted
from orchestrator.errors import KvMissing, WorkerAnswered, WorkerCutShort, WorkerGarbage
from orchestrator.failover.failover import Failover
from orchestrator.legs.dispatch import Dispatcher, MakeBody, look_again, may_be_refusal, worker_answered
from orchestrator.legs.releases import Releases
from orchestrator.legs.retry import is_unread
from orchestrator.relay.job import Job
from orchestrator.relay.scope import RequestScope
from orchestrator.telemetry.counters import LeaseState
from orchestrator.transport.base import Answer
from orchestrator.wire.headers import header_block
from orchestrator.wire.sse import (
    ABORTED,
    ENDED_BY_WORKER,
    Events,
    EventStream,
    InvalidStream,
    WorkerFailed,
    has_begun,
)
from orchestrator.wire.usage import InvalidAnswer, Kv, encode_document, mended

_USED: Final = LeaseState.USED
# Indexed with the enumeration's numbers: a look-up by member is a call in Python.
_KV_HEADERS: Final = tuple(header_block([(b"x-baton-kv", kv.name.lower().encode())]) for kv in Kv)
_log: Final = logging.getLogger("baton.flow")

# Proxies in between must neither store a stream nor collect it before passing it on.
_STREAM_HEADERS: Final = header_block([(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])


class Responder:
    """Sends the leg that answers, and relays what comes; one per process."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        releases: Releases,
        failover: Failover,
        embeddings: Embeddings,
        max_answer_bytes: int,
        kv_missing: str,
    ) -> None:
        self._dispatcher = dispatcher
        self._releases = releases
        self._failover = failover
        self._embeddings = embeddings
        self.reconfigure(max_answer_bytes, kv_missing)

    def reconfigure(self, max_answer_bytes: int, kv_missing: str) -> None:
        self._max_answer_bytes = max_answer_bytes
        self._kv_missing = kv_missing

    async def answer(self, job: Job, make_body: MakeBody) -> None:
        """Send the leg that answers the client, and relay what comes."""
        scope, lease, worker = job.scope, job.lease, job.plan.decode
        while True:
            answer = await self._dispatcher.send(job, worker, make_body)
            if lease is not None:
                lease.use()
            scope.watch(worker, answer)
            try:
                if scope.record.is_stream and await self._relay_stream(job, answer):
                    return None
                content = await answer.read(self._max_answer_bytes)
                if answer.status == 200:
                    self._note_answer(job)
                    if job.embeddings is not None:
                        return await self._respond_with_embeddings(job, job.embeddings, content)
                    return self._respond(job, _content_type(answer), content)
            finally:
                self._end_decode(job, answer)
            self._judge(job, answer, content)
            look_again(job, worker)
            job.is_plain = True

    def _end_decode(self, job: Job, answer: Answer) -> None:
        """The leg is over for its request, be it answered, failed, or not wanted any more."""
        lease = job.lease
        if lease is not None:
            if is_unread(answer.status):
                lease.unuse()
            elif lease.state is _USED and job.scope.is_stopped:
                self._releases.abandon_decode(job, lease, answer)
                return
        answer.abort()

    def _judge(self, job: Job, answer: Answer, content: bytes) -> None:
        """Raise a worker's error, unless it may have refused a form that it had announced."""
        if not may_be_refusal(job, answer, job.plan.decode):
            raise worker_answered(answer, content)
        if job.lease is not None:
            job.lease.handoff.token_ids = None

    async def _respond_with_embeddings(self, job: Job, wanted: Wanted, content: bytes) -> None:
        head, body = await self._embeddings.answer(wanted, content)
        self._respond(job, head, body)

    def _respond(self, job: Job, head: bytes, content: bytes) -> None:
        """`head` is a header block with the content type."""
        scope, kv = job.scope, Kv.LOCAL
        if job.embeddings is None and content.rfind(ABORTED) >= 0:
            raise WorkerCutShort(ENDED_BY_WORKER)
        if job.lease is None:
            if job.embeddings is None:
                _mended(content, None)  # a look only: what is no JSON is no answer
        else:
            kv, content = _mended(content, job.lease.handoff.prefill_cached_tokens)
            if kv is Kv.RECOMPUTED:
                self._note_recompute(job, fails=self._kv_missing == "fail")
        scope.record.kv = kv
        scope.respond(200, head + scope.response_headers() + _KV_HEADERS[kv], content)

    async def _relay_stream(self, job: Job, answer: Answer) -> bool:
        """False if the answer is an error, of which nothing was read but the head."""
        await answer.head()
        if answer.status != 200:
            return False
        scope, events = job.scope, _events(job)
        try:
            opening = await _opening(answer, events)
            self._note_answer(job)
            if not scope.exchange.is_started:
                scope.transcript = self._failover.transcript(job)
                scope.start_stream(_content_type(answer) + scope.response_headers() + _STREAM_HEADERS)
            await self._forward(scope, answer, opening, events)
        except WorkerFailed as failed:
            raise WorkerAnswered(failed.status, encode_document(failed.document)) from failed
        except InvalidStream as error:
            raise WorkerCutShort(str(error)) from error
        finally:
            scope.record.kv = Kv.LOCAL if job.lease is None else events.kv
        if events.kv is Kv.RECOMPUTED:
            self._note_recompute(job, fails=False)
        scope.exchange.finish()
        return True

    async def _forward(self, scope: RequestScope, answer: Answer, opening: bytes, events: Events) -> None:
        try:
            await scope.forward(answer, opening, events)
            events.finish()
        except WorkerCutShort:
            if not events.is_done:  # what happens to the worker behind its last word is no matter
                raise

    def _note_answer(self, job: Job) -> None:
        """The decode worker answers: it has taken the leg, and the hand-off with it."""
        self._dispatcher.note_success(job, job.plan.decode)
        if job.lease is not None:
            job.lease.consume()

    def _note_recompute(self, job: Job, *, fails: bool) -> None:
        """The KV cache was made twice: the answer is right, but what prefill workers are for was lost."""
        if self._kv_missing == "allow":
            return
        record = job.scope.record
        _log.warning(
            "request %s: %s recomputed the KV cache of %s",
            record.request_id,
            record.decode_worker,
            record.prefill_worker,
        )
        if fails:
            raise KvMissing("the decode worker did not get the KV cache and computed it again")


def _content_type(answer: Answer) -> bytes:
    """The worker's, as a header block: no line break gets through the parser."""
    return b"content-type: %b\r\n" % answer.headers.get(b"content-type", b"application/json")


def _mended(content: bytes, cached_tokens: int | None) -> tuple[Kv, bytes]:
    try:
        return mended(content, cached_tokens)
    except InvalidAnswer as error:
        raise WorkerGarbage(str(error)) from error


def _events(job: Job) -> Events:
    if job.continuation is not None:
        return job.continuation.stream()
    if job.lease is None:
        return EventStream()
    return EventStream(
        hides_usage=job.bodies.asks_hidden_usage, cached_tokens=job.lease.handoff.prefill_cached_tokens
    )


async def _opening(answer: Answer, events: Events) -> bytes:
    """The stream until it says something: until then it may turn out to be an error, with a status."""
    opening = b""
    while not has_begun(opening):
        chunk = await answer.chunk()
        if not chunk:
            raise InvalidStream("the worker's stream ended before its first event")
        opening += events.feed(chunk)
    return opening
