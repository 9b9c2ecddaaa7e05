"""Each symptom of docs/troubleshooting.md is made, and shows what the page quotes. No process is started."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from bench.shared.processes import free_port
from launch.cli import main
from launch.local import up, upkeep
from launch.local.upkeep import Upkeep
from orchestrator.config.keys import KeyRing
from orchestrator.config.options import (
    HealthConfig,
    LimitsConfig,
    LogConfig,
    OrchestratorConfig,
    QueueConfig,
    TlsConfig,
)
from orchestrator.control.admin import admin_app
from orchestrator.control.public import control_app
from orchestrator.control.reload import ConfigSource, Reloader
from orchestrator.http.tls import Certificate, is_renewed
from orchestrator.loop.stall_alarm import Sample, StallAlarm
from orchestrator.telemetry.access_log import AccessLog
from orchestrator.telemetry.logs import LineWriter
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.workers import health
from orchestrator.workers.cache_alarm import CacheAlarm
from orchestrator.workers.figures import CacheFigures
from orchestrator.workers.health import HttpProbe, Prober
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import WorkerState
from tests.docs.symptoms import check, makes, rendered
from tests.launch.doctor.visiting import Doctor
from tests.launch.local.test_upkeep import Said as Lines
from tests.orchestrator.certificate import CERT, KEY
from tests.orchestrator.cluster import address, registry_of
from tests.orchestrator.control.fakes import FakeState, ask
from tests.orchestrator.control.test_reload import OLD, FakeTarget
from tests.orchestrator.control.test_scopes import RING, as_
from tests.orchestrator.control.test_worker_watch import Watched
from tests.orchestrator.fakes import JSON, LAST, SSE, FakeCluster, FakeExchange, token, usage
from tests.orchestrator.http.test_hosts import judged
from tests.orchestrator.loop.test_stall_alarm import Said, hold_up, watched
from tests.simulation.loop import run_virtually
from tests.worker.sim.workers import MODEL, running
from worker.sim.faults import Error
from worker.sim.settings import Announced

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
STREAM = {**CHAT, "stream": True}
SOON = {"interval_s": 0.05, "timeout_s": 0.2, "silence_s": 0.5}

Test = Callable[[FakeCluster], Awaitable[str]]
Handler = Callable[[MemoryRequest, MemoryReply], Awaitable[None]]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log tells at once of a worker that may still be starting."""
    monkeypatch.setattr(health, "PATIENCE_S", 0.0)
    monkeypatch.setattr(health, "PATIENCE_MANAGED_S", 0.0)


# --- a worker is not in service ---------------------------------------------------------------------


class Probed:
    """Workers at these URLs, by name, under the real prober."""

    def __init__(self, urls: dict[str, str]) -> None:
        found = []
        for name, url in urls.items():
            role, _, index = name.partition("/")
            parts = httpx.URL(url)
            known = address(role, int(index), served=MODEL)  # type: ignore[arg-type]
            found.append(replace(known, url=url, host=parts.host, port=parts.port or 80))
        self.registry = Registry(found, ["m"], "json", health=HealthConfig.model_validate(SOON))

    def until(self, *wanted: Callable[[], bool]) -> None:
        """Probe until all of this is so, one after the other."""

        async def probing() -> None:
            probe = HttpProbe("ours")
            prober = Prober(self.registry, probe, random=Random(1))
            prober.start()
            try:
                async with asyncio.timeout(60):
                    for is_so in wanted:
                        while not is_so():  # noqa: ASYNC110 - a log line is no event
                            await asyncio.sleep(0.01)
            finally:
                await prober.aclose()
                await probe.aclose()

        asyncio.run(probing())


@contextmanager
def closed_port() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def unknown_host() -> Iterator[str]:
    yield "http://gpu7.invalid:8100"


@contextmanager
def simulated(scheme: str = "http", **settings: Any) -> Iterator[str]:
    with running(**settings) as worker:
        yield worker.url.replace("http", scheme)


