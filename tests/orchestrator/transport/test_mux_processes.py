"""Connections that carry many requests end, are cut, or are refused, between real processes: what becomes of
their requests, all at once, and of the workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.wire.info import STREAMS_ENV
from tests.faults.asking import ask
from tests.faults.proxy import FaultProxy, Limit, Reset, Toxic
from tests.metrics import sum_of
from tests.orchestrator.running import MODEL, PATIENCE_S, Orchestrator, SimWorker, Stream, simulated, starting
from tests.waiting import wait_for
from worker.sim.questions import Outcome, completion

pytestmark = pytest.mark.processes

MANY = 64  # streams on one worker
TOKENS = 40  # of each
ENDLESS = 100_000
HELD_AT = 5  # the token at which a stream stands still on the first worker, so that it cannot end there
STAY_S = 5.0
STEP = ["--decode-ms-per-token", "5"]
ASK = {"model": MODEL, "prompt": "Go on", "max_tokens": 1}
TO_DECODE = "x-baton-worker-decode"
ESTABLISHED = "01"  # in /proc/net/tcp
DECODES = [f"{MODEL}/decode/{index}" for index in range(3)]
Start = Callable[..., Orchestrator]


@pytest.fixture(scope="module", autouse=True)
def _mux() -> Iterator[None]:
    """Have all processes that are started here take and open such connections."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STREAMS_ENV, "mux")
        yield


@pytest.fixture(scope="module")
def workers(_mux: None) -> Iterator[list[SimWorker]]:
    with simulated("prefill", "prefill", "decode", "decode", "decode", options=STEP) as made:
        yield made


@pytest.fixture
def victim(workers: list[SimWorker]) -> Iterator[SimWorker]:
    """The first decode worker, which is well again after the test."""
    victim = workers[2]
    yield victim
    victim.restart()


@pytest.fixture
def start(tmp_path: Path, workers: list[SimWorker]) -> Iterator[Start]:
    with starting(tmp_path, workers) as start:
        yield start


@dataclass(frozen=True)
class Detour:
    """A worker as the orchestrator sees it: behind something else."""

    role: str
    url: str


class Crowd:
    """Many streams with answers that are known, each of a client of its own."""

    def __init__(self, url: str, count: int, tokens: int) -> None:
        """Return when all of them have begun."""
        self._pool = ThreadPoolExecutor(count)
        has_begun = [threading.Event() for _ in range(count)]
        self._asked: list[Future[Outcome]] = []
        for number, begun in enumerate(has_begun):
            question = completion(f"Story {number}", tokens, is_stream=True)
            self._asked.append(self._pool.submit(ask, url, question, PATIENCE_S, begun.set))
        assert all(begun.wait(PATIENCE_S) for begun in has_begun)

    def outcomes(self) -> Counter[Outcome]:
        """How they have ended, once all have."""
        with self._pool:
            return Counter(asked.result() for asked in self._asked)


def on_the_first(orchestrator: Orchestrator, first: SimWorker) -> Crowd:
    """Streams that all stand still on the first decode worker, which is not the only one any more."""
    fault(first, kind="stall", leg="decode", at_token=HELD_AT, count=MANY)
    wait_all_ready(orchestrator)
    for name in DECODES[1:]:
        orchestrator.change("POST", f"/admin/workers/{name}/drain")
    orchestrator.client_of_each()  # a process that has answered has heard of it before
    crowd = Crowd(orchestrator.url, MANY, TOKENS)
    assert orchestrator.worker_loads()[DECODES[0]] == MANY
    for name in DECODES[1:]:
        orchestrator.change("POST", f"/admin/workers/{name}/undrain")
    wait_all_ready(orchestrator)
    orchestrator.client_of_each()
    return crowd


def wait_all_ready(orchestrator: Orchestrator) -> None:
    wait_for(lambda: set(orchestrator.worker_states().values()) == {"ready"}, "all workers to serve")


def decoded(worker: SimWorker) -> int:
    """So many decode legs it has ever had."""
    requests: list[dict[str, Any]] = httpx.get(f"{worker.url}/sim/ledger").json()["requests"]
    return len(requests)


def running(worker: SimWorker) -> float:
    return sum_of(httpx.get(f"{worker.url}/metrics").text, "vllm:num_requests_running")


def retries(orchestrator: Orchestrator) -> float:
    counters = orchestrator.counters()
    return sum(value for (name, _), value in counters.items() if name == "baton_upstream_retries_total")


