"""A request runs through permit, plan, prefill, hand-off and decode; and again, elsewhere, when a leg is
lost.

What is owed at each point, and who pays it, when the client leaves or something fails:

| point | owed | paid by |
|---|---|---|
| prefill leg under way | the worker stops | it is asked to; an answer that still comes is released |
| prefill has answered, decode not sent | prefill's pinned blocks | a release leg, in the background |
| decode refused the leg (4xx, 503) | the same: it never looked at the hand-off | a release leg |
| decode leg sent, no answer yet | both workers stop | it is asked to; its end says where the blocks are |
| decode worker answers | it stops | its connection is closed |
| decode leg lost | the rest of the answer | another attempt, from prefill on; the lease runs out |
| both sent at once, one of them lost | the other worker stops | it is asked to; that frees the blocks |

What follows a failure is decided in `legs/retry.py`; what becomes of a hand-off is kept in
`legs/ledger.py`. What a leg has seen of its worker the leg itself tells, at its end (`legs/leg.py`).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from msgspec.json import encode

from orchestrator.api.base import Endpoint
from orchestrator.api.holders import mark_of
from orchestrator.api.upload import MODEL, Upload
from orchestrator.api.view import InvalidRequest, RequestView
from orchestrator.config.options import LimitsConfig, RoutingConfig
from orchestrator.errors import (
    BatonError,
    ClientError,
    NotFound,
    Poison,
    Unavailable,
    UnknownModel,
    UploadLost,
    WorkerAnswered,
    WorkerCutShort,
    WorkerError,
    WorkerOut,
)
from orchestrator.failover.failover import CutStream, Failover
from orchestrator.http.ids import REQUEST_ID_HEADER
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.base import Connector, Handoff, InvalidHandoff
from orchestrator.legs.dispatch import Dispatcher
from orchestrator.legs.handoff_watch import HandoffWatch
from orchestrator.legs.ledger import KvLease, LeaseLedger
from orchestrator.legs.leg import MAX_PREFILL_ANSWER_BYTES, AnswerLeg, HolderLeg, Legs, PrefillLeg
from orchestrator.legs.parallel import ParallelPrefill
from orchestrator.legs.releases import Releases
from orchestrator.legs.retry import Failure, Retries, RetryBudget, failure_of
from orchestrator.legs.upload_leg import UploadLeg
from orchestrator.relay.admission import Admission
from orchestrator.relay.admitted import AdmittedRequest
from orchestrator.relay.outcomes import tell_ended, tell_failed, tell_prefilled
from orchestrator.relay.relayed import PRIORITY
from orchestrator.relay.respond import Responder
from orchestrator.relay.route import Route
from orchestrator.relay.scope import RequestScope
from orchestrator.relay.turns import MOST_BEHIND_S, behind_s, work_s
from orchestrator.relay.waiting import Charge, Demand
from orchestrator.routing.dry_run import explain
from orchestrator.routing.overrides import BEGIN as OVERRIDE
from orchestrator.routing.overrides import Overrides
from orchestrator.routing.plan import Plan
from orchestrator.routing.policies.base import Choice
from orchestrator.telemetry.counters import RetryReason, Telemetry
from orchestrator.telemetry.record import FailedAttempt, LoggedRequest, Path, RequestRecord, Trail
from orchestrator.wire.headers import header_block
from orchestrator.wire.info import TokenIdsForm
from orchestrator.workers.adapters import Adapters
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import IN_SERVICE
from orchestrator.workers.worker import Worker

# Looking a member up in its enumeration costs as much as a call.
_DISAGGREGATED: Final = Path.DISAGGREGATED
_AGGREGATED: Final = Path.AGGREGATED
# Tokens of an answer that names no limit: published traces have 211 to 343 (Azure 2023, Mooncake).
_USUAL_ANSWER: Final = 256
_DIGITS: Final = 20  # more are no number that anybody reckons with
_EXPLAIN_S: Final = 0.1  # between two requests whose choices are explained for whoever asks later
_MOST_EXPLAINED: Final = 32  # workers: more are explained at /admin/explain alone
_MOST_NAME: Final = 256  # bytes of a client's name for its request that are kept
_DIGEST_CHARS: Final = 16  # of a request's digest in the log: enough to tell it from all others
_log: Final = logging.getLogger("baton.flow")


class Asked:
    """All that decides what would become of a request."""

    __slots__ = ("avoid", "holder", "route", "view", "whole_reason")

    def __init__(
        self,
        view: RequestView,
        route: Route,
        whole_reason: str | None,
        avoid: tuple[Worker, ...],
        holder: Worker | None = None,
    ) -> None:
        """`holder` is given if it alone can serve the request. Others are as in `Planner.plan`."""
        self.view = view
        self.route = route
        self.whole_reason = whole_reason
        self.avoid = avoid
        self.holder = holder


class Flow:
    """It serves requests; one per process. `aclose` waits for releases under way."""

    def __init__(
        self,
        routes: Mapping[str, Route],
        dispatcher: Dispatcher,
        admission: Admission,
        telemetry: Telemetry,
        routing: RoutingConfig,
        limits: LimitsConfig,
    ) -> None:
        """`routes` are by model."""
        self._routes = routes
        self._dispatcher = dispatcher
        self._telemetry = telemetry
        self.ledger = LeaseLedger(telemetry, dispatcher.time, routing.kv_lease_s)
        self._releases = Releases(dispatcher, self.ledger)
        max_kept_bytes = limits.max_kept_bytes if routing.failover else 0
        self._failover = Failover(dispatcher, max_bytes=max_kept_bytes)
        self._responder = Responder(self._releases, self._failover)
        self._retry_budget = RetryBudget(lambda: admission.admitted)
        self._watch = HandoffWatch(dispatcher, self._retry_budget, self._releases.start)
        self.ledger.watch = self._watch
        self._aliases: Mapping[str, str] = {}
        self._overrides = Overrides(dispatcher.registry, routing)
        self._orders_prefills = routing.prefill_order == "shortest"
        self._explains_at = 0.0
        self._wall_s = time.time() - dispatcher.time()  # from our clock to everybody's
        self.reconfigure(routing, limits)

    def rename(self, aliases: Mapping[str, str]) -> None:
        """Let clients name models and adapters by these aliases from now on."""
        self._aliases = aliases

    def reconfigure(self, routing: RoutingConfig, limits: LimitsConfig) -> None:
        """Go by these sections from now on, but for what needs a restart."""
        self._routing = routing
        self._limits = limits
        for route in self._routes.values():
            route.planner.reconfigure(routing)
        self._overrides.reconfigure(routing)
        self._responder.reconfigure(routing, limits)
        self._watch.reconfigure(routing)

    async def serve(self, scope: RequestScope, body: bytes) -> None:
        """Answer one request through its scope. Raises `BatonError`."""
        if scope.endpoint.asks_holder:
            return await self._ask_holder(scope)
        view = self._accept(scope, body)
        if scope.account is not None:
            scope.account.view = view
            if scope.account.tenant.counts_tokens:
                scope.account.charge(_expected_tokens(scope.endpoint, view), scope.now())
        if self._telemetry.keeps_requests and not scope.endpoint.needs_one_worker:
            scope.record.logged = LoggedRequest(view)
        self._telemetry.begin(scope.record)
        route = self._routes.get(view.model) or self._adapters_route(view.model)
        gate, charge = route.gate, None
        if gate.free > 0:  # then nobody waits, and this is a permit
            gate.free -= 1
        else:
            charge = await gate.wait(_demand(scope, view, route))
        try:
            request = self._begin(scope, view, route)
        except BaseException:
            gate.give_back(scope.record, charge)
            raise
        try:
            while True:
                leg = AnswerLeg(request.legs, request.plan.decode)
                try:
                    with leg:  # its seat is taken before prefill: one that has ended never waits for it
                        prefill = request.plan.prefill
                        if prefill is None:
                            return await self._responder.answer(request, leg)
                        if route.connector.sends_both_at_once:
                            return await self._serve_at_once(request, prefill, leg)
                        lease = _unused_lease(self.ledger, request)
                        if lease is None:
                            lease = await self._prefill(request, prefill, leg.worker)
                        else:
                            _keep_prefill(request, lease.worker)
                        leg.take(lease)
                        leg.check_in_service()
                        if lease.worker.revision != leg.worker.revision:
                            _check_pair(request, lease, leg)
                        return await self._responder.answer(request, leg)
                except (WorkerError, WorkerAnswered) as error:
                    self._allow_another(request, error, body)
                    if scope.has_begun and not await self._go_on(request, error):
                        return None
                    self._plan_again(request)
        finally:
            self._settle(request, charge)

    async def serve_upload(self, scope: RequestScope, upload: Upload) -> None:
        """Answer one request whose body may be large, through its scope. Raises `BatonError`.

        It has its permit, and with that its seat, from when the beginning of the form has come: what follows
        has nowhere else to go. A client that is slow to send the rest keeps the seat until the deadlines of
        bodies end it.
        """
        adapters = self._dispatcher.registry.adapters
        needs_model = bool(self._aliases) or _has_several_names(self._routes, adapters)
        await upload.begin(self._limits.max_body_bytes, needs_model=needs_model)
        scope.record.bytes_in = upload.kept_size
        if upload.is_whole:
            return await self.serve(scope, upload.hand_over())
        request, charge = await self._admit_upload(scope, upload)
        try:
            while True:
                leg = UploadLeg(request.legs, request.plan.decode, upload)
                try:
                    with leg:
                        return await self._responder.answer_upload(request, leg, upload)
                except (WorkerError, WorkerAnswered) as error:
                    if not upload.is_kept:
                        raise _upload_lost(request, error) from error
                    self._allow_another(request, error, upload.content())
                    self._plan_again(request)
        finally:
            self._settle(request, charge)

    async def _admit_upload(
        self, scope: RequestScope, upload: Upload
    ) -> tuple[AdmittedRequest, Charge | None]:
        """Wait for the permit of a form whose beginning is there, and choose who gets it."""
        view = self._accept(scope, upload.content()).without_body()
        upload.model = "" if upload.fields.get(MODEL) else view.model
        scope.record.is_stream = False  # nobody knows before the form is whole, and nothing is sent by then
        self._telemetry.begin(scope.record)
        route = self._route_of(view)
        gate, charge = route.gate, None
        if gate.free > 0:
            gate.free -= 1
        else:
            charge = await gate.wait(_demand(scope, view, route))
        try:
            return self._begin(scope, view, route), charge
        except BaseException:
            gate.give_back(scope.record, charge)
            raise

    async def aclose(self) -> None:
        await self._releases.aclose()

    # --- plan -----------------------------------------------------------------------------------

    def _accept(self, scope: RequestScope, body: bytes) -> RequestView:
        """Read what the client asks for, and of which model."""
        try:
            view = scope.endpoint.read(body, scope.exchange)
        except InvalidRequest as error:
            raise ClientError(error.message, param=error.param) from error
        if not view.model:
            view = view.for_model(_only(self._routes))
        route = self._routes.get(view.model)
        if route is None:
            target = self._aliases.get(view.model)
            if target is not None:
                view = view.for_model(target)
            route = self._routes.get(view.model)
            if route is None:
                route = self._adapters_route(view.model)
        record = scope.record
        record.model_index = route.index
        record.is_stream = view.is_stream and scope.endpoint.streams
        return view

    def _route_of(self, view: RequestView) -> Route:
        """Return where a request goes that was accepted."""
        return self._routes.get(view.model) or self._adapters_route(view.model)

    def _adapters_route(self, name: str) -> Route:
        """Return where the requests for an adapter go. Raises `UnknownModel`."""
        pools = self._dispatcher.registry.adapters.find(name)
        if pools is None:
            raise UnknownModel(_unknown_model(name, (*self._routes, *self._aliases)), param="model")
        base = self._routes[pools.model]
        return Route(base.index, pools, base.gate, base.planner, base.connector, name)

    def _begin(self, scope: RequestScope, view: RequestView, route: Route) -> AdmittedRequest:
        """Choose the workers. Nothing may come between the permit, this, and their seats."""
        record, endpoint = scope.record, scope.endpoint
        record.admitted = self._dispatcher.time()
        record.trail = trail = Trail()
        headers = scope.relayed_headers()
        if self._overrides.are_allowed or (headers and OVERRIDE in headers):  # or in a value
            route, headers = self._overridden(scope, route), _without_overrides(headers)
        plan = self._plan(scope, view, route, ())
        adapted, conversion = endpoint.adapt(view, scope.exchange)
        bodies = LegBodies(adapted, record.endpoint, route.connector, endpoint.form)
        legs = Legs(self._dispatcher, view.model, bodies, headers, _client_id(scope, view))
        trail.legs_id = legs.id
        if legs.client_id is not None:
            trail.client_id = _called(legs.client_id, view)
        if route.adapter:
            legs.model, legs.adapter = route.pools.model, route.adapter
        return AdmittedRequest(scope, view, route, legs, plan, conversion)

    def _overridden(self, scope: RequestScope, route: Route) -> Route:
        """Return where a request goes whose headers choose otherwise than the config. Raises
        `ClientError`.
        """
        wanted = self._overrides.wanted(scope.exchange.headers)
        if not wanted:
            return route
        planner = self._overrides.planner(route.planner, wanted)
        pools = self._overrides.pools(route.pools, wanted)
        return Route(route.index, pools, route.gate, planner, route.connector, route.adapter)

    def _plan_again(self, request: AdmittedRequest) -> None:
        """Choose other workers. Nothing may come between this and their seats."""
        legs = request.legs
        if legs.last is not None:
            legs.failed = (*(legs.failed or ()), legs.last)
        request.scope.record.attempts = attempts = legs.tried()
        attempts.count += 1
        request.plan = self._plan(request.scope, request.view, request.route, _avoided(request))
        self._tell_replaced(request)
        if request.plan.prefill is None or not _may_go_on(request):  # one that serves all of it pulls nothing
            self._forget_prefill(request)

    def _plan(self, scope: RequestScope, view: RequestView, route: Route, avoid: tuple[Worker, ...]) -> Plan:
        """Choose who serves the request, and note it in its record."""
        whole_reason = view.whole_reason
        most = route.pools.max_model_len
        if scope.endpoint.needs_one_worker or view.is_refusable or view.limit > most:
            whole_reason = _why_whole(scope.endpoint, view)
        mark = scope.endpoint.holder(view, scope.exchange) if scope.endpoint.has_holders else None
        if mark is not None:
            plan = _plan_for(self._holder(mark, route.pools.model, avoid))
        else:
            moment = self._dispatcher.time() if avoid else scope.record.admitted
            if moment >= self._explains_at:
                self._explain(scope.record, view, route, whole_reason, avoid)
            plan = route.planner.plan(view, route.pools, whole_reason, avoid)
        _note_plan(scope.record, plan)
        return plan

    def _explain(
        self,
        record: RequestRecord,
        view: RequestView,
        route: Route,
        whole_reason: str | None,
        avoid: tuple[Worker, ...],
    ) -> None:
        """Note for whoever asks later what the numbers of all workers are just before one is chosen: a few
        times a second, for it takes longer than to choose.
        """
        pools, trail = route.pools, record.trail
        workers = len(pools.prefill) + len(pools.decode) + len(pools.both) + len(pools.others)
        if trail is None or workers > _MOST_EXPLAINED:
            return
        self._explains_at = self._dispatcher.time() + _EXPLAIN_S
        try:
            trail.explained = encode(explain(route.planner, view, pools, whole_reason, avoid))
        except Exception:  # a bug of ours, or of a policy: the request goes on
            _log.exception("why workers are chosen for request %s cannot be told", record.request_id)

    def dry_run(self, scope: RequestScope, body: bytes, avoid: Collection[str]) -> Asked:
        """Return what is needed to tell what would become of a request, which is neither sent nor counted;
        workers with these names are avoided. Raises `BatonError`.
        """
        endpoint = scope.endpoint
        view = endpoint.read(b"", scope.exchange) if endpoint.asks_holder else self._accept(scope, body)
        mark = None
        if endpoint.asks_holder or endpoint.has_holders:
            mark = endpoint.holder(view, scope.exchange)
        if mark is not None:
            worker = self._holder(mark, None if endpoint.asks_holder else self._route_of(view).pools.model)
            return Asked(view, self._routes[worker.address.model], None, (), worker)
        route = self._overridden(scope, self._route_of(view))
        is_whole = endpoint.needs_one_worker or view.is_refusable or view.limit > route.pools.max_model_len
        whole_reason = _why_whole(endpoint, view) if is_whole else view.whole_reason
        return Asked(view, route, whole_reason, _named(self._dispatcher.registry, avoid))

    # --- what only one worker has ---------------------------------------------------------------

    def _holder(self, mark: str, model: str | None, avoid: tuple[Worker, ...] = ()) -> Worker:
        """Return the worker of this mark; of any model if none is given. Raises `NotFound`, and `Unavailable`
        if it cannot be asked now, or has failed the request.
        """
        workers = self._dispatcher.registry.workers
        found = [worker for worker in workers if mark_of(worker.name) == mark]
        if not found or (model is not None and found[0].address.model != model):
            raise NotFound("no worker of this model has what the request names", param="response_id")
        if found[0].state not in IN_SERVICE or found[0] in avoid:
            raise Unavailable("the only worker that has what the request names is not in service")
        return found[0]

    async def _ask_holder(self, scope: RequestScope) -> None:
        """Answer a request about what one worker holds. It waits for no seat: it computes nothing."""
        endpoint, exchange, record = scope.endpoint, scope.exchange, scope.record
        view = endpoint.read(b"", exchange)
        mark = endpoint.holder(view, exchange)
        if mark is None:
            raise NotFound(f"nothing is there at {exchange.path}")
        worker = self._holder(mark, None)
        route = self._routes[worker.address.model]
        record.model_index, record.is_stream = route.index, view.is_stream
        self._telemetry.begin(record)
        record.admitted = scope.now()
        record.trail = trail = Trail()
        plan = _plan_for(worker)
        _note_plan(record, plan)
        bodies = LegBodies(view, endpoint.target(exchange), route.connector, endpoint.form)
        headers = _without_overrides(scope.relayed_headers())
        legs = Legs(self._dispatcher, worker.address.model, bodies, headers)
        trail.legs_id = legs.id
        leg = HolderLeg(legs, worker, endpoint.method)
        request = AdmittedRequest(scope, view, route, legs, plan, None)
        try:
            with leg:
                await self._responder.answer(request, leg)
        except (WorkerError, WorkerAnswered) as error:
            _note_attempt(request, error)
            raise

    # --- attempts -------------------------------------------------------------------------------

    async def _serve_at_once(self, request: AdmittedRequest, worker: Worker, leg: AnswerLeg) -> None:
        """Send both legs at the same time; prefill answers when its KV cache has gone over."""
        transfer = self._dispatcher.ids.fresh()
        leg.handoff = _pair(request.route.connector, transfer, worker)
        prefill = PrefillLeg(request.legs, worker, leg.worker, None, transfer)
        if self._orders_prefills:
            self._order(request, prefill)
        with ParallelPrefill(prefill, leg, self._releases, lambda: _note_gone_over(request)):
            await self._responder.answer(request, leg)

    async def _prefill(self, request: AdmittedRequest, worker: Worker, decode: Worker) -> KvLease:
        """Have the prompt's KV cache made for `decode`. Raises as `Leg.read` does."""
        scope, gives_ids = request.scope, worker.abilities.token_ids
        ids_form = self._ids_form(request, worker, decode) if gives_ids else None
        leg = PrefillLeg(request.legs, worker, decode, ids_form)
        if self._orders_prefills:
            self._order(request, leg)
        with leg:
            scope.watch(leg)
            request.legs.last = worker
            try:
                content = await leg.read(MAX_PREFILL_ANSWER_BYTES)
            except BaseException:
                self._releases.abandon_prefill(leg)
                raise
            leg.succeed()
            leg.lease = lease = self.ledger.lease(worker, leg.handoff(content))
            if request.plan.wants_ends:
                tell_prefilled(request.plan, lease.handoff, lease.opened)
        request.prefill = leg
        if request.first_handoff is None:
            request.first_handoff = lease.handoff
        request.note_prefilled(lease.opened, leg.sent)
        return lease

    def _order(self, request: AdmittedRequest, leg: PrefillLeg) -> None:
        """Give a leg its turn in the engine's queue, in milliseconds of the wall clock: workers may have
        other orchestrators, too.
        """
        choice = request.plan.prefill_choice
        own_s = -1.0 if choice is None else choice.own_s()
        if own_s < 0.0:
            own_s = work_s(request.view.prompt_tokens(), 0.0, 0.0)
        came = request.scope.record.received + self._wall_s
        leg.stand_behind(int((came + behind_s(own_s, MOST_BEHIND_S)) * 1000))

    def _ids_form(self, request: AdmittedRequest, prefill: Worker, decode: Worker) -> TokenIdsForm | None:
        """Return how the prompt's token ids go from worker to worker; None if they do not."""
        if not (self._routing.tokenize_once and request.legs.bodies.takes_ids):
            return None
        taken = decode.abilities.token_ids
        return next((form for form in prefill.abilities.token_ids if form in taken), None)

    # --- when a leg has failed ------------------------------------------------------------------

    def _allow_another(
        self, request: AdmittedRequest, error: WorkerError | WorkerAnswered, body: bytes
    ) -> None:
        """Raise `error` for good if what has failed is not to be tried again, or `Poison`."""
        failure = failure_of(error)
        _note_attempt(request, error)
        if request.plan.wants_ends:
            tell_failed(request, failure)
        if not self._may_help(request, failure):
            raise error
        if request.retries is None:
            request.retries = Retries(self._retry_budget)
        if self._is_poison(request, request.retries, failure):
            raise self._poison(request, request.retries.lost, body) from error
        if not request.retries.allows(failure):
            error.should_retry = False
            raise error
        if failure in (Failure.LATE, Failure.STALLED):
            request.legs.tried().handoff_given_up = failure.name.lower()
        if failure is not Failure.UNREACHABLE:  # nothing was written: the hand-off is unused
            self._forget_prefill(request)
        self._telemetry.retry(_retry_reason(request))

    def _tell_replaced(self, request: AdmittedRequest) -> None:
        """Tell the person on call that another worker gets what one has failed."""
        attempts = request.legs.attempts
        if attempts is not None and attempts.failed:
            attempt, record = attempts.failed[-1], request.scope.record
            kind = "request.resumed" if request.scope.has_begun else "request.resent"
            what = f"{attempt.worker} has failed request {record.request_id}: {attempt.outcome}"
            self._telemetry.tell(kind, f"{what} after {attempt.seconds:.1f} s", attempt.worker)

    def _is_poison(self, request: AdmittedRequest, retries: Retries, failure: Failure) -> bool:
        last = request.legs.last
        return last is not None and retries.is_poison(
            failure, last.name, was_in_service=request.legs.was_in_service
        )

    def _poison(self, request: AdmittedRequest, lost: list[str], body: bytes) -> Poison:
        """Log the request by its digest, by which it can be found; its text is nobody's but the client's."""
        self._telemetry.poison()
        request_id = request.scope.record.request_id
        self._telemetry.tell(
            "request.poison", f"request {request_id} is not sent on: {' and '.join(lost)} were lost with it"
        )
        _log.warning(
            "request %s is not sent on: %s were lost with it; SHA-256 of its body: %s...",
            request_id,
            " and ".join(lost),
            hashlib.sha256(body).hexdigest()[:_DIGEST_CHARS],
        )
        return Poison(f"{len(lost)} workers were lost with this request: it is not sent to another one")

    def _may_help(self, request: AdmittedRequest, failure: Failure) -> bool:
        """Tell whether another attempt may help: a worker that has answered is not asked the same again."""
        if failure in (Failure.UNREACHABLE, Failure.LOST, Failure.LATE, Failure.STALLED):
            return True
        if failure is Failure.REFUSED:
            return False
        if failure is Failure.FAILED and request.prefill is not None:
            return True  # prefill runs again, and it may have been the hand-off
        legs = request.legs
        role = legs.last.address.role if legs.last is not None else "decode"
        return any(not legs.has_failed(worker) for worker in getattr(request.route.pools, role))

    async def _go_on(self, request: AdmittedRequest, cause: WorkerError | WorkerAnswered) -> bool:
        """Have the legs to come make the rest of the stream; False if only its end was missing: it is sent.

        Raises `cause`, or why nobody can go on with the stream.
        """
        scope, last = request.scope, request.legs.last
        if last is None:
            raise cause
        cut = CutStream(
            request.view, scope.transcript, request.first_handoff, request.legs, last, scope.watch
        )
        cut.revision = request.revision
        rest = await self._failover.rest_of(cut, cause)
        if rest.bodies is None:
            scope.end_stream(rest.end)
            return False
        request.legs.bodies, request.continuation = rest.bodies, rest.continuation
        return True

    def _forget_prefill(self, request: AdmittedRequest) -> None:
        """Go on without the hand-off, or end: what is held of it goes back."""
        prefill, request.prefill = request.prefill, None
        if prefill is not None:
            self._releases.settle(prefill)

    def _settle(self, request: AdmittedRequest, charge: Charge | None) -> None:
        """Give back what the request holds, for it has ended, and what was charged for its seat."""
        if request.plan.wants_ends:
            tell_ended(request)
        record = request.scope.record
        request.route.gate.give_back(record, charge)
        if record.logged is not None and request.first_handoff is not None:
            record.logged.cached_tokens = request.first_handoff.prefill_cached_tokens
        if record.trail is not None:
            _note_handoff(record.trail, request)
        if request.prefill is not None:
            self._releases.settle(request.prefill)
        if request.retries is not None:
            request.retries.close()
            if request.scope.record.status == 200:
                request.legs.count_denials()