@contextmanager
def tls_port(scheme: str) -> Iterator[str]:
    """A server that speaks TLS, with a certificate that nobody knows."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERT, KEY)
    with web_server() as url, ExitStack() as stack:
        server = SERVERS[url]
        server.socket = stack.enter_context(context.wrap_socket(server.socket, server_side=True))
        yield url.replace("http", scheme)


SERVERS: dict[str, ThreadingHTTPServer] = {}


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_error(404)


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a handshake that came to nothing


@contextmanager
def web_server() -> Iterator[str]:
    with QuietServer(("127.0.0.1", 0), Quiet) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        SERVERS[url] = server
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield url
        server.shutdown()
        thread.join()


UNUSABLE = {
    "Nothing listens there": closed_port,
    "Its host is unknown": unknown_host,
    "Its key is another one": lambda: simulated(api_keys=("theirs",)),
    "It serves another model": lambda: simulated(model_name="other"),
    "It has another role": lambda: simulated(role="prefill"),
    "TLS on a plain port": lambda: simulated("https"),
    "A plain request on a TLS port": lambda: tls_port("http"),
    "Its certificate is not trusted": lambda: tls_port("https"),
    "Something else listens there": web_server,
    "Its engine is ill": lambda: simulated(faults=(Error(leg="health", status=503),)),
}


@makes(*UNUSABLE)
@pytest.mark.parametrize("title", UNUSABLE)
def test_a_worker_that_cannot_be_used(title: str, caplog: pytest.LogCaptureFixture) -> None:
    with UNUSABLE[title]() as url:  # type: ignore[operator]
        Probed({"decode/0": url}).until(lambda: bool(caplog.messages))
    check(title, "\n".join(caplog.messages))


@makes("Prefill and decode do not fit")
def test_workers_that_do_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    late = {"faults": (Error(leg="health", status=503),), "announced": Announced(dtype="float32")}
    with running(role="prefill") as first, running(role="decode", **late) as second:
        probed = Probed({"prefill/0": first.url, "decode/0": second.url})
        prefill, decode = probed.registry.workers
        probed.until(
            lambda: prefill.state is WorkerState.READY,
            lambda: second.client.delete("/sim/faults").is_success,
            lambda: decode.state is WorkerState.UNFIT,
        )
    check("Prefill and decode do not fit", "\n".join(caplog.messages))


@makes("A worker that served is gone")
def test_a_worker_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        worker = stack.enter_context(running(role="decode"))
        probed = Probed({"decode/0": worker.url})
        known = probed.registry.workers[0]

        def is_stopped() -> bool:
            stack.close()
            return True

        probed.until(
            lambda: known.state is WorkerState.READY, is_stopped, lambda: known.state is WorkerState.GONE
        )
    check("A worker that served is gone", "\n".join(caplog.messages))


@makes("A worker that served says nothing any more")
def test_a_worker_that_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with running(role="decode") as first, running(role="decode") as second:
        probed = Probed({"decode/0": first.url, "decode/1": second.url})
        known = probed.registry.workers

        def is_silent() -> bool:
            second.add_fault("stall", leg="health")
            return True

        probed.until(
            lambda: [worker.state for worker in known] == [WorkerState.READY] * 2,
            is_silent,
            lambda: known[1].state is WorkerState.EJECTED,
        )
        second.client.delete("/sim/faults")
    check("A worker that served says nothing any more", "\n".join(caplog.messages))


@makes("A worker is far slower than the others")
def test_a_slow_worker(caplog: pytest.LogCaptureFixture) -> None:
    watched_pool = Watched()
    watched_pool.watch.look()
    for _ in range(3):
        watched_pool.serve(0.02, 0.4, 0.02)
    page = ask(admin_app(watched_pool.state), "/admin/events").text  # type: ignore[arg-type]
    metrics = ask(admin_app(watched_pool.state), "/metrics").text  # type: ignore[arg-type]
    check("A worker is far slower than the others", "\n".join([*caplog.messages, page, metrics]))


# --- requests are refused or fail -------------------------------------------------------------------


def seen(test: Test, **options: Any) -> str:
    """What a test over a cluster in memory has seen."""

    async def scenario() -> str:
        cluster = FakeCluster(**options)
        cluster.core.start()
        await asyncio.sleep(1.0)
        found = await test(cluster)
        cluster.workers.pinned.clear()
        await cluster.aclose()
        return found

    return run_virtually(scenario())


def answer_of(exchange: FakeExchange) -> str:
    return rendered(exchange.status, exchange.answer_headers, exchange.sent)


def lines_of(cluster: FakeCluster, **options: Any) -> str:
    """The access log of a cluster."""
    written: list[bytes] = []
    config = LogConfig.model_validate(options)
    log = AccessLog(cluster.telemetry.records, ["m"], config, written.append)
    log.flush(len(cluster.telemetry.records))
    return b"".join(written).decode()


def metrics_of(cluster: FakeCluster) -> str:
    """What is not 0 of its metrics."""
    state = FakeState(telemetry=cluster.telemetry, config=cluster.config, registry=cluster.registry)
    with ThreadPoolExecutor(1) as beside:  # an event loop runs here
        lines = beside.submit(ask, admin_app(state), "/metrics").result().text.splitlines()
    return "\n".join(line for line in lines if not line.startswith("#") and not line.endswith(" 0.0"))


async def cuts_short(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.cut_short()


async def begins(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.head(200, SSE)
    await reply.chunk(token("a"))
    reply.cut_short()


def spoil(cluster: FakeCluster, name: str, handler: Handler) -> None:
    cluster.upstream.serve(cluster.origin(name), handler)


@makes("503 `no_worker`")
def test_no_worker() -> None:
    async def test(cluster: FakeCluster) -> str:
        cluster.registry.judge.mark_gone(cluster.worker("decode/0"), "killed")
        return answer_of(await cluster.ask(CHAT))

    check("503 `no_worker`", seen(test))


class Held:
    """A decode worker that keeps its requests until it may go on."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.may_go_on = asyncio.Event()
        spoil(cluster, "decode/0", self._serve)

    async def _serve(self, request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200, SSE)
        await reply.chunk(token("a"))
        await self.may_go_on.wait()
        await reply.chunk(LAST)


