"""The story of a request: plan, prefill leg, hand-off, decode leg.

What is owed at each point, and who pays it, when the client leaves or something fails:

| point | owed | paid by |
|---|---|---|
| prefill leg under way | the worker stops | its connection is closed |
| prefill has answered, decode not sent | prefill's pinned blocks | the release leg, in the background |
| decode refused the request (4xx) | the same: it never looked at the hand-off | the release leg |
| decode leg sent | both workers stop | its connection is closed; the decode worker lets the blocks go |
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

import msgspec

from orchestrator.embeddings import PATH as EMBEDDINGS
from orchestrator.embeddings import Embeddings, Wanted, ask_base64, wanted_of
from orchestrator.endpoints import ENDPOINTS, Serving
from orchestrator.errors import (
    BatonError,
    ClientError,
    UnknownModel,
    WorkerAnswered,
    WorkerCutShort,
    WorkerGarbage,
    WorkerUnreachable,
)
from orchestrator.headers import header_block
from orchestrator.ids import IdSource
from orchestrator.offload import Offload
from orchestrator.relay import RequestScope
from orchestrator.routing.planner import Plan, Planner
from orchestrator.telemetry import FallbackReason, Path, Telemetry
from orchestrator.transport.base import Answer, Upstream
from orchestrator.wire.codec import CODECS, JSON, Codec, NotEncodable, Parts, TooLarge, transcoded
from orchestrator.wire.handoff import Handoff, InvalidHandoff, handoff_from, handoff_from_msgpack
from orchestrator.wire.info import TOKEN_IDS_HEADER, TokenIds
from orchestrator.wire.legs import LegBodies
from orchestrator.wire.sse import EventStream, InvalidStream, error_status, has_begun, opening_error
from orchestrator.wire.usage import InvalidAnswer, Kv, encode_document, mended
from orchestrator.wire.view import InvalidRequest, RequestView, view_request
from orchestrator.workers import Registry, Worker

# A prefill answer holds block ids and one token: 1 MiB is enough for over 100,000 blocks.
MAX_PREFILL_ANSWER_BYTES = 16 * 1024 * 1024

# How long a release leg may take to be answered. The lease it saves lasts 30 s.
RELEASE_TIMEOUT_S = 10.0

MakeBody = Callable[[Codec, str], Parts]

# Looking a member up in its enumeration costs as much as a call.
_DISAGGREGATED, _AGGREGATED = Path.DISAGGREGATED, Path.AGGREGATED
_ONE_LEG = frozenset(path for path, serving in ENDPOINTS.items() if serving is Serving.ONE_LEG)
_ID_HEADERS: dict[TokenIds | None, bytes] = {
    None: b"",
    "list": b"",
    "base64": header_block([(TOKEN_IDS_HEADER.lower().encode(), b"base64")]),
    "bin": header_block([(TOKEN_IDS_HEADER.lower().encode(), b"bin"), (b"accept", b"application/msgpack")]),
}
# Indexed with the enumeration's numbers: a look-up by member is a call in Python.
_KV_HEADERS = tuple(header_block([(b"x-baton-kv", kv.name.lower().encode())]) for kv in Kv)
_log = logging.getLogger("baton.flow")


class _Job(msgspec.Struct):
    """What the legs of one request share."""

    scope: RequestScope
    view: RequestView
    bodies: LegBodies
    plan: Plan
    id: str  # ours, for the workers
    headers: bytes  # of the client, for the workers
    attempts: int = 0  # legs sent
    is_plain: bool = False  # send JSON and no ids, whatever the worker announces
    handoff: Handoff | None = None
    embeddings: Wanted | None = None  # what is made of the worker's answer


class Flow:
    """Serves requests; one per process. `aclose` waits for releases under way and ends what was started."""

    def __init__(
        self,
        registry: Registry,
        planners: Mapping[str, Planner],
        upstream: Upstream,
        *,
        telemetry: Telemetry,
        ids: IdSource,
        credential: str | None,
        max_answer_bytes: int,
        tokenizes_once: bool = True,
    ) -> None:
        """`planners` by model. `credential` is what workers want as bearer token.

        `tokenizes_once`: decode workers that announce it get the prompt's token ids from the prefill worker.
        """
        self._registry = registry
        self._planners = planners
        self._upstream = upstream
        self._telemetry = telemetry
        self._ids = ids
        authorization = [(b"authorization", f"Bearer {credential}".encode())] if credential else []
        self._headers = {
            codec.name: header_block([*codec.headers, *authorization]) for codec in CODECS.values()
        }
        self._max_answer_bytes = max_answer_bytes
        self._tokenizes_once = tokenizes_once
        self._models = {model: index for index, model in enumerate(registry.pools)}
        self._releases: set[asyncio.Task[None]] = set()
        self._offload = Offload()
        self._embeddings = Embeddings(self._offload)

    async def serve(self, scope: RequestScope, body: bytes) -> None:
        """Answer one request through its scope. Raises `BatonError`."""
        job = self._accept(scope, body)
        with job.plan.decode.lease():
            if job.plan.prefill is None:
                await self._serve_whole(job)
            else:
                await self._serve_in_two_legs(job, job.plan.prefill)

    async def aclose(self) -> None:
        if self._releases:
            await asyncio.wait(self._releases, timeout=RELEASE_TIMEOUT_S)
        await self._offload.aclose()

    # --- plan -----------------------------------------------------------------------------------

    def _accept(self, scope: RequestScope, body: bytes) -> _Job:
        try:
            view = view_request(body)
        except InvalidRequest as error:
            raise ClientError(error.message, param=error.param) from error
        if view.model not in self._models:
            raise UnknownModel(_unknown_model(view.model, self._models), param="model")
        record = scope.record
        record.model_index = self._models[view.model]
        record.is_stream = view.is_stream and scope.exchange.path not in _ONE_LEG
        self._telemetry.begin(record)
        plan = self._plan(scope.exchange.path, view)
        record.admitted = scope.now()
        record.decode_worker = plan.decode.name
        if plan.prefill is None:
            record.path = _AGGREGATED
        else:
            record.path = _DISAGGREGATED
            record.prefill_worker = plan.prefill.name
        return _Job(scope, view, LegBodies(view), plan, self._ids.fresh(), scope.relayed_headers())

    def _plan(self, path: str, view: RequestView) -> Plan:
        whole_reason = "this endpoint needs one worker" if path in _ONE_LEG else view.whole_reason
        return self._planners[view.model].plan(self._registry.pools[view.model], whole_reason)

    # --- one leg --------------------------------------------------------------------------------

    async def _serve_whole(self, job: _Job) -> None:
        if job.scope.exchange.path == EMBEDDINGS:
            job.embeddings = wanted_of(job.view, job.scope.exchange.header(b"accept"))
            if job.embeddings is not None:
                job.bodies = LegBodies(ask_base64(job.view))
        await self._answer(job, job.bodies.whole)

    # --- two legs -------------------------------------------------------------------------------

    async def _serve_in_two_legs(self, job: _Job, prefill: Worker) -> None:
        with prefill.lease():
            handoff = job.handoff = await self._prefill(job, prefill)
        job.scope.record.prefill_done = job.scope.now()
        await self._answer(job, lambda codec, model: job.bodies.decode(codec, model, handoff))

    async def _prefill(self, job: _Job, worker: Worker) -> Handoff:
        form = self._form_of_ids(job, worker)
        answer, content = await self._ask_prefill(job, worker, form)
        if answer.status != 200 and _may_be_refusal(job, answer, worker):
            job.is_plain, form = True, None
            answer, content = await self._ask_prefill(job, worker, form)
        if answer.status != 200:
            raise _worker_answered(answer, content)
        self._note_success(job, worker)
        return _handoff(answer, content, has_ids=form is not None)

    def _form_of_ids(self, job: _Job, prefill: Worker) -> TokenIds | None:
        """How the prompt's token ids go from worker to worker; None if they do not."""
        if not (self._tokenizes_once and prefill.token_ids and job.bodies.takes_ids):
            return None
        return next((form for form in prefill.token_ids if form in job.plan.decode.token_ids), None)

    async def _ask_prefill(self, job: _Job, worker: Worker, form: TokenIds | None) -> tuple[Answer, bytes]:
        answer = await self._send(job, worker, _prefill_body(job, form), _ID_HEADERS[form])
        try:
            return answer, await answer.read(MAX_PREFILL_ANSWER_BYTES)
        except BaseException:
            self._abandon_prefill(job, answer)
            raise

    def _abandon_prefill(self, job: _Job, answer: Answer) -> None:
        """Stop a prefill; if it has just been answered, its blocks are pinned already."""
        content = answer.body_nowait()
        answer.abort()
        if content is None or answer.status != 200:
            return
        with contextlib.suppress(WorkerGarbage):  # no hand-off in it, so nothing is pinned
            self._release(job, _handoff(answer, content))

    # --- release --------------------------------------------------------------------------------

    def _release(self, job: _Job, handoff: Handoff) -> None:
        """Have the blocks pulled and freed, in the background: nobody waits for it, `aclose` does."""
        task = asyncio.get_running_loop().create_task(self._send_release(job, handoff))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _send_release(self, job: _Job, handoff: Handoff) -> None:
        worker = self._releaser(job)
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                answer = await self._send(
                    job, worker, lambda codec, model: job.bodies.release(codec, model, handoff)
                )
                try:
                    await answer.head()
                finally:
                    answer.abort()
        except (BatonError, TimeoutError) as error:
            _log.warning(
                "KV of %s stays pinned until its lease ends: %r", job.scope.record.prefill_worker, error
            )

    def _releaser(self, job: _Job) -> Worker:
        """The planned decode worker; if it has just refused, another of its pool."""
        ready = self._registry.pools[job.view.model].decode
        return job.plan.decode if job.plan.decode in ready or not ready else ready[0]

    # --- sending --------------------------------------------------------------------------------

    async def _send(self, job: _Job, worker: Worker, make_body: MakeBody, headers: bytes = b"") -> Answer:
        codec = worker.codec
        if codec is not JSON:
            codec = JSON if job.is_plain else await self._prepared(job, codec)
        codec, parts = self._encode(worker, codec, make_body)
        job.attempts += 1
        attempt = f"x-request-id: {job.id}-{job.attempts}\r\n".encode()
        block = self._headers[codec.name] + headers + attempt + job.headers
        try:
            return await self._upstream.send(worker.origin, "POST", job.scope.exchange.path, block, parts)
        except WorkerUnreachable as error:
            self._registry.mark_gone(worker, repr(error.__cause__ or error))
            raise

    async def _prepared(self, job: _Job, codec: Codec) -> Codec:
        """The codec to use, once a large body was encoded for it, in another process."""
        document = job.bodies.to_transcode(codec)
        if document is None:
            return codec
        is_encodable, common = await self._offload.run(transcoded, document)
        if not is_encodable:
            self._telemetry.transport_fallback(FallbackReason.NOT_ENCODABLE)
            return JSON
        job.bodies.adopt(codec, common)
        return codec

    def _encode(self, worker: Worker, codec: Codec, make_body: MakeBody) -> tuple[Codec, Parts]:
        model = worker.address.served_model
        try:
            return codec, make_body(codec, model)
        except TooLarge:
            self._telemetry.transport_fallback(FallbackReason.TOO_LARGE)
        except NotEncodable:
            self._telemetry.transport_fallback(FallbackReason.NOT_ENCODABLE)
        return JSON, make_body(JSON, model)

    def _note_success(self, job: _Job, worker: Worker) -> None:
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

    # --- the answer -----------------------------------------------------------------------------

    async def _answer(self, job: _Job, make_body: MakeBody) -> None:
        """Send the leg that answers the client, and relay what comes."""
        if not await self._relay(job, await self._send_final(job, make_body)):
            job.is_plain = True
            if job.handoff is not None:
                job.handoff.token_ids = None
            await self._relay(job, await self._send_final(job, make_body))

    async def _send_final(self, job: _Job, make_body: MakeBody) -> Answer:
        try:
            return await self._send(job, job.plan.decode, make_body)
        except BaseException:
            # Not sent, or cancelled before anybody knows: the prefill worker must get its blocks back.
            if job.handoff is not None:
                self._release(job, job.handoff)
            raise

    async def _relay(self, job: _Job, answer: Answer) -> bool:
        """False, with nothing sent yet, if the worker may have refused a form that it had announced."""
        try:
            if job.scope.record.is_stream:
                await answer.head()
                if answer.status == 200:
                    self._note_success(job, job.plan.decode)
                    await self._relay_stream(job, answer)
                    return True
            content = await answer.read(self._max_answer_bytes)
            if answer.status == 200:
                self._note_success(job, job.plan.decode)
                head = _content_type(answer)
                if job.embeddings is not None:
                    head, content = await self._embeddings.answer(job.embeddings, content)
                self._respond(job, head, content)
                return True
            if _may_be_refusal(job, answer, job.plan.decode):
                return False
            self._refuse(job, answer, content)
        finally:
            answer.abort()

    def _refuse(self, job: _Job, answer: Answer, content: bytes) -> NoReturn:
        if job.handoff is not None and answer.status < 500:
            self._release(job, job.handoff)
        raise _worker_answered(answer, content)

    def _respond(self, job: _Job, head: bytes, content: bytes) -> None:
        """`head` is a header block with the content type."""
        kv = Kv.LOCAL
        if job.handoff is not None:
            kv, content = _mended(content, job.handoff)
        scope = job.scope
        scope.record.kv = kv
        headers = head + scope.response_headers() + _KV_HEADERS[kv]
        scope.respond(200, headers, content)

    async def _relay_stream(self, job: _Job, answer: Answer) -> None:
        scope, events = job.scope, _events(job)
        try:
            opening = await _opening(answer, events)
            headers = _content_type(answer) + scope.response_headers() + _STREAM_HEADERS
            scope.start_stream(headers, opening)
            await scope.forward(answer, events.feed)
            events.finish()
        except InvalidStream as error:
            raise WorkerCutShort(str(error)) from error
        finally:
            scope.record.kv = Kv.LOCAL if job.handoff is None else events.kv
        scope.exchange.finish()