def _named(registry: Registry, names: Collection[str]) -> tuple[Worker, ...]:
    found = [registry.find(name) for name in names]
    if None in found:
        raise ClientError(f"there is no worker of one of these names: {', '.join(names)}", param="avoid")
    return tuple([worker for worker in found if worker is not None])


def _may_go_on(request: AdmittedRequest) -> bool:
    """Tell whether the worker that is planned now may have the hand-off that there is, if there is one."""
    prefill = request.prefill
    return prefill is None or request.route.planner.go_together(prefill.worker, request.plan.decode)


def _avoided(request: AdmittedRequest) -> tuple[Worker, ...]:
    """Return who is not to have the next attempt if there is anybody else: who has failed the request, and
    for the rest of a stream workers of other revisions than that which has begun it.
    """
    failed = request.legs.failed or ()
    if not request.scope.has_begun:
        return failed
    return (*failed, *request.route.planner.strangers(request.revision, request.route.pools, failed))


def _check_pair(request: AdmittedRequest, lease: KvLease, leg: AnswerLeg) -> None:
    """Raise `WorkerOut` if the decode worker has come back as another revision while others were waited for:
    what was prefilled is not for it.
    """
    if not request.route.planner.go_together(lease.worker, leg.worker):
        request.legs.last = leg.worker
        raise WorkerOut(f"{leg.worker.name} is of another revision now than the prefill that it was to have")


