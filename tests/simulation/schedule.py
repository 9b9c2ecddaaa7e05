"""What happens to a simulated cluster from outside, drawn from a seed before the run begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from random import Random

from orchestrator.wire.info import Role


class LegFault(Enum):
    """What a worker does to one leg instead of serving it."""

    REFUSE_400 = 400
    BUSY_429 = 429
    FAIL_500 = 500
    BUSY_503 = 503
    RESET = auto()  # before the head
    HANG = auto()
    NOT_HTTP = auto()
    NOT_JSON = auto()  # a 200 that is no answer
    RESET_MIDWAY = auto()  # after some tokens; a buffered answer, after half of it
    HANG_MIDWAY = auto()
    END_MIDWAY = auto()  # a clean end of the body, without [DONE]
    ERROR_MIDWAY = auto()  # an error event, then [DONE], as vLLM writes it
    LOSE_BLOCKS = auto()  # a prefill that answers, but what it pinned is gone


class Trouble(Enum):
    """What happens to a worker as a whole."""

    CRASH = auto()  # connections break, later ones are refused; then it comes back with a new engine id
    STOP = auto()  # it says nothing, to probes neither; then it goes on
    SLOW = auto()
    SICK = auto()  # it answers every leg with 500 or 503, and probes as if nothing were wrong
    FREEZE = auto()  # its engine stands still, its server answers probes; then it goes on
    DRAINED = auto()  # the operator wants it free for a while


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    name: str  # p0, d1, b0: also its host name
    role: Role
    seats: int  # legs that it serves at once; others wait
    prefill_s: float
    pull_s: float
    token_s: float
    answer_delay_s: float  # from the end of a prefill until its answer leaves
    ends_legs: bool  # when it is asked to (`wire.info.EndRequest`); else only when their connection is closed
    intake_s: float  # from a leg's arrival until its engine has it
    slices: bool  # chunks end anywhere
    recomputes: bool  # a failed pull is no error: vLLM's kv_load_failure_policy
    gives_ids: bool
    decodes_msgpack: bool
    lease_s: float = 30.0  # that it gives as prefill


@dataclass(frozen=True, slots=True)
class RequestSpec:
    number: int
    at: float
    is_chat: bool
    is_stream: bool
    wants_usage: bool
    wants_ids: bool
    length: int  # tokens that the model would say
    max_tokens: int | None
    padding: int
    is_whole: bool  # a request that cannot be handed over
    leaves_after: float | None  # seconds
    leaves_on: int | None  # the how manieth step of its legs, in a turn of the event loop soon after it
    reads_every: float  # seconds per 100 bytes; 0: at once

    @property
    def limit(self) -> int | None:
        is_limited = self.is_chat or self.max_tokens is not None
        return self.max_tokens if is_limited else DEFAULT_COMPLETION_TOKENS

    @property
    def answer_tokens(self) -> int:
        return self.length if self.limit is None else min(self.length, self.limit)

    @property
    def finish_reason(self) -> str:
        """The end of an answer takes a token too."""
        return "stop" if self.limit is None or self.length < self.limit else "length"


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """The first leg that `worker` gets from `at` on meets this; `after` tokens, for those midway."""

    at: float
    worker: str
    fault: LegFault
    after: int


@dataclass(frozen=True, slots=True)
class PlannedTrouble:
    at: float
    worker: str
    trouble: Trouble
    seconds: float


@dataclass(frozen=True, slots=True)
class Schedule:
    seed: int
    transport: str
    workers: tuple[WorkerSpec, ...]
    requests: tuple[RequestSpec, ...]
    faults: tuple[PlannedFault, ...]
    troubles: tuple[PlannedTrouble, ...]


DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's and vLLM's; chats have no limit
SPAN_S = 1.5  # in which requests arrive and trouble begins
FOREVER = 1e9

_PREFILL_FAULTS = tuple(LegFault)
_FAULTS = tuple(fault for fault in LegFault if fault is not LegFault.LOSE_BLOCKS)
_TROUBLES = tuple(trouble for trouble in Trouble if trouble is not Trouble.FREEZE)


def draw(seed: int) -> Schedule:
    """The schedule of a seed: always the same one."""
    random = Random(seed)
    workers = _workers(random)
    names = [worker.name for worker in workers]
    is_calm = random.random() < 0.1  # nothing goes wrong: every request must be answered
    drawn = Schedule(
        seed=seed,
        transport=random.choice(("json", "json", "msgpack")),
        workers=workers,
        requests=tuple(_request(random, number) for number in range(1, 1 + random.randint(1, 8))),
        faults=() if is_calm else tuple(_fault(random, names) for _ in range(random.randint(0, 4))),
        troubles=() if is_calm else tuple(_trouble(random, names) for _ in range(random.randint(0, 2))),
    )
    return _with_freezes(Random(f"freezes of {seed}"), drawn, names, is_calm=is_calm)


def _with_freezes(random: Random, drawn: Schedule, names: list[str], *, is_calm: bool) -> Schedule:
    """Short leases, and engines that stand still: alone, in some schedules, or beside all else."""
    lease_s = random.choice((30.0, 30.0, 30.0, 1.0))
    workers = tuple(replace(worker, lease_s=lease_s) for worker in drawn.workers)
    if is_calm or random.random() < 0.6:
        return replace(drawn, workers=workers)
    seconds = random.choice((0.5, 1.5, 2.5))
    freeze = PlannedTrouble(random.uniform(0, SPAN_S), random.choice(names), Trouble.FREEZE, seconds)
    if random.random() < 0.5:
        return replace(drawn, workers=workers, faults=(), troubles=(freeze,))
    return replace(drawn, workers=workers, troubles=(*drawn.troubles, freeze))


def _workers(random: Random) -> tuple[WorkerSpec, ...]:
    roles: list[Role] = ["prefill"] * random.randint(1, 3) + ["decode"] * random.randint(1, 3)
    if random.random() < 0.1:
        roles.append("both")
    return tuple(
        _worker(random, f"{role[0]}{roles[:place].count(role)}", role) for place, role in enumerate(roles)
    )


def _worker(random: Random, name: str, role: Role) -> WorkerSpec:
    return WorkerSpec(
        name=name,
        role=role,
        seats=random.choice((1, 2, 8)),
        prefill_s=random.choice((0.0, 0.01, 0.1)),
        pull_s=random.choice((0.0, 0.002, 0.02)),
        token_s=random.choice((0.0, 0.005, 0.03)),
        answer_delay_s=random.choice((0.0, 0.0, 0.001)),
        ends_legs=(ends_legs := random.random() < 0.6),
        intake_s=random.choice((0.0, 0.001, 0.3)) if ends_legs else 0.0,
        slices=random.random() < 0.3,
        recomputes=random.random() < 0.3,
        gives_ids=random.random() < 0.5,
        decodes_msgpack=random.random() < 0.7,
    )


def _request(random: Random, number: int) -> RequestSpec:
    length = random.choice((0, 1, 2, 5, 10, 20))
    stays_for = random.choice((0.0, 0.02, 0.2, 1.0)) * random.random()
    return RequestSpec(
        number=number,
        at=random.uniform(0, SPAN_S),
        is_chat=random.random() < 0.6,
        is_stream=random.random() < 0.7,
        wants_usage=random.random() < 0.3,
        wants_ids=random.random() < 0.15,
        length=length,
        max_tokens=random.choice((None, None, 1, 7, 100)),
        padding=random.randint(0, 3),
        is_whole=random.random() < 0.07,
        leaves_after=stays_for if random.random() < 0.2 else None,
        leaves_on=random.randint(1, 8) if random.random() < 0.2 else None,
        reads_every=random.choice((0.0,) * 6 + (0.001, 0.05, FOREVER)),
    )


def _fault(random: Random, names: list[str]) -> PlannedFault:
    worker = random.choice(names)
    return PlannedFault(
        at=random.uniform(0, SPAN_S),
        worker=worker,
        fault=random.choice(_PREFILL_FAULTS if worker.startswith("p") else _FAULTS),
        after=random.choice((0, 1, 2, 5)),
    )


def _trouble(random: Random, names: list[str]) -> PlannedTrouble:
    return PlannedTrouble(
        at=random.uniform(0, SPAN_S),
        worker=random.choice(names),
        trouble=random.choice(_TROUBLES),
        seconds=random.choice((0.05, 0.5, 2.0)),
    )