# Proxies in between must neither store a stream nor collect it before passing it on.
_STREAM_HEADERS = header_block([(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])


def _unknown_model(model: str, known: Iterable[str]) -> str:
    return f"the model '{model[:100]}' does not exist; there is: {', '.join(known)}"


def _prefill_body(job: _Job, form: TokenIds | None) -> MakeBody:
    if form is None:
        return job.bodies.prefill
    return functools.partial(job.bodies.prefill, asks_ids=True)


def _may_be_refusal(job: _Job, answer: Answer, worker: Worker) -> bool:
    """Whether an error may be due to a form that the worker announced and has not yet taken."""
    is_plain = job.is_plain or (worker.codec is JSON and not worker.token_ids)
    return answer.status in (400, 415, 422) and not is_plain and worker.proven_epoch != worker.epoch


def _handoff(answer: Answer, content: bytes, *, has_ids: bool = False) -> Handoff:
    try:
        if answer.headers.get(b"content-type") == b"application/msgpack":
            return handoff_from_msgpack(content)
        return handoff_from(content, has_ids=has_ids)
    except InvalidHandoff as error:
        raise WorkerGarbage(str(error)) from error


def _worker_answered(answer: Answer, content: bytes) -> WorkerAnswered:
    return WorkerAnswered(
        answer.status,
        content,
        content_type=answer.headers.get(b"content-type", b"application/json"),
        retry_after=answer.headers.get(b"retry-after"),
    )


def _content_type(answer: Answer) -> bytes:
    """The worker's, as a header block: no line break gets through the parser."""
    return b"content-type: %b\r\n" % answer.headers.get(b"content-type", b"application/json")


def _mended(content: bytes, handoff: Handoff) -> tuple[Kv, bytes]:
    try:
        return mended(content, handoff.prefill_cached_tokens)
    except InvalidAnswer as error:
        raise WorkerGarbage(str(error)) from error


def _events(job: _Job) -> EventStream:
    if job.handoff is None:
        return EventStream()
    return EventStream(
        hides_usage=job.bodies.asks_hidden_usage, cached_tokens=job.handoff.prefill_cached_tokens
    )


async def _opening(answer: Answer, events: EventStream) -> bytes:
    """The stream until it says something, which is looked at: it may be an error, and no head is sent yet."""
    opening = b""
    while not has_begun(opening):
        chunk = await answer.chunk()
        if not chunk:
            raise InvalidStream("the worker's stream ended before its first event")
        opening += events.feed(chunk)
    if error := opening_error(opening):
        raise WorkerAnswered(error_status(error), encode_document(error))
    return opening