def _keep_prefill(request: AdmittedRequest, worker: Worker) -> None:
    """Have the plan and the record name who has prefilled, for nobody does so again."""
    request.plan.keep_prefill(worker, request.scope.now())
    request.scope.record.prefill_worker = worker.name


def _unused_lease(ledger: LeaseLedger, request: AdmittedRequest) -> KvLease | None:
    """Return the lease of an earlier attempt, if its hand-off may still be sent."""
    if request.prefill is None:
        return None
    lease = request.prefill.lease
    return lease if lease is not None and ledger.is_good(lease) else None


def _upload_lost(request: AdmittedRequest, error: WorkerError | WorkerAnswered) -> BatonError:
    """Return what the client is told of a leg that has failed, which cannot be sent again from here."""
    _note_attempt(request, error)
    if request.plan.wants_ends:
        tell_failed(request, failure_of(error))
    if isinstance(error, WorkerCutShort):
        return UploadLost("the worker was lost, and not all that it had of the upload is kept: send it again")
    return error


def _note_gone_over(request: AdmittedRequest) -> None:
    """Note that a prefill leg beside its decode leg has answered."""
    request.note_prefilled(request.scope.now(), 0.0)
    if request.plan.wants_ends:
        tell_prefilled(request.plan, None, request.scope.now())


