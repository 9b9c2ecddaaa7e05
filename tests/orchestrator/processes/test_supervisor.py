"""Several processes, for real: they are killed, recycled and stopped while requests are under way."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.shared.processes import free_port
from orchestrator.config.options import Config
from orchestrator.control.reload import ConfigSource
from orchestrator.errors import StartError
from orchestrator.loop import garbage
from orchestrator.processes import handle
from orchestrator.processes.supervisor import supervise
from orchestrator.wire.info import DEFAULT_TRANSPORT
from tests.orchestrator.certificate import CERT, KEY
from tests.orchestrator.running import (
    MODEL,
    CounterWatch,
    Orchestrator,
    SimWorker,
    Stream,
    simulated,
    starting,
)
from tests.waiting import is_running, wait_for

pytestmark = pytest.mark.processes

# A stream takes at least so long per token.
STEP_MS = 10
SHORT, LONG, ENDLESS = 100, 600, 100_000  # tokens
HANG_S = 3
SOURCE = ConfigSource("config.yaml")  # not read again


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode", "decode", options=["--decode-ms-per-token", str(STEP_MS)]) as made:
        yield made


@pytest.fixture
def make(tmp_path: Path, workers: list[SimWorker]) -> Iterator[Any]:
    with starting(tmp_path, workers) as start:
        yield start


def ask(client: httpx.Client) -> httpx.Response:
    body = {"model": MODEL, "prompt": "What is prefill?", "max_tokens": 1}
    return client.post("/v1/completions", json=body)


# --- serving ------------------------------------------------------------------------------------


def test_all_processes_serve_and_count_together(make: Any) -> None:
    orchestrator = make()
    clients = orchestrator.client_of_each()
    for client in (*clients, *clients):
        assert ask(client).headers["x-baton-path"] == "disaggregated"
    assert orchestrator.answered() == 4
    pids = [client.get("/health?verbose").json()["pid"] for client in clients]
    assert pids == [process["pid"] for process in orchestrator.serving()]
    assert len({*pids, orchestrator.process.pid}) == 3
    ages = {client.get("/v1/models").json()["data"][0]["created"] for client in clients}
    assert len(ages) == 1  # the orchestrator's, not the process's
    connects = ("baton_upstream_connects_total", ())
    wait_for(
        lambda: orchestrator.counters()[connects] >= 4, "the connections to two workers of two processes"
    )


def test_requests_in_flight_are_counted_for_each_process(make: Any) -> None:
    orchestrator = make()
    streams = orchestrator.streams(ENDLESS)
    text = orchestrator.admin("/metrics").text
    for process in orchestrator.serving():
        index, in_flight = process["index"], process["in_flight"]
        assert f'baton_process_requests_in_flight{{process="{index}"}} {in_flight}.0\n' in text
    assert f'baton_requests_in_flight{{model="{MODEL}"}} {len(streams)}.0\n' in text
    for stream in streams:
        stream.leave()
    wait_for(lambda: {process["in_flight"] for process in orchestrator.serving()} == {0}, "rest")
    wait_for(lambda: set(orchestrator.worker_loads().values()) == {0}, "leases to be given back")


def test_least_loaded_sees_what_other_processes_load(make: Any) -> None:
    """Each process alone would begin with the same worker."""
    orchestrator = make()
    streams: list[Stream] = []
    for count in range(1, 4):
        streams += [Stream(client, ENDLESS) for client in orchestrator.client_of_each()]
        loads = orchestrator.worker_loads()
        assert [loads[f"{MODEL}/decode/{index}"] for index in range(2)] == [count, count]


def test_any_process_tells_what_would_become_of_a_request(make: Any) -> None:
    orchestrator = make()
    serving = {process["index"]: process["pid"] for process in orchestrator.serving()}
    url, body = f"{orchestrator.admin_url}/admin/explain", {"model": MODEL, "prompt": "x" * 1000}
    for index, pid in serving.items():
        query = {"path": "/v1/completions", "process": index}
        told = httpx.post(url, params=query, json=body).json()
        assert told["process"] == {"index": index, "pid": pid}
        assert told["plan"]["path"] == "disaggregated"
        assert len(told["decode"]["candidates"]) == 2
    told = httpx.post(url, params={"path": "/v1/completions"}, json=body).json()
    assert told["process"]["pid"] in serving.values()
    assert httpx.post(url, params={"process": 99}, json=body).status_code == 404
    assert httpx.post(url, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert httpx.post(url, json={"model": "other", "messages": []}).status_code == 404
    assert orchestrator.answered() == 0


def test_a_worker_that_is_gone_is_gone_for_all(make: Any) -> None:
    with simulated("prefill", "decode") as workers:
        orchestrator = make(workers=workers)
        clients = orchestrator.client_of_each()
        workers[1].kill()
        for client in clients:
            wait_for(lambda client=client: client.get("/ready").status_code == 503, "the news")
            assert ask(client).json()["error"]["code"] == "no_worker"


# --- membership ---------------------------------------------------------------------------------


def test_a_worker_takes_the_place_of_another_while_streams_go_on(make: Any, workers: list[SimWorker]) -> None:
    prefill, old, new = workers
    orchestrator = make(workers=[prefill, old])
    streams = orchestrator.streams(SHORT)
    orchestrator.change("POST", "/admin/workers", {"model": MODEL, "role": "decode", "url": new.url})
    wait_for(lambda: orchestrator.worker_states().get("m/decode/1") == "ready", "the new worker")
    orchestrator.change("POST", "/admin/workers/m/decode/0/drain")
    clients = orchestrator.client_of_each()
    assert all(ask(client).status_code == 200 for client in clients)
    assert all(stream.is_whole() for stream in streams)
    orchestrator.change("DELETE", "/admin/workers/m/decode/0")
    wait_for(lambda: "m/decode/0" not in orchestrator.worker_states(), "the old worker's end")
    assert all(ask(client).status_code == 200 for client in clients)
    later = orchestrator.streams(ENDLESS)
    assert orchestrator.worker_loads()["m/decode/1"] == len(later)
    for stream in later:
        stream.leave()
    wait_for(lambda: orchestrator.worker_loads()["m/decode/1"] == 0, "rest")


# --- death --------------------------------------------------------------------------------------


def test_a_killed_process_loses_its_own_requests_only(make: Any) -> None:
    orchestrator = make()
    ask(orchestrator.client())
    streams = orchestrator.streams(LONG)
    with CounterWatch(orchestrator) as watch:
        victim, survivor = orchestrator.serving()
        os.kill(victim["pid"], signal.SIGKILL)
        whole = [stream.is_whole() for stream in streams]
        assert (whole.count(False), whole.count(True)) == (victim["in_flight"], survivor["in_flight"])
        wait_for(lambda: len(orchestrator.serving()) == 2, "another process")
        for client in orchestrator.client_of_each():
            assert ask(client).status_code == 200
        follower, same = orchestrator.serving()
        assert same["pid"] == survivor["pid"]
        assert follower["pid"] != victim["pid"]
        wait_for(lambda: watch.looks > 2, "a look at the counters")
    assert watch.fallen == []
    assert orchestrator.answered() == 1 + survivor["in_flight"] + 2
    assert set(orchestrator.worker_loads().values()) == {0}
    assert orchestrator.counters()["baton_process_ends_total", (("reason", "died"),)] == 1
    assert "ended with signal SIGKILL" in orchestrator.lines


def test_all_processes_killed_at_once(make: Any) -> None:
    """Who connects meanwhile waits in the queue of the socket, which the supervisor holds open."""
    orchestrator = make()
    for process in orchestrator.serving():
        os.kill(process["pid"], signal.SIGKILL)
    assert ask(orchestrator.client()).status_code == 200


def test_the_end_of_the_supervisor_is_the_end_of_all(make: Any) -> None:
    orchestrator = make()
    orchestrator.streams(ENDLESS)
    assert len(orchestrator.left()) == 3
    orchestrator.signal(signal.SIGKILL)
    wait_for(lambda: not orchestrator.left(), "the end of all processes")
    host, port = orchestrator.url.removeprefix("http://").split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_a_process_that_is_terminated_drains_and_is_followed_by_another(make: Any) -> None:
    orchestrator = make()
    streams = orchestrator.streams(SHORT)
    ended = orchestrator.serving()[0]["pid"]
    os.kill(ended, signal.SIGTERM)
    assert all(stream.is_whole() for stream in streams)
    wait_for(lambda: not is_running(ended) and len(orchestrator.serving()) == 2, "another process")


def test_a_process_that_hangs_is_replaced_and_others_serve_on(make: Any) -> None:
    orchestrator = make(hang_timeout_s=HANG_S)
    streams = orchestrator.streams(LONG)
    victim, survivor = orchestrator.serving()
    os.kill(victim["pid"], signal.SIGSTOP)
    assert ask(orchestrator.client()).status_code == 200  # who connects comes to the other one
    whole = [stream.is_whole() for stream in streams]
    assert (whole.count(False), whole.count(True)) == (victim["in_flight"], survivor["in_flight"])
    wait_for(lambda: not is_running(victim["pid"]) and len(orchestrator.serving()) == 2, "another process")
    assert orchestrator.serving()[1]["pid"] == survivor["pid"]
    assert f"has stood still for {HANG_S} s: killed" in orchestrator.lines
    wait_for(lambda: set(orchestrator.worker_loads().values()) == {0}, "the end of what it had in flight")


def test_a_pause_of_the_supervisor_kills_nobody(make: Any) -> None:
    orchestrator = make(hang_timeout_s=HANG_S)
    before = [process["pid"] for process in orchestrator.serving()]
    orchestrator.signal(signal.SIGSTOP)
    asked_until = time.monotonic() + 2 * HANG_S
    clients = [orchestrator.client() for _ in range(4)]
    while time.monotonic() < asked_until:
        assert all(ask(client).status_code == 200 for client in clients)
    orchestrator.signal(signal.SIGCONT)
    stream = Stream(orchestrator.client(), LONG)
    assert stream.is_whole()
    assert [process["pid"] for process in orchestrator.serving()] == before


# --- recycling ----------------------------------------------------------------------------------


def test_recycling_loses_no_request_of_busy_clients(make: Any) -> None:
    orchestrator = make(limit_max_requests=100, limit_max_requests_jitter=50)

    def keep_asking(client: httpx.Client) -> int:
        return sum(ask(client).status_code == 200 for _ in range(100))

    with CounterWatch(orchestrator) as watch, ThreadPoolExecutor(8) as threads:
        answered = list(threads.map(keep_asking, [orchestrator.client() for _ in range(8)]))
    assert answered == [100] * 8
    assert watch.fallen == []
    assert orchestrator.answered() == 800
    recycled = ("baton_process_ends_total", (("reason", "recycled"),))
    wait_for(lambda: orchestrator.counters()[recycled] >= 1, "the end of one that was replaced")


def test_recycling_waits_for_streams_and_idle_connections(make: Any) -> None:
    orchestrator = make(limit_max_requests=60)
    idle = orchestrator.client_of_each()[0]
    stream = Stream(orchestrator.client_of_each()[0], SHORT)
    first = idle.get("/health?verbose")
    assert "connection" not in first.headers
    old = first.json()["pid"]
    wait_for(lambda: is_due(orchestrator, old), "the limit of requests")
    last = idle.get("/health?verbose")
    assert (last.json()["pid"], last.headers["connection"]) == (old, "close")
    wait_for(lambda: idle.get("/health?verbose").json()["pid"] != old, "another process")
    assert stream.is_whole()
    stream.leave()  # it began before the limit, so its connection has not been told
    wait_for(lambda: not is_running(old), "the end of the old process")


def is_due(orchestrator: Orchestrator, pid: int) -> bool:
    """Asks on fresh connections."""
    for _ in range(10):
        with orchestrator.client() as client:
            client.get("/health")
    return pid not in {process["pid"] for process in orchestrator.serving()}


# --- stopping -----------------------------------------------------------------------------------


def test_ctrl_c_reaches_everybody_and_still_drains(make: Any) -> None:
    orchestrator = make()
    streams = orchestrator.streams(SHORT)
    os.killpg(orchestrator.process.pid, signal.SIGINT)
    assert all(stream.is_whole() for stream in streams)
    assert orchestrator.wait_exit() == 0
    assert "Traceback" not in orchestrator.lines


# --- what processes are given -------------------------------------------------------------------


def test_keys_are_those_of_the_start(make: Any, tmp_path: Path) -> None:
    """A process that is started later knows them too, whatever has become of the file."""
    file = tmp_path / "keys"
    file.write_text(f"alice {sha256(b's3cret').hexdigest()} infer,admin\n")
    orchestrator = make(api_keys_file=str(file), key="s3cret")
    file.unlink()
    first = orchestrator.serving()[0]["pid"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: len(orchestrator.serving()) == 2 and not is_running(first), "another process")
    for client in orchestrator.client_of_each():
        assert ask(client).status_code == 200
        del client.headers["authorization"]
        assert ask(client).status_code == 401


@pytest.mark.parametrize(("given", "transport"), [("msgpack", "msgpack"), ("", DEFAULT_TRANSPORT)])
def test_the_transport_is_the_same_in_all(make: Any, given: str, transport: str) -> None:
    orchestrator = make(env={"BATON_TRANSPORT": given})
    for client in orchestrator.client_of_each():
        assert client.get("/health?verbose").json()["transport"] == transport
        assert ask(client).status_code == 200


def test_tls(make: Any) -> None:
    trust = ssl.create_default_context(cafile=CERT)
    orchestrator = make(tls={"cert": str(CERT), "key": str(KEY)}, trust=trust)
    for client in orchestrator.client_of_each():
        assert ask(client).status_code == 200


# --- starting -----------------------------------------------------------------------------------


def one_of(**options: Any) -> Config:
    worker = {"urls": ["http://127.0.0.1:1"]}
    return Config.model_validate(
        {"orchestrator": {"processes": 2, **options}, "models": [{"name": MODEL, "both": worker}]}
    )


def test_processes_that_never_serve_end_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    tuned: list[str] = []
    monkeypatch.setattr(garbage, "tune", lambda: tuned.append("once"))  # for the tests to come
    config = one_of(listen=f"127.0.0.1:{free_port()}", admin=f"127.0.0.1:{free_port()}")
    with pytest.raises(StartError, match="5 processes in a row ended before they could serve"):
        asyncio.run(supervise(config, SOURCE, transport="json", credential=None))
    assert tuned == ["once"]  # the supervisor tells all processes what it hears of workers


def test_when_the_system_refuses_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "COMMAND", ("/no/such/program",))
    monkeypatch.setattr(garbage, "tune", lambda: None)
    config = one_of(listen=f"127.0.0.1:{free_port()}")
    with pytest.raises(StartError, match="5 processes in a row"):
        asyncio.run(supervise(config, SOURCE, transport="json", credential=None))


def test_a_port_that_is_taken_is_found_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for options in ({"listen": address}, {"listen": f"127.0.0.1:{free_port()}", "admin": address}):
            with pytest.raises(StartError, match=f"cannot listen on {address}"):
                asyncio.run(supervise(one_of(**options), SOURCE, transport="json", credential=None))
