"""What is asked of a worker over one connection, and what goes wrong meanwhile, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from random import Random

from orchestrator.wire.streams import MAX_PAYLOAD, MAX_STREAMS, WINDOW
from tests.simulation.streams.link import LinkSpec


class App(Enum):
    """What the worker's application does with a request."""

    READ_THEN_ANSWER = auto()
    ANSWER_AT_ONCE = auto()  # nothing of the body is read
    ANSWER_WHILE_READING = auto()
    NO_BODY = auto()  # a status that has none, 204
    RAISE_BEFORE = auto()
    RAISE_MIDWAY = auto()
    RETURN_BEFORE = auto()
    RETURN_MIDWAY = auto()
    WAIT = auto()  # for the client to leave
    WAIT_MIDWAY = auto()


class Client(Enum):
    """How the answer is taken."""

    READ = auto()  # as a whole
    CHUNKS = auto()
    PUMP = auto()


class Leaving(Enum):
    """How a client gives its request up, once `leaves_after` is over."""

    ABORT = auto()
    CANCEL = auto()  # whatever it awaits, then abort
    LEAVE = auto()  # and take what still comes


@dataclass(frozen=True, slots=True)
class RequestSpec:
    number: int
    at: float
    method: str
    body: int  # bytes
    body_parts: int
    app: App
    app_waits_s: float  # before all else
    app_reads_every: float  # seconds between what it reads of the body
    answer: tuple[int, ...]  # sizes of its pieces
    app_sends_every: float
    client: Client
    pause_s: float  # once, before or within the answer
    leaving: Leaving | None
    leaves_after: float

    @property
    def waits(self) -> bool:
        """Its application goes on once the client has left."""
        return self.app is App.WAIT or (self.app is App.WAIT_MIDWAY and bool(self.answer))

    @property
    def breaks(self) -> bool:
        """Its application fails in the middle of the answer."""
        return self.app in (App.RAISE_MIDWAY, App.RETURN_MIDWAY) and bool(self.answer)


class Trouble(Enum):
    STOP = auto()  # the worker's server stops in order, and comes back
    REFUSE = auto()  # upgrades get another answer for a while
    RETIRE = auto()  # the orchestrator stops


@dataclass(frozen=True, slots=True)
class PlannedTrouble:
    at: float
    trouble: Trouble
    seconds: float


@dataclass(frozen=True, slots=True)
class Schedule:
    seed: int
    window: int
    max_payload: int
    max_streams: int  # at the worker's end
    is_max_known: bool  # to the orchestrator's end, or else the worker refuses
    http: str  # the server's parser: h11 or httptools
    links: tuple[LinkSpec, ...]  # of the first connections; later ones have the last one's
    requests: tuple[RequestSpec, ...]
    troubles: tuple[PlannedTrouble, ...]

    @property
    def has_whole_links(self) -> bool:
        return all(link.is_whole for link in self.links)

    @property
    def is_calm(self) -> bool:
        """Nothing goes wrong beneath the streams: every request ends as its application and client want."""
        return self.has_whole_links and not self.troubles

    @property
    def stops_at(self) -> float | None:
        """Return when its server stops in order, if nothing else is wrong."""
        stops = [trouble.at for trouble in self.troubles if trouble.trouble is Trouble.STOP]
        return stops[0] if self.has_whole_links and stops and len(self.troubles) == 1 else None


LONG_S = 60.0  # of a client that does not read
SPAN_S = 0.5  # in which requests begin


def draw(seed: int, *, is_compiled: bool = False) -> Schedule:
    """Return the schedule of a seed: always the same one. The compiled form has its constants built in."""
    random = Random(seed)
    window, max_payload, max_streams = (WINDOW, MAX_PAYLOAD, MAX_STREAMS) if is_compiled else _limits(random)
    requests = _requests(random, window)
    link = _link(random, sum(request.body + sum(request.answer) for request in requests), window)
    is_calm = random.random() < 0.4
    is_whole = is_calm or random.random() < 0.3
    return Schedule(
        seed=seed,
        window=window,
        max_payload=max_payload,
        max_streams=max_streams,
        is_max_known=is_compiled or random.random() < 0.5,
        http=random.choice(("h11", "httptools", "httptools")),
        links=(link,) if is_whole else (*_broken(random, link, requests), link),
        requests=requests,
        troubles=() if is_calm else _troubles(random),
    )