def _pair(connector: Connector, transfer: str, prefill: Worker) -> Handoff:
    address = prefill.address
    try:
        return connector.pair(transfer, address.host, address.side_channel_port)
    except InvalidHandoff as error:
        raise Unavailable(f"{prefill.name} cannot hand over: {error}") from error


def _only(models: Iterable[str]) -> str:
    """Return the model of a request that names none: the only one, as vLLM has it. Raises `ClientError`."""
    known = list(models)
    if len(known) > 1:
        raise ClientError(f"the field 'model' is required; there is: {', '.join(known)}", param="model")
    return known[0]


def _has_several_names(models: Collection[str], adapters: Adapters) -> bool:
    """Tell whether it depends on the name that a request gives where it goes."""
    return len(models) > 1 or any(adapters.of_model(name) for name in models)


def _unknown_model(model: str, known: Iterable[str]) -> str:
    return f"the model '{model[:100]}' does not exist; there is: {', '.join(known)}"


def _client_id(scope: RequestScope, view: RequestView) -> bytes | None:
    """Return what the client calls its request, as `Legs` takes it.

    vLLM goes by the head before the body, and takes whatever stands there.
    """
    given = scope.exchange.header(REQUEST_ID_HEADER)
    if given is not None:
        return header_block([(REQUEST_ID_HEADER, given)])
    return b"" if "request_id" in view.own else None


