"""A site is the orchestrator's own admission, registry, planner and policies, in front of simulated engines.

What `relay/flow.py` does with a request, without its bytes: a permit, a plan, a prefill leg, a decode leg;
and the ends of these, which policies and the gate hear of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Final, Protocol

from launch.simulate.engine import Engine, EngineModel
from launch.simulate.heap import VirtualClock
from launch.simulate.network import Network
from launch.simulate.tally import Tally
from launch.simulate.trace import Arrival
from launch.simulate.view import SimulatedRequest
from orchestrator.config.addresses import WorkerAddress, WorkerPlace, unmanaged, worker_places, zone_of
from orchestrator.config.options import Config, ModelConfig, RoutingConfig
from orchestrator.errors import BatonError, TooBusy, Unavailable
from orchestrator.relay.admission import SWEEP_S, Admission, Gate
from orchestrator.relay.waiting import Demand
from orchestrator.routing.plan import Plan
from orchestrator.routing.planner import Planner
from orchestrator.routing.policies.base import End, Outcome
from orchestrator.telemetry.counters import Layout, Telemetry
from orchestrator.telemetry.record import RequestRecord
from orchestrator.wire.info import Role, WorkerInfo
from orchestrator.workers.pools import Pools
from orchestrator.workers.registry import Registry
from orchestrator.workers.snapshot import WorkerSnapshot
from orchestrator.workers.states import NEVER, WorkerState
from orchestrator.workers.worker import Worker

TOLD_S: Final = 0.1  # how late a process hears of the choices of others, as in `processes/sharing.py`
ENDPOINT: Final = "/v1/chat/completions"


class Conditions:
    """What is not as the model has it."""

    __slots__ = ("network", "noise", "restarts", "shares", "slow")

    def __init__(
        self,
        *,
        noise: float = 0.1,
        slow: Mapping[str, float] | None = None,
        restarts: Sequence[tuple[float, str]] = (),
        shares: bool = True,
        network: Network | None = None,
    ) -> None:
        """`noise` is that of prefills (`Engine`). `slow` says how many times as long workers take. At the
        moments of `restarts`, in seconds from the first arrival, a worker loses its cache, and nobody is
        told. Several processes tell each other of their choices if `shares`. `network` has the zones.
        """
        self.network = network or Network()
        self.noise = noise
        self.slow = slow or {}
        self.restarts = restarts
        self.shares = shares


class Job:
    """This is a request on its way, and what became of it. Moments are the clock's, 0.0 for never."""

    __slots__ = (
        "arrival",
        "cached_tokens",
        "computed_s",
        "ended_at",
        "first_at",
        "front",
        "is_refused",
        "plan",
        "received_at",
        "record",
    )

    def __init__(self, arrival: Arrival, received_at: float, front: Front) -> None:
        self.arrival = arrival
        self.received_at = received_at
        self.front = front
        self.record = RequestRecord("", ENDPOINT, received_at)
        self.record.is_stream = True
        self.plan: Plan | None = None
        self.is_refused = False
        self.cached_tokens = 0
        self.computed_s = 0.0
        self.first_at = 0.0
        self.ended_at = 0.0


class Plans(Protocol):
    """Requests are planned by the orchestrator's planner, or by what stands before it in a comparison."""

    def plan(self, request: SimulatedRequest, pools: Pools, whole_reason: str | None) -> Plan:
        """Return who serves a request. Raises `Unavailable`."""

    def hear(self, role: Role, note: bytes) -> None:
        """Hear what another process has shared."""


class Front:
    """A front is one of the processes that serve: a gate and a planner of its own."""

    __slots__ = ("admission", "gate", "planner", "sweeps")

    def __init__(self, admission: Admission, gate: Gate, planner: Plans) -> None:
        self.admission = admission
        self.gate = gate
        self.planner = planner
        self.sweeps = False  # a sweep is due


class Turn:
    """A request that waits at a gate hears here that its wait is over."""

    __slots__ = ("_is_done", "_job", "_refusal", "_site")

    def __init__(self, site: Site, job: Job) -> None:
        self._site = site
        self._job = job
        self._is_done = False
        self._refusal: BatonError | None = None

    def done(self) -> bool:
        return self._is_done

    def cancelled(self) -> bool:
        return False

    def result(self) -> BatonError | None:
        return self._refusal

    def set_result(self, result: BatonError | None, /) -> None:
        """Let the request go on in an event of its own: the gate is at work now."""
        self._is_done, self._refusal = True, result
        clock = self._site.clock
        clock.at(clock.now, self._site.admitted if result is None else self._site.refuse, self._job)