def _limits(random: Random) -> tuple[int, int, int]:
    window = random.choice((64, 1000, 1000, 16 * 1024, WINDOW))
    return window, random.choice((300, 1000, MAX_PAYLOAD)), random.choice((2, 4, MAX_STREAMS, MAX_STREAMS))


def _requests(random: Random, window: int) -> tuple[RequestSpec, ...]:
    """They begin anywhere in the span, or many of them at once."""
    count = random.choice((1, 2, 4, 8))
    at_once = random.random() < 0.3
    made = (_request(random, number, window) for number in range(1, count + 1))
    return tuple(replace(request, at=0.0) if at_once else request for request in made)


def _request(random: Random, number: int, window: int) -> RequestSpec:
    method = random.choice(("POST",) * 8 + ("GET", "HEAD"))
    return RequestSpec(
        number=number,
        at=random.uniform(0, SPAN_S),
        method=method,
        body=_size(random, window) if method == "POST" else 0,
        body_parts=random.randint(1, 3),
        app=random.choice((*(App.READ_THEN_ANSWER, App.ANSWER_WHILE_READING) * 4, *App)),
        app_waits_s=random.choice((0, 0, 0, 0, 0.1, 3)),
        app_reads_every=random.choice((0, 0, 0, 0.01)),
        answer=_answer(random, window),
        app_sends_every=random.choice((0, 0, 0.005, 0.05)),
        client=random.choice(tuple(Client)),
        pause_s=random.choice((0, 0, 0, 0.02, 1, LONG_S)),
        leaving=random.choice((None, None, None, *Leaving)),
        leaves_after=random.choice((0, 0, 0.01, 0.1, 0.5)) * random.random(),
    )


def _size(random: Random, window: int) -> int:
    return random.choice((0, 1, 10, window // 3, window, window + 1, 2 * window + window // 2))


def _answer(random: Random, window: int) -> tuple[int, ...]:
    if random.random() < 0.4:
        return tuple(random.randint(1, 20) for _ in range(random.randint(0, 12)))  # events
    return tuple(_size(random, window) for _ in range(random.randint(0, 3)))


def _link(random: Random, size: int, window: int) -> LinkSpec:
    least = max(1, size // 300)  # so that a run has no more than some hundred reads
    return LinkSpec(
        delay_s=random.choice((0.0001, 0.001, 0.01)),
        capacity=max(random.choice((100, window, 2**20)), 8 * least),
        piece=max(least, random.choice((1, 5, 13, 200, 2**16))),
    )


def _broken(random: Random, link: LinkSpec, requests: tuple[RequestSpec, ...]) -> tuple[LinkSpec, ...]:
    """Return the links of the first connections."""
    sizes = sum(request.body for request in requests), sum(sum(request.answer) for request in requests)
    return tuple(_with_fault(random, link, sizes) for _ in range(random.randint(1, 2)))


def _with_fault(random: Random, link: LinkSpec, sizes: tuple[int, int]) -> LinkSpec:
    way = random.randrange(2)
    place = random.randint(0, 400 + random.choice((0, sizes[way])))
    after = (place, None) if way == 0 else (None, place)
    return replace(link, silent_after=after) if random.random() < 0.25 else replace(link, cut_after=after)


def _troubles(random: Random) -> tuple[PlannedTrouble, ...]:
    kinds = random.choice(((), *((trouble,) for trouble in (Trouble.STOP, *Trouble))))
    return tuple(
        PlannedTrouble(random.uniform(0, SPAN_S), kind, random.choice((0.01, 0.2, 2.0))) for kind in kinds
    )