def _called(client_id: bytes, view: RequestView) -> bytes:
    """Return what a request is called by its client; b"" for what is too long to be kept."""
    called = client_id or bytes(view.field("request_id") or b"")
    return called if len(called) <= _MOST_NAME else b""


def _demand(scope: RequestScope, view: RequestView, route: Route) -> Demand:
    """Return what a request asks of the gate."""
    record = scope.record
    demand = Demand(view.prompt_tokens(), record.bytes_in, scope.deadline, record.is_stream)
    if scope.account is not None:
        demand.tenant = scope.account.tenant
    gate = route.gate
    if gate.weighs:
        new = route.planner.new_tokens(view) if gate.is_ordered else demand.tokens
        demand.work = work_s(new, demand.tokens, _answer_tokens(view))
        if gate.is_ordered:
            demand.priority = _priority(view)
    return demand


def _answer_tokens(view: RequestView) -> int:
    """Return how many tokens an answer may have."""
    limit = max(view.limit or _number(view.field("max_output_tokens")), 0) or _USUAL_ANSWER
    return limit * max(view.choices(), 1)


def _expected_tokens(endpoint: Endpoint, view: RequestView) -> int:
    """Return how many tokens a request may use, its prompt's among them."""
    return view.prompt_tokens() + (_answer_tokens(view) if endpoint.streams else 0)