def connections_of(worker: SimWorker) -> int:
    """So many are open to it, as the kernel has them: their side of our own question is not counted."""
    port = urlsplit(worker.url).port
    found = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[1].endswith(f":{port:04X}") and line[3] == ESTABLISHED for line in found)


def is_at_rest(orchestrator: Orchestrator) -> bool:
    return set(orchestrator.worker_loads().values()) == {0}


def fault(worker: SimWorker, **what: Any) -> None:
    httpx.post(f"{worker.url}/sim/faults", json=what).raise_for_status()


def used(orchestrator: Orchestrator) -> dict[str, str]:
    rows = orchestrator.admin("/admin/workers").json()
    return {row["address"]["name"]: row["streams"] for row in rows}


def kinds(orchestrator: Orchestrator) -> set[str]:
    """Of all events so far."""
    return {event["kind"] for event in orchestrator.admin("/admin/events").json()}


# --- all streams of a worker are lost at once ---------------------------------------------------


def kill(worker: SimWorker) -> None:
    worker.kill()


def stand_still(worker: SimWorker) -> None:
    worker.signal(signal.SIGSTOP)


@pytest.mark.parametrize(("strike", "processes"), [(kill, 2), (stand_still, 1)])
def test_all_streams_of_a_worker_go_on_elsewhere_and_not_on_one_worker(
    start: Start,
    workers: list[SimWorker],
    victim: SimWorker,
    strike: Callable[[SimWorker], None],
    processes: int,
) -> None:
    orchestrator = start(processes=processes)
    others = workers[3:]
    before = [decoded(worker) for worker in others]
    crowd = on_the_first(orchestrator, victim)
    strike(victim)
    assert crowd.outcomes() == {Outcome.RIGHT: MANY}
    assert retries(orchestrator) == MANY  # each once: that is free, and takes nothing of the retry budget
    came = [decoded(worker) - count for worker, count in zip(others, before, strict=True)]
    assert sum(came) == MANY
    assert min(came) > MANY / 4, came
    wait_for(lambda: is_at_rest(orchestrator), "seats to be given back")


@pytest.mark.parametrize(
    "spoiling",
    [
        pytest.param({"kind": "reset", "connection": True}, id="reset"),
        pytest.param({"kind": "garbage"}, id="garbage"),
    ],
)
def test_a_connection_that_one_stream_spoils_costs_no_other_its_answer(
    start: Start, workers: list[SimWorker], spoiling: dict[str, Any]
) -> None:
    """The worker goes on, and takes a new connection."""
    orchestrator = start(processes=1, routing={"overrides": [TO_DECODE]})
    crowd = on_the_first(orchestrator, workers[2])
    fault(workers[2], leg="decode", count=1, **spoiling)
    orchestrator.client().post("/v1/completions", json=ASK, headers={TO_DECODE: DECODES[0]})
    assert crowd.outcomes() == {Outcome.RIGHT: MANY}
    wait_for(lambda: orchestrator.worker_states()[DECODES[0]] == "ready", "the worker to be back")
    answer = orchestrator.client().post("/v1/completions", json=ASK, headers={TO_DECODE: DECODES[0]})
    assert answer.status_code == 200
    assert not kinds(orchestrator) & {"worker.gone", "worker.ejected"}
    wait_for(lambda: is_at_rest(orchestrator), "seats to be given back")


# --- how a worker takes its legs changes --------------------------------------------------------