def begin(cluster: FakeCluster, document: Any) -> tuple[FakeExchange, asyncio.Task[Any]]:
    exchange = FakeExchange(json.dumps(document).encode())
    return exchange, asyncio.create_task(cluster.serve(exchange))


@makes("429 `too_busy`")
def test_a_full_queue() -> None:
    async def test(cluster: FakeCluster) -> str:
        held = Held(cluster)
        tasks = [begin(cluster, STREAM)[1] for _ in range(2)]
        await asyncio.sleep(0.1)
        answer = await cluster.ask(CHAT)
        metrics = metrics_of(cluster)
        held.may_go_on.set()
        await asyncio.gather(*tasks)
        return f"{answer_of(answer)}\n{metrics}"

    check("429 `too_busy`", seen(test, seats=1, queue=QueueConfig(requests=1)))


@makes("503 `overloaded`")
def test_a_wait_that_is_too_long() -> None:
    async def test(cluster: FakeCluster) -> str:
        held = Held(cluster)
        _, first = begin(cluster, STREAM)
        await asyncio.sleep(0.1)
        answer = await cluster.ask(CHAT)
        metrics = metrics_of(cluster)
        held.may_go_on.set()
        await first
        return f"{answer_of(answer)}\n{metrics}"

    check("503 `overloaded`", seen(test, seats=1))