def _without_overrides(headers: bytes) -> bytes:
    """Leave what is the orchestrator's out of a header block."""
    lines = headers.splitlines(keepends=True)
    return b"".join([line for line in lines if not line.startswith(OVERRIDE)])


def _priority(view: RequestView) -> int:
    """Return the priority of a request as vLLM takes it; what is none is for the worker to refuse."""
    value = view.header(PRIORITY)
    if value is not None:
        try:
            return int(value[:_DIGITS])
        except ValueError:
            pass
    return _number(view.field("priority"))


def _number(value: memoryview | None) -> int:
    """Return the number that a field has; 0 if it has none."""
    try:
        return 0 if value is None else int(bytes(value[:_DIGITS]).strip(b'"'))
    except ValueError:
        return 0


def _why_whole(endpoint: Endpoint, view: RequestView) -> str:
    """Return why one worker has to serve a request."""
    if endpoint.needs_one_worker:
        return "this endpoint needs one worker"
    if view.is_refusable:
        return view.whole_reason or "its decode worker is likely to refuse it"
    return view.whole_reason or "more tokens asked for than the model can have"


def _plan_for(worker: Worker) -> Plan:
    """Have the only worker that can do it do everything."""
    return Plan(None, Choice(worker, "it has what the request names"), "what the request names is there")