class Site:
    """It serves arrivals; `jobs` are all that came, in the order in which they did."""

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        routing: RoutingConfig,
        engines: Mapping[Role, EngineModel],
        block_tokens: int,
        seed: int,
        conditions: Conditions,
        before: Callable[[Planner], Plans] | None = None,
    ) -> None:
        """The workers are those of the config's `model`, routed by `routing`; `engines` are what they run.
        `before` makes what stands before the planner, if anything does.
        """
        self.clock = VirtualClock()
        self.jobs: list[Job] = []
        self.tally: Tally | None = None  # counts, if somebody wants that
        self._model = model.name
        self._block_tokens = block_tokens
        self._timeout_s = config.orchestrator.limits.request_timeout_s
        self._random = Random(f"front {seed}")  # noqa: S311  # no secret
        self._make_engine = partial(self._engine, engines, seed, conditions)
        config = config.model_copy(update={"models": [model], "routing": routing})
        self._network = conditions.network
        registry = self.registry = _registry(config, engines, self.clock, conditions.network)
        self._pools = registry.pools[model.name]
        self.engines = {worker: self._make_engine(worker) for worker in registry.workers}
        self._before = before
        self.fronts = self._made_fronts(config, routing, registry, seed, conditions)
        for moment, name in conditions.restarts:
            self.clock.at(self.clock.now + moment, self._restart, name)

    def _engine(
        self, engines: Mapping[Role, EngineModel], seed: int, conditions: Conditions, worker: Worker
    ) -> Engine:
        return Engine(
            engines[worker.address.role],
            self._block_tokens,
            self.clock,
            Random(f"{worker.name} {seed}"),  # noqa: S311  # no secret
            on_prefilled=self._prefilled,
            on_begun=self._begun,
            on_ended=self._ended,
            noise=conditions.noise,
            slowness=conditions.slow.get(worker.name, 1.0),
        )

    def _made_fronts(
        self, config: Config, routing: RoutingConfig, registry: Registry, seed: int, conditions: Conditions
    ) -> list[Front]:
        count = config.orchestrator.processes
        fronts: list[Front] = []
        for index in range(count):
            share = partial(self._share, index) if count > 1 and conditions.shares else None
            random = Random(f"planner {index} {seed}")  # noqa: S311  # no secret
            planner = Planner(self._model, routing, random=random, time=self.clock.time, share=share)
            plans = planner if self._before is None else self._before(planner)
            admission = _admission(config, registry, self.clock)
            fronts.append(Front(admission, admission.gates[self._model], plans))
        return fronts

    # --- several processes ----------------------------------------------------------------------

    def _share(self, index: int, model: str, role: Role, note: bytes) -> None:
        self.clock.at(self.clock.now + TOLD_S, self._tell, (index, role, note))

    def _tell(self, told: tuple[int, Role, bytes]) -> None:
        teller, role, note = told
        for index, front in enumerate(self.fronts):
            if index != teller:
                front.planner.hear(role, note)

    # --- a request ------------------------------------------------------------------------------

    def run(self, moments: Sequence[tuple[float, Arrival]]) -> None:
        """Serve what comes at these moments, in seconds from the start, and what comes after it."""
        start = self.clock.now
        for at_s, arrival in moments:
            self.clock.at(start + at_s, self._arrive, arrival)
        self.clock.run()

    def _arrive(self, arrival: Arrival) -> None:
        fronts = self.fronts
        front = fronts[0] if len(fronts) == 1 else self._random.choice(fronts)
        job = Job(arrival, self.clock.now, front)
        self.jobs.append(job)
        gate = front.gate
        if gate.take():
            self.admitted(job)
        elif not gate.seats:
            gate.free -= 1
            self.admitted(job)
        else:
            self._wait(job)

    def _wait(self, job: Job) -> None:
        tokens = job.arrival.prompt_tokens
        demand = Demand(tokens, 4 * tokens, job.received_at + self._timeout_s, is_stream=True)
        try:
            job.front.gate.enqueue(demand, Turn(self, job))
        except TooBusy:
            self.refuse(job)
            return
        self._keep_sweeping(job.front)

    def _keep_sweeping(self, front: Front) -> None:
        if front.gate.waiting and not front.sweeps:
            front.sweeps = True
            self.clock.at(self.clock.now + SWEEP_S, self._sweep, front)

    def _sweep(self, front: Front) -> None:
        front.sweeps = False
        front.gate.sweep()
        self._keep_sweeping(front)

    def refuse(self, job: Job) -> None:
        """Note that a request is not served."""
        job.is_refused = True
        self._follow(job)

    def admitted(self, job: Job) -> None:
        """Have a request served that has its permit."""
        job.record.admitted = self.clock.now
        if self.tally is not None:
            self.tally.entered += 1
        request = SimulatedRequest(self._model, job.arrival, self._block_tokens)
        try:
            plan = job.plan = job.front.planner.plan(request, self._pools, None)
        except Unavailable:
            job.front.gate.give_back(job.record)
            self.refuse(job)
            return
        plan.decode.count_leg(1)
        if plan.prefill is None:
            self.engines[plan.decode].prefill(job, is_whole=True)
        else:
            plan.prefill.count_leg(1)
            self.engines[plan.prefill].prefill(job, is_whole=False)

    def _prefilled(self, job: Job) -> None:
        plan = job.plan
        choice = None if plan is None else plan.prefill_choice
        assert plan is not None and choice is not None  # noqa: S101, PT018  # for the type checker
        choice.ended(Outcome(End.ANSWERED, self.clock.now, job.cached_tokens))
        choice.worker.count_leg(-1)
        job.record.prefill_done = self.clock.now
        factor = self._network.factor(choice.worker.zone, plan.decode.zone)
        self.engines[plan.decode].receive(job, factor)

    def _begun(self, job: Job) -> None:
        plan = job.plan
        if plan is not None and plan.links is not None:
            plan.begun(job.record.prefill_done or job.record.admitted, self.clock.now)

    def _ended(self, job: Job) -> None:
        plan = job.plan
        assert plan is not None  # noqa: S101  # for the type checker
        job.ended_at = self.clock.now
        plan.decode.count_leg(-1)
        plan.close(self.clock.now, End.ANSWERED)
        job.record.first_byte = job.first_at
        job.front.gate.give_back(job.record)
        if self.tally is not None:
            self.tally.note(job)
        self._follow(job)

    def _follow(self, job: Job) -> None:
        """Have what comes after a request come."""
        after = job.arrival.after
        if after is not None:
            self.clock.at(self.clock.now + after.pause_s, self._arrive, after)

    # --- what happens to workers ----------------------------------------------------------------

    def add(self, role: Role) -> Worker:
        """Have one worker more, which starts; the registry's judge lets it serve once it is ready."""
        model = self._model
        index = self.registry.next_index(model, role)
        worker = self.registry.add(unmanaged(model, role, index, f"http://{role}-{index}:1", None))
        self.engines[worker] = self._make_engine(worker)
        return worker

    def _restart(self, name: str) -> None:
        for worker, engine in self.engines.items():
            if worker.name == name:
                engine.cache.clear()