@makes("504 `deadline_exceeded`")
def test_a_deadline_that_passes() -> None:
    async def test(cluster: FakeCluster) -> str:
        held = Held(cluster)
        answer = await cluster.ask(CHAT, headers=[(b"x-request-timeout", b"2")])
        held.may_go_on.set()
        return answer_of(answer)

    check("504 `deadline_exceeded`", seen(test, health=HealthConfig(silence_s=600)))


@makes("502 `worker_cut_short`, or a stream that ends with an error")
def test_a_worker_that_is_lost() -> None:
    async def test(cluster: FakeCluster) -> str:
        spoil(cluster, "decode/0", begins)
        stream = await cluster.ask({**STREAM, "n": 2})
        spoil(cluster, "decode/0", cuts_short)
        return f"{answer_of(stream)}\n{answer_of(await cluster.ask(CHAT))}"

    check("502 `worker_cut_short`, or a stream that ends with an error", seen(test))


@makes("502 `poison`")
def test_a_request_that_ends_its_workers(caplog: pytest.LogCaptureFixture) -> None:
    async def test(cluster: FakeCluster) -> str:
        for number in range(3):
            spoil(cluster, f"prefill/{number}", cuts_short)
        return answer_of(await cluster.ask(CHAT)) + metrics_of(cluster)

    found = seen(test, roles=("prefill", "prefill", "prefill", "decode"))
    check("502 `poison`", f"{found}\n{caplog.text}")


@makes("502 `kv_missing`, or the cache is computed again")
def test_a_cache_that_does_not_arrive(caplog: pytest.LogCaptureFixture) -> None:
    async def recomputes(request: MemoryRequest, reply: MemoryReply) -> None:
        choice = {"message": {"content": "x"}, "finish_reason": "stop"}
        reply.answer(200, json.dumps({"choices": [choice], "usage": usage(21, 0)}).encode(), JSON)

    async def test(cluster: FakeCluster) -> str:
        spoil(cluster, "decode/0", recomputes)
        return answer_of(await cluster.ask(CHAT)) + metrics_of(cluster)

    found = "\n".join(seen(test, kv_missing=policy) for policy in ("warn", "fail"))
    check("502 `kv_missing`, or the cache is computed again", f"{found}\n{caplog.text}")


@makes("503 `out_of_resources`")
def test_no_descriptors() -> None:
    async def test(cluster: FakeCluster) -> str:
        cluster.upstream.is_short = True
        return answer_of(await cluster.ask(CHAT))

    check("503 `out_of_resources`", seen(test))


@makes("A request took long, though its worker answered at once")
def test_an_attempt_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def slow_and_cut(request: MemoryRequest, reply: MemoryReply) -> None:
        await asyncio.sleep(3.1)
        reply.cut_short()

    async def test(cluster: FakeCluster) -> str:
        spoil(cluster, "prefill/0", slow_and_cut)
        await cluster.ask(CHAT)
        return lines_of(cluster, slow_request_s=1)

    found = seen(test, roles=("prefill", "prefill", "decode"), health=HealthConfig(silence_s=600))
    check("A request took long, though its worker answered at once", f"{found}\n{caplog.text}")


@makes("404 `model_not_found`")
def test_another_model() -> None:
    async def test(cluster: FakeCluster) -> str:
        return answer_of(await cluster.ask({**CHAT, "model": "gpt-4"}))

    check("404 `model_not_found`", seen(test))


@makes("400 `unsupported_media_type`")
def test_another_media_type() -> None:
    async def test(cluster: FakeCluster) -> str:
        return answer_of(await cluster.ask(CHAT, content_type=b"text/plain"))

    check("400 `unsupported_media_type`", seen(test))


@makes("401 `invalid_api_key`")
def test_no_key() -> None:
    async def test(cluster: FakeCluster) -> str:
        return answer_of(await cluster.ask(CHAT))

    check("401 `invalid_api_key`", seen(test, keys=KeyRing(())))


