"""Why a worker cannot be used: the log says it once, with what to do; `/ready` says it to everybody."""

from __future__ import annotations

import asyncio
import re
import ssl
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

import httpx
import pytest

from launch.manual import explained
from orchestrator.config.options import RoutingConfig
from orchestrator.transport.base import Origin, host_header
from orchestrator.workers import health, troubles
from orchestrator.workers.health import ENDPOINTS, MAX_PAGE_BYTES, HttpProbe, ProbeFailed, Prober
from orchestrator.workers.judge import MAX_WHY
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import WorkerState
from orchestrator.workers.troubles import answered
from orchestrator.workers.worker import Worker
from tests.orchestrator.certificate import CERT, KEY
from tests.orchestrator.cluster import address
from tests.orchestrator.scripted import of_json, page, run, site
from tests.simulation.loop import run_virtually

STARTING, READY, UNFIT = WorkerState.STARTING, WorkerState.READY, WorkerState.UNFIT
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
QUICK = {"interval_s": 0.05}
TLS = ssl.create_default_context()


def line(status: str) -> bytes:
    return page(b"", status)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():  # noqa: ASYNC110 - a log line is no event
            await asyncio.sleep(0.005)


# --- from the start -----------------------------------------------------------------------------

SCRIPTS: dict[str, tuple[Mapping[str, bytes], str, str]] = {
    "a wrong key": (
        {"/v1/models": of_json({"error": "Unauthorized"}, "401 Unauthorized")},
        "refuses the orchestrator's key (401)",
        "BATON_WORKER_API_KEY",
    ),
    "another model": (
        {"/v1/models": of_json({"data": [{"id": "other"}]})},
        "serves another model",
        "served_model",
    ),
    "a web server": ({"/health": line("404 Not Found")}, "is no model server (404)", "another service"),
    "a redirect": ({"/v1/models": line("302 Found")}, "is no model server (302)", "another service"),
    "an engine that died": ({"/health": line("503 Service Unavailable")}, "is ill (503)", "its own log"),
    "no HTTP": ({"/health": b"SSH-2.0-x\r\n"}, "does not answer in HTTP", "https://"),
    "a TLS alert": ({"/health": b"\x15\x03\x03\x00\x02\x02\x46"}, "does not answer in HTTP", "https://"),
    "garbage for models": ({"/v1/models": page(b"?")}, "answers what cannot be read", "another service"),
    "deep JSON": ({"/v1/models": page(b"[" * 100_000)}, "answers what cannot be read", "another service"),
    "deep objects": (
        {"/v1/models": page(b'{"data":[{"id":"m","x":' + b'{"a":' * 100_000)},
        "answers what cannot be read",
        "another service",
    ),
    "no UTF-8": (
        {"/v1/models": page(b'{"data":[{"id":"\xff\xfe"}]}')},
        "answers what cannot be read",
        "service",
    ),
    "huge": ({"/v1/models": page(b" " * (MAX_PAGE_BYTES + 1))}, "answers what cannot be read", "service"),
    "endless": (
        {"/v1/models": b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (4 * MAX_PAGE_BYTES)},
        "answers what cannot be read",
        "service",
    ),
    "gzip": (
        {"/v1/models": page(zlib.compress(b" " * 10**7), fields="content-encoding: gzip\r\n")},
        "answers what cannot be read",
        "service",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_makes_a_worker_unusable_is_logged_once_with_what_to_do(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PATIENCE_S", 0.0)
    script, what, advice = SCRIPTS[name]

    async def scenario() -> None:
        async with site("both", health=QUICK, waits=False) as (made, [worker]):
            worker.script |= script
            [path] = script
            await until(lambda: worker.asked(path) >= 5)
            [said] = warnings(caplog)
            assert said.startswith("m/both/0 ")
            assert what in said or "is unfit" in said
            assert advice in said
            known = made.known(worker)
            assert known.state in (STARTING, UNFIT)
            assert known.reason == what
            assert known.last_error is not None
            assert len(known.last_error) <= MAX_WHY
            assert worker.url not in known.reason
            worker.script.clear()  # it is mended
            await made.wait_state(worker, READY)
            assert (known.reason, known.last_error) == (None, None)

    run(scenario)


def test_another_reason_is_told_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "TELL_EVERY_S", 0.0)

    async def scenario() -> None:
        async with site("both", health=QUICK, waits=False) as (made, [worker]):
            for page_of_models in (line("401 Unauthorized"), of_json({"data": []}), line("307 Moved")):
                before = len(warnings(caplog))
                worker.script["/v1/models"] = page_of_models
                await until(lambda: len(warnings(caplog)) > before)  # noqa: B023 - awaited here
            assert made.known(worker).state is UNFIT

    run(scenario)
    found = [said.split("it ", 1)[1] for said in warnings(caplog)]
    assert len(found) == 3
    assert "401" in found[0]
    assert "not 'm'" in found[1]
    assert "307" in found[2]


def test_reasons_that_change_to_and_fro_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with site("both", health=QUICK, waits=False) as (_, [worker]):
            pages = (line("401 Unauthorized"), of_json({"data": []}))
            for turn in range(20):
                before = worker.asked("/v1/models")
                worker.script["/v1/models"] = pages[turn % 2]
                await until(lambda: worker.asked("/v1/models") > before)  # noqa: B023 - awaited here

    run(scenario)
    assert len(warnings(caplog)) == 1


# --- what a probe's exception means -------------------------------------------------------------


async def told_of(url: str) -> str:
    """Why a worker at this address cannot be used."""
    parts = httpx.URL(url)
    there = replace(address("both", 0), url=url, host=parts.host, port=parts.port or 80)
    registry, probe = Registry([there], ["m"], "json"), HttpProbe("ours")
    prober = Prober(registry, probe, random=Random(1))
    prober.start()
    try:
        await until(lambda: registry.workers[0].reason is not None)
    finally:
        await prober.aclose()
        await probe.aclose()
    return str(registry.workers[0].reason)


def test_a_closed_port_and_an_unknown_host_are_told_apart() -> None:
    async def scenario() -> None:
        assert await told_of("http://127.0.0.1:1") == troubles.REFUSES.what
        assert await told_of("http://no-such-host.invalid:80") == troubles.UNKNOWN_HOST.what
        assert await told_of(f"http://{'x' * 70}.invalid:80") == troubles.UNKNOWN_HOST.what

    run(scenario)


async def answers_400(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What uvicorn says to the beginning of TLS."""
    await reader.read(1)
    writer.write(line("400 Bad Request"))
    await writer.drain()
    writer.close()


def test_tls_on_a_plain_port_and_the_other_way_round_are_told_apart() -> None:
    async def scenario() -> None:
        async with await asyncio.start_server(answers_400, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            assert await told_of(f"https://127.0.0.1:{port}") == troubles.NO_TLS.what
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(CERT, KEY)
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=tls) as server:
            port = server.sockets[0].getsockname()[1]
            assert await told_of(f"http://127.0.0.1:{port}") in (troubles.CUT.what, troubles.NO_HTTP.what)
            assert await told_of(f"https://127.0.0.1:{port}") == troubles.UNTRUSTED.what

    run(scenario)


@pytest.mark.parametrize("status", [200, 204, 301, 401, 403, 404, 407, 500, 503, 999])
def test_what_everybody_may_read_has_no_address_in_it(status: int) -> None:
    assert "http" not in answered(status).what


@pytest.mark.parametrize("url", ["http://\x00:1", "http://a b:1", "http://[::1:1"])
def test_an_address_that_no_client_can_ask_is_a_failed_probe(url: str) -> None:
    async def scenario() -> None:
        registry, probe = Registry([replace(address("both", 0), url=url)], ["m"], "json"), HttpProbe(None)
        with pytest.raises(ProbeFailed):
            await probe(registry.workers[0])
        await probe.aclose()

    run(scenario)


def test_any_exception_is_a_failed_probe_and_the_worker_is_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        errors = [RecursionError("deep"), UnicodeDecodeError("utf-8", b"x", 0, 1, "?"), KeyError("x" * 9_999)]
        registry = Registry([address("both", 0)], ["m"], "json", time=loop.time)

        async def probe(worker: Worker) -> None:
            if errors:
                raise errors.pop(0)

        prober = Prober(registry, probe, random=Random(1), time=loop.time)
        prober.start()
        while registry.workers[0].state is not READY:
            await asyncio.sleep(0.1)
            assert len(registry.workers[0].last_error or "") <= MAX_WHY
        await prober.aclose()

    run_virtually(scenario())
    assert len(warnings(caplog)) == 1


# --- plain workers ------------------------------------------------------------------------------

NO_ANNOUNCEMENTS = {
    "html": page(b"<html>"),
    "deep": page(b"[" * 100_000),
    "no UTF-8": page(b'{"role":"\xff"}'),
    "a number that nobody can send on": of_json(
        {"role": "both", "model": "m", "decodes": ["json"], "engine": "x", "engine_version": "1"}
        | {"max_model_len": 10**30}
    ),
    "a long name": of_json(
        {"role": "both", "model": "m" * 10_000, "decodes": ["json"], "engine": "x", "engine_version": "1"}
    ),
    "huge": page(b" " * (MAX_PAGE_BYTES + 1)),
    "gzip": page(zlib.compress(b"{}"), fields="content-encoding: deflate\r\n"),
}


@pytest.mark.parametrize("name", NO_ANNOUNCEMENTS)
def test_who_announces_garbage_is_a_plain_worker_and_that_is_said_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with site("both", health=QUICK, waits=False) as (made, [worker]):
            worker.script["/baton/info"] = NO_ANNOUNCEMENTS[name]
            for turn in range(3):
                await made.wait_state(worker, READY)
                assert made.known(worker).introduction.info is None
                assert worker.asked("/baton/info") == turn + 1
                made.registry.judge.mark_gone(made.known(worker), "restarted")
            assert (await made.ask(CHAT)).status == 503

    run(scenario)
    assert len([said for said in warnings(caplog) if "plain worker" in said]) == 1


# --- keys that change ---------------------------------------------------------------------------


def test_a_changed_key_shows_without_any_request_and_so_does_its_return(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with site("both", health=QUICK) as (made, [worker]):
            worker.spoil(line("401 Unauthorized"))
            await made.wait_state(worker, UNFIT)
            assert made.known(worker).reason == "refuses the orchestrator's key (401)"
            worker.script.clear()
            await made.wait_state(worker, READY)
            assert (await made.ask(CHAT)).status == 200

    run(scenario)
    [said] = [said for said in warnings(caplog) if "401" in said]
    assert "m/both/0 is unfit" in said
    assert "BATON_WORKER_API_KEY" in said


def test_a_worker_that_is_unfit_for_all_requests_stays_so_until_it_serves_them() -> None:
    """Its list of models is well all the time: what requests are asked for is what a probe asks for."""

    async def scenario() -> None:
        async with site("both", health=QUICK) as (made, [worker]):
            worker.script |= dict.fromkeys(ENDPOINTS, line("307 Temporary Redirect"))
            assert (await made.ask(CHAT)).status == 502
            await made.wait_state(worker, UNFIT)
            before = worker.asked("/v1/models")
            await until(lambda: worker.asked("/v1/models") >= before + 3)
            assert made.known(worker).state is UNFIT
            assert (await made.ask(CHAT)).status == 503
            worker.script.clear()
            await made.wait_state(worker, READY)
            assert not made.known(worker).is_denied
            assert (await made.ask(CHAT)).status == 200

    run(scenario)


# --- the same head for both ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (Origin("w", 80), "w"),
        (Origin("w", 443), "w:443"),
        (Origin("w", 8000), "w:8000"),
        (Origin("w", 443, TLS), "w"),
        (Origin("w", 80, TLS), "w:80"),
        (Origin("::1", 80), "[::1]"),
        (Origin("::1", 443, TLS), "[::1]"),
        (Origin("::1", 8000), "[::1]:8000"),
        (Origin("fe80::1%eth0", 80), "[fe80::1]"),
    ],
)
def test_the_host_leaves_the_schemes_own_port_out(origin: Origin, host: str) -> None:
    assert host_header(origin) == host
    headers: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        headers.append(request.headers["host"])
        return httpx.Response(200)

    async def scenario() -> None:
        there = replace(address("both", 0), host=origin.host, port=origin.port, url="http://w:1")
        worker = Registry([there], ["m"], "json", routing=RoutingConfig(load="own")).workers[0]
        worker.origin, worker.state = origin, READY
        await HttpProbe(None, transport=httpx.MockTransport(answer))(worker)

    run(scenario)
    assert headers == [host]


def test_probes_and_legs_have_the_same_host_and_ask_for_no_encoding() -> None:
    async def scenario() -> None:
        async with site("both") as (made, [worker]):
            await made.ask(CHAT)
            for wanted in (b"host: ", b"accept-encoding: ", b"authorization: "):
                found = {
                    field.lower()
                    for _, head, _ in worker.requests
                    for field in head.split(b"\r\n")
                    if field.lower().startswith(wanted)
                }
                assert len(found) == 1
            assert b"accept-encoding: identity" in worker.requests[-1][1]

    run(scenario)


# --- the advice ---------------------------------------------------------------------------------


def test_options_that_advice_names_are_there() -> None:
    known = [trouble for trouble in vars(troubles).values() if isinstance(trouble, troubles.Trouble)]
    named = [name for trouble in known for name in re.findall(r"\w+\.\*\.[\w.*]+", trouble.advice)]
    assert named
    for name in named:
        assert explained(name)
