"""Simulated engines that stand still while their servers answer, over real sockets. They give what vLLM gives
for blocks whose lease is over: another prompt's KV cache, without a word of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from random import Random
from typing import Any

import pytest

from orchestrator.app import Core, ProcessContext
from orchestrator.config.options import Config, HealthConfig, ModelConfig, PoolConfig, RoutingConfig
from orchestrator.telemetry.counters import HandoffTrouble
from orchestrator.transport.pool import PooledUpstream
from orchestrator.workers.health import HttpProbe, Prober
from tests.orchestrator.fakes import FakeExchange
from tests.worker.sim.workers import MODEL, Worker, running
from worker.sim.latency import Latency

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Say something"}],
    "temperature": 0,
    "max_tokens": 12,
}
BOTH_KINDS = pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
LEASE_S = 4.0


class Site:
    """Engines, and the data plane in front of them."""

    def __init__(self, prefill: Worker, decode: list[Worker], routing: RoutingConfig) -> None:
        self.prefill = prefill
        self.decode = decode
        pools = {
            "prefill": PoolConfig(urls=[prefill.url], served_model=MODEL),
            "decode": PoolConfig(urls=[worker.url for worker in decode], served_model=MODEL),
        }
        config = Config(
            models=[ModelConfig(name=MODEL, **pools)], routing=routing, health=HealthConfig(interval_s=0.2)
        )
        self.core = Core(
            config,
            PooledUpstream(connect_timeout_s=5),
            transport="json",
            credential=None,
            context=ProcessContext(index=0, started=0.0, keys=None, row=None, loads=None),
            rng=Random(1),
        )
        self.probe = HttpProbe(None)
        self.prober = Prober(self.core.registry, self.probe, random=Random(1))

    async def start(self) -> None:
        self.core.start()
        self.prober.start()
        async with asyncio.timeout(30):
            while not all(worker.state == "ready" for worker in self.core.registry.workers):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def aclose(self) -> None:
        await self.prober.aclose()
        await self.probe.aclose()
        await self.core.aclose()

    async def ask(self, *, is_stream: bool = False) -> str:
        document = CHAT | {"stream": is_stream}
        exchange = FakeExchange(json.dumps(document).encode())
        await self.core.data_plane.handle(exchange)
        assert exchange.status == 200, exchange.sent
        return text_of(exchange)

    def given_up(self, trouble: HandoffTrouble) -> int:
        telemetry = self.core.telemetry
        return telemetry.row[telemetry.layout.handoffs + trouble]


def text_of(exchange: FakeExchange) -> str:
    if exchange.answer_headers[b"content-type"].startswith(b"application/json"):
        return str(json.loads(exchange.sent)["choices"][0]["message"]["content"])
    events = [json.loads(event[6:]) for event in exchange.sent.split(b"\n\n") if event.startswith(b"data: {")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(str(choice["delta"].get("content") or "") for choice in choices)


@contextlib.contextmanager
def engines(decodes: int, **settings: Any) -> Iterator[tuple[Worker, list[Worker]]]:
    with contextlib.ExitStack() as stack:
        options = {"lease_s": LEASE_S, "late_pulls": "stale"} | settings
        prefill = stack.enter_context(running(role="prefill", **options))
        decode = [stack.enter_context(running(role="decode", **options)) for _ in range(decodes)]
        yield prefill, decode


def run(
    test: Callable[[Site], Awaitable[None]], decodes: int, routing: RoutingConfig, **settings: Any
) -> None:
    with engines(decodes, **settings) as (prefill, decode):

        async def main() -> None:
            here = Site(prefill, decode, routing)
            await here.start()
            try:
                await test(here)
            finally:
                await here.aclose()

        asyncio.run(main())


def freeze(worker: Worker, seconds: float | None) -> None:
    worker.add_fault("freeze", seconds=seconds)


async def in_thread(work: Callable[..., Any], *args: Any) -> None:
    await asyncio.to_thread(work, *args)


@BOTH_KINDS
def test_what_a_frozen_engine_says_after_the_lease_reaches_nobody(is_stream: bool) -> None:
    async def test(here: Site) -> None:
        right = await here.ask()
        await in_thread(freeze, here.decode[0], LEASE_S + 1)
        assert await here.ask(is_stream=is_stream) == right
        assert here.given_up(HandoffTrouble.LATE) >= 1

    # The answer that is wrong would come a second after the lease.
    run(test, 1, RoutingConfig(handoff_stall_s=1000))


@pytest.mark.pure  # a constant is replaced
def test_without_the_rule_it_would_reach_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated engine does what vLLM does: the answer looks like any other, and is of another prompt."""

    async def test(here: Site) -> None:
        right = await here.ask()
        monkeypatch.setattr("orchestrator.legs.ledger.MARGIN", -100.0)
        await in_thread(freeze, here.decode[0], LEASE_S + 1)
        assert await here.ask() != right

    run(test, 1, RoutingConfig(handoff_stall_s=1000))


def test_a_whole_answer_may_take_longer_than_the_lease() -> None:
    async def test(here: Site) -> None:
        await here.ask()
        (record,) = here.core.telemetry.records
        assert record.finished - record.received > 1.0
        assert here.given_up(HandoffTrouble.LATE) == 0
        here.core.flow.ledger.sweep()
        assert here.core.flow.ledger.open == set()

    run(test, 1, RoutingConfig(), lease_s=1.0, latency=Latency(decode_ms_per_token=200))


@BOTH_KINDS
def test_a_frozen_engine_is_noticed_long_before_the_lease_ends(is_stream: bool) -> None:
    async def test(here: Site) -> None:
        for _ in range(8):
            right = await here.ask(is_stream=is_stream)
        await in_thread(freeze, here.decode[0], None)
        answers: set[str] = set()
        async with asyncio.timeout(60):  # the other one may be chosen a few times, by what was reported last
            while not here.given_up(HandoffTrouble.STALLED):
                answers.add(await here.ask(is_stream=is_stream))
        answers |= {await here.ask(is_stream=is_stream) for _ in range(3)}
        assert answers == {right}
        assert here.given_up(HandoffTrouble.STALLED) == 1
        assert here.given_up(HandoffTrouble.LATE) == 0
        frozen = here.core.registry.find(f"{MODEL}/decode/0")
        assert frozen is not None
        assert frozen.state == "suspect"  # though it answers its probes
        await in_thread(here.decode[0].client.delete, "/sim/faults")

    run(test, 2, RoutingConfig(), lease_s=30.0)