def test_a_worker_that_is_started_again_is_asked_anew_how_it_takes_legs(
    start: Start, workers: list[SimWorker], victim: SimWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes have as many connections to it as streams, or one each."""
    orchestrator = start(workers=[workers[0], victim])
    for streams, connections in (("mux", 2), ("http", 8), ("mux", 2)):
        monkeypatch.setenv(STREAMS_ENV, streams)
        victim.restart()
        wait_for(lambda streams=streams: is_served_by(orchestrator, streams), f"legs by {streams}")
        clients = orchestrator.client_of_each()
        begun = [Stream(client, ENDLESS) for client in clients for _ in range(4)]
        wait_for(lambda busy=connections: busy_connections(orchestrator) == busy, "the connections")
        for stream in begun:
            stream.leave()
        wait_for(lambda: is_at_rest(orchestrator), "all to be given back")


def is_served_by(orchestrator: Orchestrator, streams: str) -> bool:
    """Whether the decode worker is there, and takes legs so."""
    is_there = all(
        client.post("/v1/completions", json=ASK).is_success for client in orchestrator.client_of_each()
    )
    return is_there and used(orchestrator)[DECODES[0]] == streams


def busy_connections(orchestrator: Orchestrator) -> float:
    found = text_string_to_metric_families(orchestrator.admin("/metrics").text)
    return sum(
        sample.value
        for family in found
        for sample in family.samples
        if sample.name == "baton_upstream_connections" and sample.labels["state"] == "busy"
    )


def test_a_worker_without_the_plugin_gets_its_legs_by_http(start: Start, workers: list[SimWorker]) -> None:
    with simulated("decode", options=[*STEP, "--plain"]) as plain:
        orchestrator = start(workers=[workers[0], *plain], processes=1)
        assert Crowd(orchestrator.url, 4, TOKENS).outcomes() == {Outcome.RIGHT: 4}
        assert used(orchestrator) == {f"{MODEL}/prefill/0": "mux", DECODES[0]: "http"}


# --- what is in between -------------------------------------------------------------------------


class Balancer:
    """It stands before a worker, and does not know the upgrade: what `refuse` does is what it gets."""

    role = "decode"

    def __init__(self, worker: SimWorker, refuse: Callable[[socket.socket], None]) -> None:
        self._worker = urlsplit(worker.url)
        self._refuse = refuse
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.refused = 0

    def __enter__(self) -> Balancer:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            first = client.recv(65536)
            if b"upgrade: baton" in first.lower():
                self.refused += 1
                self._refuse(client)
                return
            with socket.create_connection((self._worker.hostname, self._worker.port)) as worker:
                worker.sendall(first)
                threading.Thread(target=pass_on, args=[worker, client], daemon=True).start()
                pass_on(client, worker)


def pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def answer_400(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


def close(client: socket.socket) -> None:
    pass


def stop_half_way(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 101 Switching Prot")


def say_nothing(client: socket.socket) -> None:
    client.recv(1)


@pytest.mark.parametrize("refuse", [answer_400, close, stop_half_way, say_nothing])
def test_a_balancer_that_does_not_pass_the_upgrade_costs_nobody_an_answer(
    start: Start, workers: list[SimWorker], refuse: Callable[[socket.socket], None]
) -> None:
    with Balancer(workers[2], refuse) as balancer:
        orchestrator = start(workers=[workers[0], balancer], processes=1, limits={"connect_timeout_s": 1.0})
        for _ in range(2):
            assert Crowd(orchestrator.url, 8, TOKENS).outcomes() == {Outcome.RIGHT: 8}
        assert balancer.refused == 1
        assert sum("its legs go by HTTP" in line for line in orchestrator.lines.splitlines()) == 1
        assert retries(orchestrator) == 0
        assert kinds(orchestrator) <= {"worker.ready"}


@pytest.mark.parametrize("cut", [Limit(0), Reset(0)], ids=["closed", "reset"])
def test_an_idle_connection_that_is_cut_on_the_way_costs_nobody_an_answer(
    start: Start, workers: list[SimWorker], cut: Toxic
) -> None:
    address = urlsplit(workers[2].url)
    with FaultProxy((str(address.hostname), address.port or 0)) as proxy:
        orchestrator = start(workers=[workers[0], Detour("decode", proxy.url)], processes=1)
        for _ in range(3):
            assert Crowd(orchestrator.url, 4, TOKENS).outcomes() == {Outcome.RIGHT: 4}
            with proxy.toxic(cut, "downstream"):
                pass  # it has met all connections, none of which carries anything
        assert retries(orchestrator) == 0
        assert used(orchestrator)[DECODES[0]] == "mux"
        assert kinds(orchestrator) <= {"worker.ready", "worker.suspect"}  # a probe may be what was cut


# --- ends that are wanted -----------------------------------------------------------------------


class Unread:
    """A client that has asked for a whole answer, and leaves without it."""

    def __init__(self, orchestrator: Orchestrator, tokens: int) -> None:
        address = urlsplit(orchestrator.url)
        body = json.dumps({**ASK, "max_tokens": tokens, "ignore_eos": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self._socket = socket.create_connection((address.hostname, address.port))
        self._socket.sendall(head + b"content-length: %d\r\n\r\n%b" % (len(body), body))

    def leave(self) -> None:
        self._socket.close()


def exchange(orchestrator: Orchestrator, worker: SimWorker) -> None:
    """Have it go by a config with another decode worker."""
    orchestrator.config["models"][0]["decode"]["urls"] = [worker.url]
    orchestrator.write_config()
    orchestrator.change("POST", "/admin/reload")
    wait_for(lambda: orchestrator.worker_states().get(DECODES[1]) == "ready", "the new worker")
    orchestrator.client_of_each()  # a process that has answered has heard of it before


def is_free(worker: SimWorker) -> bool:
    ledger = httpx.get(f"{worker.url}/sim/ledger").json()
    return not (ledger["in_flight"] or ledger["pins"])


def wait_load(orchestrator: Orchestrator, name: str, legs: int) -> None:
    wait_for(lambda: orchestrator.worker_loads()[name] == legs, f"{legs} legs on {name}")


def test_what_clients_leave_ends_in_the_engine_and_others_go_on(
    start: Start, workers: list[SimWorker]
) -> None:
    """All of them share connections: to each worker there is one."""
    prefill, decode = pair = workers[1:3]
    orchestrator = start(workers=pair, processes=1)
    fault(decode, kind="stall", leg="decode", at_token=HELD_AT, count=4, seconds=STAY_S)
    stay = Crowd(orchestrator.url, 4, TOKENS)
    leave: list[Stream | Unread] = [Stream(orchestrator.client(), ENDLESS) for _ in range(8)]
    leave += [Unread(orchestrator, ENDLESS) for _ in range(8)]
    wait_load(orchestrator, DECODES[0], 20)
    fault(prefill, kind="stall", leg="prefill")
    leave += [Unread(orchestrator, 1) for _ in range(8)]
    wait_load(orchestrator, f"{MODEL}/prefill/0", 8)
    assert orchestrator.gauge("baton_upstream_connections") == 2
    for client in leave:
        client.leave()
    assert stay.outcomes() == {Outcome.RIGHT: 4}
    for worker in pair:
        wait_for(lambda worker=worker: is_free(worker), "nothing to be held")
        httpx.delete(f"{worker.url}/sim/faults").raise_for_status()
    assert retries(orchestrator) == 0
    assert orchestrator.gauge("baton_upstream_connections") == 2


def test_a_worker_that_is_dropped_keeps_its_connections_until_its_streams_are_over(
    start: Start, workers: list[SimWorker]
) -> None:
    orchestrator = start(workers=[workers[0], workers[3]])
    orchestrator.client_of_each()
    fault(workers[3], kind="stall", leg="decode", at_token=HELD_AT, count=8, seconds=STAY_S)
    crowd = Crowd(orchestrator.url, 8, TOKENS)
    exchange(orchestrator, workers[4])
    assert Crowd(orchestrator.url, 4, TOKENS).outcomes() == {Outcome.RIGHT: 4}
    assert crowd.outcomes() == {Outcome.RIGHT: 8}
    assert retries(orchestrator) == 0
    wait_for(lambda: not connections_of(workers[3]), "the connections to be closed")


def test_a_worker_that_is_told_to_end_says_so_and_its_streams_go_on_elsewhere(
    start: Start, workers: list[SimWorker], victim: SimWorker
) -> None:
    """As vLLM it ends what is under way; what comes meanwhile is refused, and served elsewhere."""
    orchestrator = start(workers=[workers[0], victim, workers[3]], processes=1)
    wait_all_ready(orchestrator)
    crowd = Crowd(orchestrator.url, 16, TOKENS)
    victim.signal(signal.SIGTERM)
    more = Crowd(orchestrator.url, 16, TOKENS)
    assert crowd.outcomes() == more.outcomes() == {Outcome.RIGHT: 16}
    wait_for(lambda: is_at_rest(orchestrator), "all to be given back")


def test_an_orchestrator_that_ends_leaves_nothing_in_the_engines_and_comes_back(
    start: Start, workers: list[SimWorker]
) -> None:
    pair = [workers[0], workers[3]]
    orchestrator = start(workers=pair)
    begun = [Stream(client, ENDLESS) for client in orchestrator.client_of_each() for _ in range(4)]
    for process in orchestrator.serving():
        os.kill(process["pid"], signal.SIGKILL)
    wait_for(lambda: is_free(workers[3]), "the engine to end what nobody wants any more")
    orchestrator.wait_ready()
    assert not any(stream.is_whole() for stream in begun)
    orchestrator.restart()
    assert Crowd(orchestrator.url, 8, TOKENS).outcomes() == {Outcome.RIGHT: 8}
    assert used(orchestrator) == {f"{MODEL}/prefill/0": "mux", DECODES[0]: "mux"}
    orchestrator.signal(signal.SIGTERM)
    assert orchestrator.wait_exit() == 0
    for worker in pair:
        wait_for(lambda worker=worker: not connections_of(worker), "the connections to be closed")
