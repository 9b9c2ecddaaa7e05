"""The client is answered with what a decode worker sends: whole, or as a stream of events."""

from __future__ import annotations

import logging
from typing import Final

from orchestrator.api.upload import Upload
from orchestrator.config.options import LimitsConfig, RoutingConfig
from orchestrator.errors import KvMissing, WorkerCutShort, WorkerGarbage
from orchestrator.failover.failover import Failover
from orchestrator.legs.dispatch import reported
from orchestrator.legs.leg import AnswerLeg
from orchestrator.legs.releases import Releases
from orchestrator.legs.upload_leg import UploadLeg
from orchestrator.relay.admitted import AdmittedRequest
from orchestrator.relay.outcomes import tell_begun
from orchestrator.relay.relayed import LOAD_METRICS
from orchestrator.relay.scope import RequestScope
from orchestrator.transport.base import Answer
from orchestrator.wire.headers import header_block
from orchestrator.wire.judge import InvalidStream, WorkerFailed
from orchestrator.wire.sse import Events
from orchestrator.wire.usage import InvalidAnswer, Kv, Usage, tokens_in

# Indexed with the enumeration's numbers: a look-up by member is a call in Python.
_KV_HEADERS: Final = tuple(header_block([(b"x-baton-kv", kv.name.lower().encode())]) for kv in Kv)
_LOCAL: Final = Kv.LOCAL
_RECOMPUTED: Final = Kv.RECOMPUTED
_log: Final = logging.getLogger("baton.flow")


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

    async def answer_upload(self, request: AdmittedRequest, leg: UploadLeg, upload: Upload) -> None:
        """Send the leg as its body comes in, and relay the answer. Raises as `UploadLeg.upload` and
        `Leg.read` do.
        """
        request.scope.watch(leg)
        request.legs.last = leg.worker
        await leg.upload()
        request.scope.record.is_stream = upload.is_stream
        await self.answer(request, leg)

    def _end(self, request: AdmittedRequest, leg: AnswerLeg) -> None:
        """End the leg for its request, be it answered, failed, or not wanted any more."""
        trail = request.scope.record.trail
        if trail is not None:
            trail.answer_id, trail.decode_sent = leg.id, leg.sent
        lease, prefill = leg.settle_handoff(), request.prefill
        if lease is not None and prefill is not None and request.scope.is_stopped:
            request.prefill = None
            self._releases.abandon_decode(leg, prefill, lease)
        elif leg.answer is not None:
            leg.answer.abort()

    def _respond(self, request: AdmittedRequest, leg: AnswerLeg, content: bytes) -> None:
        """Send the worker's own answer, with the prefill worker's counts of cached tokens in it."""
        record = request.scope.record
        kv, content, usage = _judged(request, leg, content)
        if usage is not None:
            record.usage = usage
            if record.logged is not None:
                record.logged.output_tokens = tokens_in(usage)[1]
        if kv is _RECOMPUTED:
            self._note_recompute(request, fails=self._kv_missing == "fail")
        _send(request.scope, kv, _relayed_back(leg.answer), content)

    async def _relay_stream(self, request: AdmittedRequest, leg: AnswerLeg) -> None:
        scope, answer, events = request.scope, leg.written, _events(request, leg)
        try:
            opening = await _opening(scope, leg, answer, events)
            if not scope.has_begun:
                if scope.endpoint.can_continue:
                    scope.transcript = self._failover.transcript(request.view)
                scope.begin_stream(_relayed_back(answer))
                request.revision = leg.worker.revision
                if request.plan.links is not None:
                    tell_begun(request, leg)
            await self._forward(scope, answer, opening, events)
        except WorkerFailed as failed:
            raise reported(failed.status, failed.content, leg.path) from failed
        except InvalidStream as error:
            raise WorkerCutShort(str(error)) from error
        finally:
            record = scope.record
            record.kv = Kv.LOCAL if leg.handoff is None else events.kv
            usage = events.usage()
            record.usage = answer.arrivals if usage is None else usage
            if record.logged is not None and usage is not None:
                record.logged.output_tokens = tokens_in(usage)[1]
        if scope.record.kv is _RECOMPUTED:
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


def _judged(request: AdmittedRequest, leg: AnswerLeg, content: bytes) -> tuple[Kv, bytes, Usage | None]:
    """Ask the endpoint about a whole answer. Without a hand-off nothing can have become of one."""
    endpoint, view, handoff = request.scope.endpoint, request.view, leg.handoff
    try:
        if handoff is None:
            _, content, usage = endpoint.whole(view, content, cached_tokens=None, created_tokens=None)
            return _LOCAL, content, usage
        return endpoint.whole(
            view,
            content,
            cached_tokens=handoff.prefill_cached_tokens,
            created_tokens=handoff.created_tokens(),
        )
    except WorkerFailed as failed:
        raise reported(failed.status, failed.content, leg.path) from failed
    except InvalidStream as error:
        raise WorkerCutShort(str(error)) from error
    except InvalidAnswer as garbage:  # by another name: the compiled form has one type for each
        raise WorkerGarbage(str(garbage)) from garbage


def _events(request: AdmittedRequest, leg: AnswerLeg) -> Events:
    if request.continuation is not None:
        return request.continuation.stream()
    endpoint, view, handoff = request.scope.endpoint, request.view, leg.handoff
    if handoff is None:
        return endpoint.events(view, hides_usage=False, cached_tokens=None, created_tokens=None)
    return endpoint.events(
        view,
        hides_usage=leg.bodies.asks_hidden_usage,
        cached_tokens=handoff.prefill_cached_tokens,
        created_tokens=handoff.created_tokens(),
    )


async def _opening(scope: RequestScope, leg: AnswerLeg, answer: Answer, events: Events) -> bytes:
    """Read the stream until it has begun, and there is something to send: until then it may turn out to be an
    error, with a status, and what can be sent of it are comments. They reach the client at once.
    """
    has_begun = False
    while True:
        chunk = await answer.chunk()
        if not chunk:
            raise InvalidStream("the worker's stream ended before its first event")
        opening = events.feed(chunk)
        if not has_begun and events.has_begun:
            has_begun = True
            leg.succeed()
        if opening:
            if has_begun:
                return opening
            scope.comment(_relayed_back(answer), opening)