@makes("403 `missing_scope`")
def test_a_key_for_something_else() -> None:
    answer = ask(admin_app(FakeState(keys=RING)), "/metrics", headers=as_("client"))
    check("403 `missing_scope`", rendered(answer.status_code, answer.headers, answer.content))


@makes("421 `misdirected_request`")
def test_a_name_that_is_not_ours() -> None:
    error = judged(OrchestratorConfig(listen="127.0.0.1:8000"), b"chat.example")
    assert error is not None
    check("421 `misdirected_request`", rendered(error.status, dict(error.headers()), error.body()))


# --- caches and hand-offs ---------------------------------------------------------------------------


@makes("Leases run out, and hand-offs are given up")
def test_hand_offs_that_are_late() -> None:
    async def test(cluster: FakeCluster) -> str:
        async def late(request: MemoryRequest, reply: MemoryReply) -> None:
            await asyncio.sleep(60)
            reply.answer(200, b"{}", JSON)

        spoil(cluster, "decode/0", late)
        answer = await cluster.ask(CHAT)
        await asyncio.sleep(60)
        cluster.flow.ledger.sweep()
        return answer_of(answer) + metrics_of(cluster)

    limits = LimitsConfig(request_timeout_s=600, first_byte_timeout_s=500, stream_idle_timeout_s=500)
    check("Leases run out, and hand-offs are given up", seen(test, limits=limits))


@makes("Routing stops to trust a worker's prefix cache", "KV events are missing")
def test_caches_that_are_not_as_expected(caplog: pytest.LogCaptureFixture) -> None:
    registry = registry_of({"prefill": 1})
    alarm, worker = CacheAlarm(registry), registry.workers[0]
    wrong = CacheFigures(
        prompt_tokens=100, wrong_tokens=80, expected_tokens=100, missed_tokens=80, distrusting=1
    )
    for figures in (wrong, CacheFigures(approximate=2, gaps=1)):
        worker.note_cache_figures(figures)
        alarm.look()
    for title in ("Routing stops to trust a worker's prefix cache", "KV events are missing"):
        check(title, caplog.text)


# --- the orchestrator itself ------------------------------------------------------------------------


@makes("The event loop is held up")
def test_a_stall() -> None:
    said = Said()
    watched(said, lambda: hold_up(said.event))
    check("The event loop is held up", "\n".join(said.lines))


@makes("The machine gives no CPU")
def test_a_machine_that_is_overloaded(caplog: pytest.LogCaptureFixture) -> None:
    alarm = StallAlarm(0.5)
    alarm._tell(2.0, Sample(0.0, 0.0, 0.0, 0.0), Sample(2.1, 1.9, 0.0, 1.9))
    check("The machine gives no CPU", caplog.text)