def _note_plan(record: RequestRecord, plan: Plan) -> None:
    record.decode_worker = plan.decode.name
    record.reasons = plan
    if plan.prefill is None:
        record.path = _AGGREGATED
        record.prefill_worker = None  # one of an earlier attempt has no part in this one
    else:
        record.path = _DISAGGREGATED
        record.prefill_worker = plan.prefill.name


def _note_handoff(trail: Trail, request: AdmittedRequest) -> None:
    """Note what came of the last prefill."""
    handoff, prefill = request.first_handoff, request.prefill
    if handoff is not None:
        trail.cached_tokens = handoff.prefill_cached_tokens
    if prefill is not None and prefill.lease is not None:
        trail.lease = prefill.lease.state


def _note_attempt(request: AdmittedRequest, error: WorkerError | WorkerAnswered) -> None:
    """Note in the record which worker has failed the request, and how long it had it."""
    legs, record, worker = request.legs, request.scope.record, request.legs.last
    if worker is None:
        return
    began = request.attempt_began or record.admitted
    if worker is not request.plan.prefill:
        began = max(began, record.prefill_done)
    attempt = legs.note_failed(worker, error, began)
    record.attempts = legs.attempts
    if attempt is not None:
        attempt.had_begun = request.scope.has_begun
        _move_moments(record, attempt)
    request.attempt_began = request.scope.now()


def _move_moments(record: RequestRecord, attempt: FailedAttempt) -> None:
    """Let the attempt that has failed have its moments, so that the next one begins with none."""
    trail, attempts = record.trail, record.attempts
    if trail is None or attempts is None:
        return
    attempt.prefill_worker = record.prefill_worker
    attempt.prefill_sent = trail.prefill_sent
    attempt.prefill_done = attempts.prefill_done or record.prefill_done
    if trail.decode_sent:
        attempt.answer_id = trail.answer_id
        attempt.decode_sent = trail.decode_sent
    trail.prefill_sent = trail.decode_sent = attempts.prefill_done = 0.0


def _retry_reason(request: AdmittedRequest) -> RetryReason:
    if request.scope.has_begun:
        return RetryReason.STREAM
    if request.plan.prefill is None:
        return RetryReason.WHOLE
    return RetryReason.PREFILL if request.legs.last is request.plan.prefill else RetryReason.DECODE