def _registry(
    config: Config, engines: Mapping[Role, EngineModel], clock: VirtualClock, network: Network
) -> Registry:
    """Make the registry, and have it know that all workers are ready, as a process hears it."""
    addresses = [_address(place, network) for place in worker_places(config)]
    models = [model.name for model in config.models]
    registry = Registry(
        addresses,
        models,
        "json",
        health=config.health,
        routing=config.routing,
        time=clock.time,
        random=Random(0),  # noqa: S311  # no secret
    )
    registry.follow(
        [
            WorkerSnapshot(
                address=address,
                slot=slot,
                state=WorkerState.READY,
                epoch=1,
                is_drained=False,
                warm_from=NEVER,
                info=_info(address.model, address.role, engines[address.role]),
                max_model_len=None,
                last_error=None,
            )
            for slot, address in enumerate(addresses)
        ]
    )
    return registry


def _address(place: WorkerPlace, network: Network) -> WorkerAddress:
    """Return the address of a worker by its name: nobody will connect to it."""
    zone = network.zone(place.index, zone_of(place))
    return unmanaged(place.model.name, place.role, place.index, "http://127.0.0.1:1", None, zone)


def _info(model: str, role: Role, engine: EngineModel) -> WorkerInfo:
    return WorkerInfo(
        role=role,
        model=model,
        decodes=["json"],
        engine="sim",
        engine_version="0",
        kv_tokens=engine.kv_tokens,
    )


def _admission(config: Config, registry: Registry, clock: VirtualClock) -> Admission:
    """Make the admission of a process; it follows the workers."""
    (model,) = config.models
    return Admission(
        registry.pools,
        config.orchestrator.queue,
        seats={model.name: {role: pool.seats for role, pool in model.pools()}},
        processes=config.orchestrator.processes,
        telemetry=Telemetry(Layout([model.name], [])),
        time=clock.time,
    )