@makes("A reload is refused")
def test_a_reload_with_a_mistake(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = FakeTarget(tmp_path / "config.yaml")
    target.write({**OLD, "rooting": {}})

    async def reload() -> None:
        reloader = Reloader(ConfigSource(str(target.path)), target)
        reloader.reload_soon()
        await asyncio.gather(*reloader._asked)

    asyncio.run(reload())
    check("A reload is refused", caplog.text)


@makes("A new certificate is not taken")
def test_a_certificate_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(CERT.read_bytes())
    key.write_bytes(KEY.read_bytes())
    certificate = Certificate(TlsConfig(cert=str(cert), key=str(key)))
    cert.write_text("no certificate")
    assert not is_renewed(certificate)
    check("A new certificate is not taken", caplog.text)


@makes("Clients say that the certificate has expired")
def test_a_certificate_that_has_expired(tmp_path: Path, doctor: Doctor) -> None:
    here = Path(__file__).parents[1] / "launch/doctor"
    tls = {"cert": str(here / "expired.pem"), "key": str(here / "key.pem")}
    pools = {role: {"urls": [f"http://127.0.0.1:{port}"]} for port, role in ((1, "prefill"), (2, "decode"))}
    report = doctor({"orchestrator": {"tls": tls}, "models": [{"name": "m", **pools}]}, "--static")
    check("Clients say that the certificate has expired", report.out)


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    monkeypatch.chdir(tmp_path)
    return Doctor(tmp_path, capsys)


@makes("`/metrics` and `/admin/...` are 404")
def test_the_admin_pages_are_elsewhere() -> None:
    answer = ask(control_app(FakeState()), "/admin/workers")
    check("`/metrics` and `/admin/...` are 404", rendered(answer.status_code, answer.headers, answer.content))


# --- before the start -------------------------------------------------------------------------------


class Shell:
    """Commands in a directory with a config, and what they print."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._file = directory / "baton.yaml"
        self._capsys = capsys
        self.config: dict[str, Any] = {
            "orchestrator": {"listen": f"127.0.0.1:{free_port()}"},
            "models": [{"name": "sim", **{role: _a_pool() for role in ("prefill", "decode")}}],
        }

    def run(self, *arguments: str) -> str:
        self._file.write_text(json.dumps(self.config, indent=2))
        code = main([*arguments, "baton.yaml"])
        shown = self._capsys.readouterr()
        return f"{shown.out}{shown.err}exit code {code}\n"


def _a_pool() -> dict[str, Any]:
    return {"engine": "sim", "workers": [{"port": free_port(), "side_channel_port": free_port()}]}


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)


@makes("The config has mistakes")
def test_a_config_with_mistakes(shell: Shell) -> None:
    shell.config["rooting"] = {}
    shell.config["models"][0]["decode"]["replica"] = 2
    check("The config has mistakes", shell.run("check"))


@makes("The API is open to others, without keys")
def test_an_address_for_all(shell: Shell) -> None:
    shell.config["orchestrator"]["listen"] = "0.0.0.0:8000"
    check("The API is open to others, without keys", shell.run("check"))


@makes("`BATON_TRANSPORT` has a value that there is not")
def test_another_transport(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TRANSPORT", "json5")
    check("`BATON_TRANSPORT` has a value that there is not", shell.run("check"))


@makes("`BATON_STREAMS` has a value that there is not")
def test_other_streams(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_STREAMS", "both")
    check("`BATON_STREAMS` has a value that there is not", shell.run("check"))


@makes("A port is taken")
def test_a_port_that_is_taken(shell: Shell) -> None:
    with web_server() as url:
        shell.config["orchestrator"]["listen"] = url.removeprefix("http://")
        check("A port is taken", shell.run("up"))


@makes("The disk of the logs is full")
def test_a_full_disk(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "free_bytes", lambda folder: 0.0)
    check("The disk of the logs is full", shell.run("up"))


@makes("Lines are missing in the log")
def test_a_disk_that_becomes_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, disk, free = Lines(), bytearray(), iter((100.0,))
    monkeypatch.setattr(upkeep, "free_bytes", lambda folder: next(free))
    Upkeep([tmp_path / "w.log"], 0, 0, said).tend(0.0)  # type: ignore[arg-type]
    is_full = True

    def write(fd: int, data: bytes) -> int:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        disk.extend(data)
        return len(data)

    monkeypatch.setattr("orchestrator.telemetry.logs.os.write", write)
    writer = LineWriter()
    writer.write(b"one\ntwo\nthree\n")
    is_full = False
    writer.write(b"four\n")
    check("Lines are missing in the log", "\n".join([*said.lines, disk.decode()]))


@makes("Nobody has the scope `admin`")
def test_keys_for_clients_only(shell: Shell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "new", "alice", "--file", "keys"]) == 0
    capsys.readouterr()
    shell.config["orchestrator"] |= {"api_keys_file": "keys", "admin": f"127.0.0.1:{free_port()}"}
    check("Nobody has the scope `admin`", shell.run("check"))
