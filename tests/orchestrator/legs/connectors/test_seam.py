"""The seam for connectors, by one that sends both legs at once: real sockets, simulated engines that push."""

from __future__ import annotations

import asyncio
import contextlib
import json
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.shared.processes import free_port
from orchestrator.app import Core, ProcessContext
from orchestrator.config.file import ConfigErrors, load_config
from orchestrator.legs.connectors import CONNECTORS
from orchestrator.legs.connectors.base import Connector, Handoff, InvalidHandoff
from orchestrator.transport.pool import PooledUpstream
from orchestrator.workers.worker import Worker as WorkerHandle
from tests.orchestrator.fakes import FakeExchange
from tests.waiting import wait_for
from tests.worker.sim.workers import MODEL, Worker, running
from worker.sim.latency import Latency

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Say something"}]}
PROMPT: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8}
MANY = 60


class Push(Connector):
    """Both legs at once: they meet at the prefill worker's side channel, by the name of the transfer."""

    def __init__(self) -> None:
        super().__init__("push", sends_both_at_once=True)

    def prefill_params(self, transfer: str) -> bytes:
        return _params(transfer, do_remote_decode=True, do_remote_prefill=False)

    def read(self, answer: bytes, *, is_packed: bool, has_ids: bool) -> Handoff:
        raise AssertionError("nobody reads a hand-off out of an answer")

    def pair(self, transfer: str, host: str, port: int | None) -> Handoff:
        if port is None:
            raise InvalidHandoff("its side channel is not known")
        flags = {"do_remote_decode": False, "do_remote_prefill": True}
        return Handoff(_params(transfer, **flags, remote_host=host, remote_port=port))


