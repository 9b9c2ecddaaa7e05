"""The client is answered with what a decode worker sends: whole, or as a stream of events."""

from __future__ import annotations

import logging
from typing import Final

from orchestrator.config.options import LimitsConfig, RoutingConfig
from orchestrator.errors import KvMissing, WorkerCutShort, WorkerGarbage
from orchestrator.failover.failover import Failover
from orchestrator.legs.dispatch import reported
from orchestrator.legs.leg import AnswerLeg
from orchestrator.legs.releases import Releases
from orchestrator.relay.admitted import AdmittedRequest
from orchestrator.relay.relayed import LOAD_METRICS
from orchestrator.relay.scope import RequestScope
from orchestrator.transport.base import Answer
from orchestrator.wire.headers import header_block
from orchestrator.wire.sse import (
    ABORTED,
    ENDED_BY_WORKER,
    Events,
    InvalidStream,
    WorkerFailed,
    has_begun,
)
from orchestrator.wire.usage import InvalidAnswer, Kv, encode_document, mended

# Indexed with the enumeration's numbers: a look-up by member is a call in Python.
_KV_HEADERS: Final = tuple(header_block([(b"x-baton-kv", kv.name.lower().encode())]) for kv in Kv)
_log: Final = logging.getLogger("baton.flow")

# Proxies in between must neither store a stream nor collect it before passing it on.
_STREAM_HEADERS: Final = header_block([(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])


class Responder:
    """It sends the leg that answers, and relays what comes; one per process."""

    def __init__(self, releases: Releases, failover: Failover) -> None:
        self._releases = releases
        self._failover = failover

    def reconfigure(self, routing: RoutingConfig, limits: LimitsConfig) -> None:
        """Go by these sections from now on. To be called before the first answer."""
        self._kv_missing = routing.kv_missing
        self._max_answer_bytes = limits.max_answer_bytes

    async def answer(self, request: AdmittedRequest, leg: AnswerLeg) -> None:
        """Send the leg that answers the client, and relay what comes. Raises as `Leg.read` does."""
        request.scope.watch(leg)
        request.legs.last = leg.worker
        try:
            if request.scope.record.is_stream:
                await leg.read(self._max_answer_bytes, only_head=True)
                await self._relay_stream(request, leg)
            else:
                content = await leg.read(self._max_answer_bytes)
                if leg.settle_doubt is not None:
                    await leg.settle_doubt()
                leg.succeed()
                if request.conversion is None:
                    self._respond(request, leg, content)
                else:
                    head, body = await request.conversion.convert(content)
                    _send(request.scope, Kv.LOCAL, head, body)
        finally:
            self._end(request, leg)

    def _end(self, request: AdmittedRequest, leg: AnswerLeg) -> None:
        """End the leg for its request, be it answered, failed, or not wanted any more."""
        lease, prefill = leg.settle_handoff(), request.prefill
        if lease is not None and prefill is not None and request.scope.is_stopped:
            request.prefill = None
            self._releases.abandon_decode(leg, prefill, lease)
        elif leg.answer is not None:
            leg.answer.abort()

    def _respond(self, request: AdmittedRequest, leg: AnswerLeg, content: bytes) -> None:
        """Send the worker's own answer, with the prefill worker's count of cached tokens in it."""
        kv = Kv.LOCAL
        if content.rfind(ABORTED) >= 0:
            raise WorkerCutShort(ENDED_BY_WORKER)
        if leg.handoff is None:
            _mended(content, None)  # a look only: what is no JSON is no answer
        else:
            kv, content = _mended(content, leg.handoff.prefill_cached_tokens)
            if kv is Kv.RECOMPUTED:
                self._note_recompute(request, fails=self._kv_missing == "fail")
        _send(request.scope, kv, _relayed_back(leg.answer), content)

    async def _relay_stream(self, request: AdmittedRequest, leg: AnswerLeg) -> None:
        scope, answer, events = request.scope, leg.written, _events(request, leg)
        try:
            opening = await _opening(answer, events)
            leg.succeed()
            if not scope.exchange.is_started:
                if scope.endpoint.can_continue:
                    scope.transcript = self._failover.transcript(request.view)
                scope.start_stream(_relayed_back(answer) + scope.response_headers() + _STREAM_HEADERS)
            await self._forward(scope, answer, opening, events)
        except WorkerFailed as failed:
            raise reported(failed.status, encode_document(failed.document), leg.path) from failed
        except InvalidStream as error:
            raise WorkerCutShort(str(error)) from error
        finally:
            scope.record.kv = Kv.LOCAL if leg.handoff is None else events.kv
        if events.kv is Kv.RECOMPUTED:
            self._note_recompute(request, fails=False)
        scope.exchange.finish()

    async def _forward(self, scope: RequestScope, answer: Answer, opening: bytes, events: Events) -> None:
        try:
            await scope.forward(answer, opening, events)
            events.finish()
        except WorkerCutShort:
            if not events.is_done:  # what happens to the worker behind its last word is no matter
                raise

    def _note_recompute(self, request: AdmittedRequest, *, fails: bool) -> None:
        """Note that the KV cache was made twice: the answer is right, but what prefill workers are for was
        lost.
        """
        if self._kv_missing == "allow":
            return
        record = request.scope.record
        _log.warning(
            "request %s: %s recomputed the KV cache of %s",
            record.request_id,
            record.decode_worker,
            record.prefill_worker,
        )
        if fails:
            raise KvMissing("the decode worker did not get the KV cache and computed it again")


def _send(scope: RequestScope, kv: Kv, head: bytes, content: bytes) -> None:
    """Send a whole answer; `head` is a header block with the content type."""
    scope.record.kv = kv
    scope.respond(200, head + scope.response_headers() + _KV_HEADERS[kv], content)


def _relayed_back(answer: Answer | None) -> bytes:
    """Return the worker's content type, and its load if the client asked for it, as a header block: no line
    break gets through the parser.
    """
    headers = {} if answer is None else answer.headers
    load = headers.get(LOAD_METRICS)
    block = b"content-type: %b\r\n" % (headers.get(b"content-type") or b"application/json")
    return block if load is None else b"%b%b: %b\r\n" % (block, LOAD_METRICS, load)


def _mended(content: bytes, cached_tokens: int | None) -> tuple[Kv, bytes]:
    try:
        return mended(content, cached_tokens)
    except InvalidAnswer as error:
        raise WorkerGarbage(str(error)) from error


def _events(request: AdmittedRequest, leg: AnswerLeg) -> Events:
    if request.continuation is not None:
        return request.continuation.stream()
    if leg.handoff is None:
        return request.scope.endpoint.events(hides_usage=False, cached_tokens=None)
    return request.scope.endpoint.events(
        hides_usage=leg.bodies.asks_hidden_usage, cached_tokens=leg.handoff.prefill_cached_tokens
    )


async def _opening(answer: Answer, events: Events) -> bytes:
    """Read the stream until it says something: until then it may turn out to be an error, with a status."""
    opening = b""
    while not has_begun(opening):
        chunk = await answer.chunk()
        if not chunk:
            raise InvalidStream("the worker's stream ended before its first event")
        opening += events.feed(chunk)
    return opening
