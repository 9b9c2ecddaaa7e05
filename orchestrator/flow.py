"""The story of a request: permit, plan, prefill, hand-off, decode; and again, elsewhere, when a leg is lost.

What is owed at each point, and who pays it, when the client leaves or something fails:

| point | owed | paid by |
|---|---|---|
| prefill leg under way | the worker stops | it is asked to; an answer that still comes is released |
| prefill has answered, decode not sent | prefill's pinned blocks | a release leg, in the background |
| decode refused the leg (4xx, 503) | the same: it never looked at the hand-off | a release leg |
| decode leg sent, no answer yet | both workers stop | it is asked to; its end says where the blocks are |
| decode worker answers | it stops | its connection is closed |
| decode leg lost | the rest of the answer | another attempt, from prefill on; the lease runs out |

What follows a failure is decided in `retry.py`; what becomes of a hand-off is kept in `ledger.py`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from orchestrator.admission import Admission, Demand, Gate, prompt_tokens
from orchestrator.config import LEASE_S
from orchestrator.dispatch import (
    Dispatcher,
    MakeBody,
    may_be_refusal,
    note_unreachable,
    worker_answered,
)
from orchestrator.embeddings import PATH as EMBEDDINGS
from orchestrator.embeddings import Embeddings, Wanted, ask_base64, wanted_of
from orchestrator.endpoints import ENDPOINTS, Serving
from orchestrator.errors import (
    BatonError,
    ClientError,
    KvMissing,
    Poison,
    UnknownModel,
    WorkerAnswered,
    WorkerCutShort,
    WorkerError,
    WorkerGarbage,
    WorkerOut,
)
from orchestrator.failover import Failover
from orchestrator.headers import header_block
from orchestrator.ids import IdSource
from orchestrator.job import Job
from orchestrator.ledger import KvLease, LeaseLedger
from orchestrator.offload import Offload
from orchestrator.record import Path
from orchestrator.relay import RequestScope
from orchestrator.releases import MAX_PREFILL_ANSWER_BYTES, Releases, is_unread, read_handoff
from orchestrator.retry import Failure, Retries, RetryBudget, failure_of
from orchestrator.routing.planner import Plan, Planner
from orchestrator.states import IN_SERVICE, SERVING, WorkerState
from orchestrator.telemetry import LeaseState, RetryReason, Telemetry
from orchestrator.transport.base import Answer, Upstream
from orchestrator.wire.info import TOKEN_IDS_HEADER, TokenIds
from orchestrator.wire.legs import LegBodies
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
from orchestrator.wire.view import InvalidRequest, RequestView, view_request
from orchestrator.workers import Registry, Worker

# Looking a member up in its enumeration costs as much as a call.
_DISAGGREGATED: Final = Path.DISAGGREGATED
_AGGREGATED: Final = Path.AGGREGATED
_READY: Final = WorkerState.READY
_USED: Final = LeaseState.USED
_ONE_LEG: Final = frozenset(path for path, serving in ENDPOINTS.items() if serving is Serving.ONE_LEG)
_ID_HEADERS: Final[dict[TokenIds | None, bytes]] = {
    None: b"",
    "list": b"",
    "base64": header_block([(TOKEN_IDS_HEADER.lower().encode(), b"base64")]),
    "bin": header_block([(TOKEN_IDS_HEADER.lower().encode(), b"bin"), (b"accept", b"application/msgpack")]),
}
# Indexed with the enumeration's numbers: a look-up by member is a call in Python.
_KV_HEADERS: Final = tuple(header_block([(b"x-baton-kv", kv.name.lower().encode())]) for kv in Kv)
_DIGEST_CHARS: Final = 16  # of a request's digest in the log: enough to tell it from all others
_log: Final = logging.getLogger("baton.flow")


class Flow:
    """Serves requests; one per process. `aclose` waits for releases under way and ends what was started."""

    def __init__(
        self,
        registry: Registry,
        planners: Mapping[str, Planner],
        upstream: Upstream,
        admission: Admission,
        *,
        telemetry: Telemetry,
        ids: IdSource,
        credential: str | None,
        max_answer_bytes: int,
        time: Callable[[], float],
        tokenizes_once: bool = True,
        kv_lease_s: float = LEASE_S,
        kv_missing: str = "warn",
        max_kept_bytes: int = 512 * 1024 * 1024,
    ) -> None:
        """`planners` by model. `credential` is what workers want as bearer token. `time` is the clock.

        `tokenizes_once`: decode workers that announce it get the prompt's token ids from the prefill worker.
        `kv_lease_s`: how long prefill workers pin blocks that nobody pulls.
        `kv_missing`: what follows when a decode worker computes the KV cache again; warn, fail or allow.
        `max_kept_bytes`: of what streams have sent, so that another worker can go on with them.
        """
        self._registry = registry
        self._planners = planners
        self._gates = admission.gates
        self._telemetry = telemetry
        self._ids = ids
        self._max_answer_bytes = max_answer_bytes
        self._tokenizes_once = tokenizes_once
        self._kv_missing = kv_missing
        self._models = {model: index for index, model in enumerate(registry.pools)}
        self._offload = Offload()
        self._embeddings = Embeddings(self._offload)
        self._dispatcher = Dispatcher(
            registry, upstream, self._offload, telemetry=telemetry, credential=credential
        )
        self.ledger = LeaseLedger(telemetry, time, kv_lease_s)
        self._releases = Releases(self._dispatcher, registry, self.ledger)
        self._failover = Failover(self._dispatcher, registry, max_bytes=max_kept_bytes)
        self._retry_budget = RetryBudget(lambda: admission.admitted)

    def reconfigure(
        self,
        planners: Mapping[str, Planner],
        *,
        max_answer_bytes: int,
        tokenizes_once: bool,
        kv_missing: str,
    ) -> None:
        """Go by these from now on; see `__init__`."""
        self._planners = planners
        self._max_answer_bytes = max_answer_bytes
        self._tokenizes_once = tokenizes_once
        self._kv_missing = kv_missing

    async def serve(self, scope: RequestScope, body: bytes) -> None:
        """Answer one request through its scope. Raises `BatonError`."""
        view = self._accept(scope, body)
        gate = self._gates[view.model]
        if gate.free > 0:  # then nobody waits, and this is a permit
            gate.free -= 1
        else:
            await gate.wait(_demand(scope, view))
        try:
            job = self._begin(scope, view, gate)
        except BaseException:
            gate.give_back(scope.record)
            raise
        try:
            while True:
                plan = job.plan
                try:
                    with plan.decode.lease():  # before prefill: one that has ended never waits for a seat
                        if plan.prefill is None:
                            return await self._serve_whole(job)
                        return await self._serve_in_two_legs(job, plan.prefill)
                except (WorkerError, WorkerAnswered) as error:
                    self._allow_another(job, error, body)
                    if scope.exchange.is_started and not await self._failover.go_on(job, error):
                        return None
                    self._plan_again(job)
        finally:
            self._settle(job)

    async def aclose(self) -> None:
        await self._releases.aclose()
        await self._offload.aclose()

    # --- plan -----------------------------------------------------------------------------------

    def _accept(self, scope: RequestScope, body: bytes) -> RequestView:
        """What the client asks for, and whom."""
        try:
            view = view_request(body)
        except InvalidRequest as error:
            raise ClientError(error.message, param=error.param) from error
        if view.model not in self._models:
            raise UnknownModel(_unknown_model(view.model, self._models), param="model")
        record = scope.record
        record.model_index = self._models[view.model]
        record.is_stream = view.is_stream and record.endpoint not in _ONE_LEG
        self._telemetry.begin(record)
        return view

    def _begin(self, scope: RequestScope, view: RequestView, gate: Gate) -> Job:
        """Choose the workers. Nothing may come between the permit, this, and their leases."""
        path = scope.exchange.path
        scope.record.admitted = scope.now()
        plan = self._plan(path, view)
        _note_plan(scope, plan)
        return Job(
            scope,
            view,
            LegBodies(view),
            gate=gate,
            plan=plan,
            id=self._ids.fresh(),
            headers=scope.relayed_headers(),
            path=path,
        )

    def _plan(self, path: str, view: RequestView, avoid: tuple[Worker, ...] = ()) -> Plan:
        whole_reason = "this endpoint needs one worker" if path in _ONE_LEG else view.whole_reason
        return self._planners[view.model].plan(self._registry.pools[view.model], whole_reason, avoid)

    # --- attempts -------------------------------------------------------------------------------

    def _allow_another(self, job: Job, error: WorkerError | WorkerAnswered, body: bytes) -> None:
        """Note what has failed; raise `error` for good if it is not to be tried again, or `Poison`."""
        failure, was_in_service = failure_of(error), job.worker.state in SERVING
        self._tell_registry(job, failure, error)
        if not self._may_help(job, failure):
            raise error
        if job.retries is None:
            job.retries = Retries(self._retry_budget)
        if job.retries.is_poison(failure, job.worker.name, was_in_service=was_in_service):
            raise self._poison(job, job.retries.lost, body) from error
        if not job.retries.allows(failure):
            error.should_retry = False
            raise error
        if failure is not Failure.UNREACHABLE:  # of which nothing was written: the hand-off is unused
            self._releases.settle(job)
        self._telemetry.retry(_retry_reason(job))

    def _poison(self, job: Job, lost: list[str], body: bytes) -> Poison:
        """Whoever looks for the request finds it by its digest; its text is nobody's but the client's."""
        self._telemetry.poison()
        _log.warning(
            "request %s is not sent on: %s were lost with it; SHA-256 of its body: %s...",
            job.scope.record.request_id,
            " and ".join(lost),
            hashlib.sha256(body).hexdigest()[:_DIGEST_CHARS],
        )
        return Poison(f"{len(lost)} workers were lost with this request: it is not sent to another one")

    def _plan_again(self, job: Job) -> None:
        """Choose other workers. Nothing may come between this and their leases."""
        job.avoid = (*job.avoid, job.worker)
        job.plan = self._plan(job.path, job.view, job.avoid)
        _note_plan(job.scope, job.plan)
        if job.plan.prefill is None:  # one worker serves it as a whole now: it pulls nothing
            self._releases.settle(job)

    def _may_help(self, job: Job, failure: Failure) -> bool:
        """Whether another attempt is a chance: a worker that has answered is not asked the same again."""
        if failure in (Failure.UNREACHABLE, Failure.LOST):
            return True
        if failure is Failure.REFUSED:
            return False
        if failure is Failure.FAILED and job.lease is not None:
            return True  # prefill runs again, and it may have been the hand-off
        pool = getattr(self._registry.pools[job.view.model], job.worker.address.role)
        return any(worker is not job.worker and worker not in job.avoid for worker in pool)

    def _tell_registry(self, job: Job, failure: Failure, error: BatonError) -> None:
        worker = job.worker
        if isinstance(error, WorkerOut):
            return  # the registry has told us
        if failure is Failure.UNREACHABLE:
            note_unreachable(self._registry, worker, error)
        elif failure is Failure.LOST:
            self._registry.note_lost(worker, job.epoch, repr(error.__cause__ or error))
        elif failure is Failure.FAILED:
            self._registry.note_error(worker)
        elif failure is Failure.BUSY and isinstance(error, WorkerAnswered) and error.retry_after_s:
            self._registry.pools[job.view.model].rest(worker, error.retry_after_s)

    def _settle(self, job: Job) -> None:
        """The request has ended: what it holds goes back."""
        job.gate.give_back(job.scope.record)
        if job.lease is not None:
            self._releases.settle(job)
        if job.retries is not None:
            job.retries.close()

    # --- one leg --------------------------------------------------------------------------------

    async def _serve_whole(self, job: Job) -> None:
        if job.scope.exchange.path == EMBEDDINGS and job.embeddings is None:
            job.embeddings = wanted_of(job.view, job.scope.exchange.header(b"accept"))
            if job.embeddings is not None:
                job.bodies = LegBodies(ask_base64(job.view))
        await self._answer(job, job.bodies.whole)

    # --- two legs -------------------------------------------------------------------------------

    async def _serve_in_two_legs(self, job: Job, prefill: Worker) -> None:
        lease = job.lease
        if lease is None or not self.ledger.is_good(lease):
            with prefill.lease():
                lease = job.lease = await self._prefill(job, prefill)
            if job.first_handoff is None:
                job.first_handoff = lease.handoff
            if not job.scope.exchange.is_started:
                job.scope.record.prefill_done = job.scope.now()
        self._look_again(job, job.plan.decode)
        handoff = lease.handoff
        await self._answer(job, lambda codec, model: job.bodies.decode(codec, model, handoff))

    def _look_again(self, job: Job, worker: Worker) -> None:
        """It was chosen before others were waited for. Raises `WorkerOut` if it has been lost since."""
        if worker.state is not _READY and worker.state not in IN_SERVICE:
            job.worker = worker
            raise WorkerOut(f"{worker.name} fell out of service before its leg was sent")

    async def _prefill(self, job: Job, worker: Worker) -> KvLease:
        form = self._form_of_ids(job, worker)
        while True:
            answer = await self._dispatcher.send(job, worker, _prefill_body(job, form), _ID_HEADERS[form])
            job.scope.watch(worker, answer)
            try:
                content = await answer.read(MAX_PREFILL_ANSWER_BYTES)
            except BaseException:
                self._releases.abandon_prefill(job, worker, answer)
                raise
            if answer.status == 200:
                self._dispatcher.note_success(job, worker)
                return self.ledger.lease(worker, read_handoff(answer, content, has_ids=form is not None))
            if not may_be_refusal(job, answer, worker):
                raise worker_answered(answer, content)
            self._look_again(job, worker)
            job.is_plain, form = True, None

    def _form_of_ids(self, job: Job, prefill: Worker) -> TokenIds | None:
        """How the prompt's token ids go from worker to worker; None if they do not."""
        if not (self._tokenizes_once and prefill.token_ids and job.bodies.takes_ids):
            return None
        return next((form for form in prefill.token_ids if form in job.plan.decode.token_ids), None)

    # --- the answer -----------------------------------------------------------------------------

    async def _answer(self, job: Job, make_body: MakeBody) -> None:
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
            self._look_again(job, worker)
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


# Proxies in between must neither store a stream nor collect it before passing it on.
_STREAM_HEADERS: Final = header_block([(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])


def _unknown_model(model: str, known: Iterable[str]) -> str:
    return f"the model '{model[:100]}' does not exist; there is: {', '.join(known)}"


def _demand(scope: RequestScope, view: RequestView) -> Demand:
    record = scope.record
    return Demand(prompt_tokens(view), record.bytes_in, scope.deadline, record.is_stream)


def _note_plan(scope: RequestScope, plan: Plan) -> None:
    record = scope.record
    record.decode_worker = plan.decode.name
    if plan.prefill is None:
        record.path = _AGGREGATED
    else:
        record.path = _DISAGGREGATED
        record.prefill_worker = plan.prefill.name


def _retry_reason(job: Job) -> RetryReason:
    if job.scope.exchange.is_started:
        return RetryReason.STREAM
    if job.plan.prefill is None:
        return RetryReason.WHOLE
    return RetryReason.PREFILL if job.worker is job.plan.prefill else RetryReason.DECODE


def _prefill_body(job: Job, form: TokenIds | None) -> MakeBody:
    if form is None:
        return job.bodies.prefill
    return functools.partial(job.bodies.prefill, asks_ids=True)


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