def _params(transfer: str, **fields: Any) -> bytes:
    return json.dumps({"transfer_mode": "push", "transfer_id": transfer} | fields).encode()


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file, and one entry in the table."""
    connector = Push()
    monkeypatch.setitem(CONNECTORS, connector.name, connector)


@dataclass
class Site:
    """Simulated engines, prefill first, and the config that names them."""

    prefill: list[Worker]
    decode: list[Worker]
    config: Path

    def ledgers(self) -> list[dict[str, Any]]:
        return [worker.ledger() for worker in (*self.prefill, *self.decode)]

    def is_at_rest(self) -> bool:
        """No engine holds anything."""
        ledgers = self.ledgers()
        return all(ledger["in_flight"] == 0 for ledger in ledgers) and all(
            ledger["pinned"] == ledger["pushed"] + ledger["released"] + ledger["expired"]
            for ledger in ledgers
        )

    def pushed(self) -> int:
        return sum(int(ledger["pushed"]) for ledger in self.ledgers())


@contextlib.contextmanager
def site(folder: Path, *, prefills: int = 1, connector: str = "push", **settings: Any) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        ports = [free_port() for _ in range(prefills)]
        prefill = [
            stack.enter_context(running(role="prefill", side_channel_port=port, **settings)) for port in ports
        ]
        decode = [stack.enter_context(running(role="decode", **settings))]
        file = folder / "push.yaml"
        file.write_text(_yaml(connector, list(zip(prefill, ports, strict=True)), decode))
        yield Site(prefill, decode, file)


def _yaml(connector: str, prefill: list[tuple[Worker, int]], decode: list[Worker]) -> str:
    rows = [f"{{port: {_port(worker)}, side_channel_port: {port}}}" for worker, port in prefill]
    return textwrap.dedent(
        f"""\
        models:
          - name: {MODEL}
            connector: {connector}
            prefill: {{engine: sim, workers: [{", ".join(rows)}]}}
            decode: {{engine: sim, workers: [{", ".join(f"{{port: {_port(w)}}}" for w in decode)}]}}
        """
    )


def _port(worker: Worker) -> int:
    return int(worker.url.rpartition(":")[2])


class Served:
    """The data plane in front of a site."""

    def __init__(self, site: Site) -> None:
        self.core = Core(
            load_config(str(site.config)),
            PooledUpstream(connect_timeout_s=5),
            transport="json",
            credential=None,
            context=ProcessContext(index=0, started=0.0, keys=None, row=None, loads=None),
            rng=Random(1),
        )
        for worker in self.core.registry.workers:
            self.core.registry.judge.mark_ready(worker)

    def worker(self, name: str) -> WorkerHandle:
        found = self.core.registry.find(f"{MODEL}/{name}")
        assert found is not None
        return found

    def begin(self, document: dict[str, Any]) -> tuple[FakeExchange, asyncio.Task[None]]:
        path = "/v1/completions" if "prompt" in document else "/v1/chat/completions"
        exchange = FakeExchange(json.dumps(document).encode(), path=path)
        return exchange, asyncio.create_task(self._handle(exchange))

    async def _handle(self, exchange: FakeExchange) -> None:
        await self.core.data_plane.handle(exchange)

    async def ask(self, document: dict[str, Any]) -> FakeExchange:
        exchange, task = self.begin(document)
        await task
        return exchange


def run(site: Site, test: Callable[[Served], Awaitable[None]]) -> None:
    """At the end neither the orchestrator nor an engine holds anything."""

    async def main() -> None:
        served = Served(site)
        await test(served)
        await served.core.aclose()
        assert [worker.in_flight for worker in served.core.registry.workers] == [0] * len(
            served.core.registry.workers
        )
        assert served.core.telemetry.in_flight == 0
        assert served.core.flow.ledger.open == set()

    asyncio.run(main())
    wait_for(site.is_at_rest, "engines at rest")


def text_of(exchange: FakeExchange) -> str:
    if exchange.answer_headers[b"content-type"].startswith(b"application/json"):
        choice = json.loads(exchange.sent)["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    events = [json.loads(event[6:]) for event in exchange.sent.split(b"\n\n") if event.startswith(b"data: {")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(str(c["delta"].get("content") or "") if "delta" in c else str(c["text"]) for c in choices)


@pytest.mark.parametrize("document", [CHAT | {"max_tokens": 8}, PROMPT], ids=["chat", "completion"])
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_both_legs_are_sent_at_once_and_the_answer_is_the_same(
    tmp_path: Path, document: dict[str, Any], is_stream: bool
) -> None:
    with site(tmp_path) as here:
        path = "/v1/completions" if "prompt" in document else "/v1/chat/completions"
        alone = here.decode[0].post(path, document).json()["choices"][0]
        expected = alone["message"]["content"] if "message" in alone else alone["text"]

        async def test(served: Served) -> None:
            exchange = await served.ask(document | {"stream": is_stream})
            assert exchange.status == 200
            assert text_of(exchange) == expected
            assert exchange.answer_headers[b"x-baton-path"] == b"disaggregated"
            if not is_stream:
                assert exchange.answer_headers[b"x-baton-kv"] == b"transferred"

        run(here, test)
        assert here.pushed() == 1


def test_a_prefill_that_fails_is_replaced_and_its_decode_worker_is_not_blamed(tmp_path: Path) -> None:
    with site(tmp_path, prefills=2) as here:
        here.prefill[0].add_fault("error", leg="prefill", status=500, count=1)

        async def test(served: Served) -> None:
            answers = [await served.ask(PROMPT) for _ in range(2)]
            assert [answer.status for answer in answers] == [200, 200]
            assert served.worker("decode/0").failures == 0

        run(here, test)
        assert here.pushed() == 2


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_push_to_an_engine_that_stands_still_past_the_lease_starts_again(
    tmp_path: Path, is_stream: bool
) -> None:
    """The prefill worker watches over this lease: its leg fails, and takes the decode leg with it."""
    with site(tmp_path, prefills=2, lease_s=1.0) as here:

        async def test(served: Served) -> None:
            right = text_of(await served.ask(PROMPT))
            await asyncio.to_thread(here.decode[0].add_fault, "freeze", seconds=1.5)
            answer = await served.ask(PROMPT | {"stream": is_stream})
            assert (answer.status, text_of(answer)) == (200, right)

        run(here, test)
        assert sum(ledger["pinned"] for ledger in here.ledgers()) == 3


def test_who_prefills_no_more_is_told_of_as_itself(tmp_path: Path) -> None:
    with site(tmp_path) as here:
        here.prefill[0].add_fault("error", leg="prefill", status=500)

        async def test(served: Served) -> None:
            answer = await served.ask(PROMPT)
            assert answer.status == 500
            assert b"injected fault" in answer.sent
            assert served.worker("prefill/0").failures > 0
            assert served.worker("decode/0").failures == 0

        run(here, test)
        assert here.pushed() == 0


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_decode_leg_that_is_refused_ends_the_prefill(tmp_path: Path, is_stream: bool) -> None:
    with site(tmp_path, lease_s=10_000.0) as here:

        async def test(served: Served) -> None:
            answer = await served.ask(PROMPT | {"n": 0, "stream": is_stream})
            assert answer.status == 400

        run(here, test)


def test_a_client_that_leaves_while_prefill_runs_has_both_legs_ended(tmp_path: Path) -> None:
    endless = Latency(prefill_us_per_token=1e9)
    with site(tmp_path, lease_s=10_000.0, latency=endless) as here:

        async def test(served: Served) -> None:
            exchange, task = served.begin(PROMPT | {"stream": True})
            await asyncio.to_thread(wait_for, lambda: here.prefill[0].ledger()["in_flight"], "a prefill")
            exchange.leave()
            await task
            assert exchange.is_aborted

        run(here, test)


def test_a_client_that_leaves_while_decode_says_nothing_has_both_legs_ended(tmp_path: Path) -> None:
    with site(tmp_path, lease_s=10_000.0) as here:
        here.decode[0].add_fault("stall", leg="decode")

        async def test(served: Served) -> None:
            exchange, task = served.begin(PROMPT | {"stream": True})
            await asyncio.to_thread(wait_for, lambda: _has_struck(here.decode[0]), "the fault")
            exchange.leave()
            await task
            assert exchange.is_aborted

        run(here, test)


def _has_struck(worker: Worker) -> bool:
    (fault,) = worker.client.get("/sim/faults").json()
    return bool(fault["struck"])


def test_many_at_once_with_clients_that_leave_at_any_time(tmp_path: Path) -> None:
    random = Random(7)
    with site(tmp_path, prefills=2, lease_s=10_000.0) as here:

        async def test(served: Served) -> None:
            begun = [served.begin(PROMPT | {"stream": bool(n % 2)}) for n in range(MANY)]
            for n, (exchange, _) in enumerate(begun):
                if n % 3 == 0:
                    await asyncio.sleep(random.uniform(0, 0.01))
                    exchange.leave()
            await asyncio.gather(*(task for _, task in begun))
            stayed = [exchange for n, (exchange, _) in enumerate(begun) if n % 3]
            assert [exchange.status for exchange in stayed] == [200] * len(stayed)
            assert len(set(map(text_of, stayed))) == 1

        run(here, test)


def test_a_worker_whose_side_channel_is_not_known_cannot_hand_over(tmp_path: Path) -> None:
    with site(tmp_path) as here:
        head = here.config.read_text().splitlines()[:3]
        urls = {"prefill": here.prefill[0].url, "decode": here.decode[0].url}
        pools = [f"    {role}: {{urls: ['{url}']}}" for role, url in urls.items()]
        here.config.write_text("\n".join([*head, *pools, ""]))

        async def test(served: Served) -> None:
            answer = await served.ask(PROMPT)
            assert answer.status == 503
            assert b"side channel" in answer.sent

        run(here, test)


def test_an_unknown_connector_is_a_mistake_with_its_place(tmp_path: Path) -> None:
    with site(tmp_path, connector="pish") as here:
        with pytest.raises(ConfigErrors) as caught:
            load_config(str(here.config))
        assert "push.yaml:3:5: connector: 'pish' is not possible, did you mean 'push'" in str(caught.value)
