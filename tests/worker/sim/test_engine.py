"""The engine without HTTP: two engines in one event loop, the side channel between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from worker.sim import text
from worker.sim.engine import Engine
from worker.sim.faults import KvLost as KvLostFault
from worker.sim.faults import Plan
from worker.sim.handoffs.base import KvLost
from worker.sim.latency import Latency
from worker.sim.metrics import Metrics
from worker.sim.runs import Prompt, Run
from worker.sim.settings import Settings

WANTS_PIN = {"do_remote_decode": True}
TOKENS = list(range(40))
LIMIT_S = 60
AS_IT_IS = Plan()


def engine(**settings: Any) -> Engine:
    return Engine(Settings(**({"model_name": "m"} | settings)), Metrics("m"))


@asynccontextmanager
async def pair(**settings: Any) -> AsyncIterator[tuple[Engine, Engine]]:
    prefiller, decoder = engine(**settings), engine(**settings)
    async with asyncio.timeout(LIMIT_S), prefiller.serving(), decoder.serving():
        yield prefiller, decoder


def prompt(tokens: list[int] = TOKENS, **fields: Any) -> Prompt:
    return Prompt("request", tokens, **fields)


async def once(engine: Engine, asked: Prompt, plan: Plan = AS_IT_IS) -> Run:
    async with engine.run(asked, plan) as run:
        engine.finish(run, plan)
    return run


async def handoff(engine: Engine, tokens: list[int] = TOKENS, plan: Plan = AS_IT_IS) -> dict[str, Any]:
    run = await once(engine, prompt(tokens, kv=WANTS_PIN), plan)
    assert run.kv is not None
    return {key: value for key, value in run.kv.items() if key != "remote_prefill_cached_tokens"}


async def until(condition: Callable[[], object]) -> None:
    """Bounded by the timeout around it."""
    while not condition():  # noqa: ASYNC110  # the engine has no event for tests
        await asyncio.sleep(0.005)


def assert_idle(*engines: Engine) -> None:
    for one in engines:
        assert (one.running, one.waiting, one.pool.used) == (0, 0, 0)
        assert one.ledger.next_deadline() is None


def test_a_prompt_is_computed_here() -> None:
    async def check() -> None:
        async with pair() as (one, _):
            run = await once(one, prompt())
            assert run.digest == text.digest_of(TOKENS)
            assert (run.cached_tokens, run.created_tokens, run.kv) == (0, 32, None)
            again = await once(one, prompt())
            assert (again.cached_tokens, again.created_tokens) == (32, 0)
            assert_idle(one)

    asyncio.run(check())


def test_a_handoff_carries_the_digest_and_nothing_stays() -> None:
    async def check() -> None:
        async with pair() as (prefiller, decoder):
            kv = await handoff(prefiller)
            assert prefiller.pool.used == 3
            run = await once(decoder, prompt(list(range(100, 140)), kv=kv))  # another prompt on purpose
            assert run.digest == text.digest_of(TOKENS)
            assert (run.was_received, run.cached_tokens, run.created_tokens) == (True, 40, 0)
            assert prefiller.ledger.pulled == 1
            assert_idle(prefiller, decoder)

    asyncio.run(check())


def test_what_was_pulled_is_cached_afterwards() -> None:
    async def check() -> None:
        async with pair() as (prefiller, decoder):
            await once(decoder, prompt(kv=await handoff(prefiller)))
            assert (await once(decoder, prompt())).cached_tokens == 32

    asyncio.run(check())


def broken(kv: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return kv | fields


@pytest.mark.parametrize(
    "wrong",
    [
        {"remote_request_id": "unknown"},
        {"remote_engine_id": "restarted"},
        {"remote_block_ids": [[7]]},
        {"remote_port": 1},
        {"remote_host": None},
        {"remote_block_ids": None},
    ],
)
def test_wrong_handoffs_fail(wrong: dict[str, Any]) -> None:
    async def check() -> None:
        async with pair() as (prefiller, decoder):
            kv = await handoff(prefiller)
            with pytest.raises(KvLost):
                await once(decoder, prompt(kv=broken(kv, **wrong)))
            assert decoder.pool.used == decoder.running == 0

    asyncio.run(check())


def test_a_second_pull_fails() -> None:
    async def check() -> None:
        async with pair() as (prefiller, decoder):
            kv = await handoff(prefiller)
            await once(decoder, prompt(kv=kv))
            with pytest.raises(KvLost):
                await once(decoder, prompt(kv=kv))
            assert prefiller.ledger.unknown == 1

    asyncio.run(check())


def test_recompute_instead_of_failing() -> None:
    async def check() -> None:
        async with pair(load_failure_policy="recompute") as (prefiller, decoder):
            kv = await handoff(prefiller)
            run = await once(decoder, prompt(kv=broken(kv, remote_engine_id="restarted")))
            assert run.digest == text.digest_of(TOKENS)
            assert (run.was_received, run.cached_tokens, run.created_tokens) == (False, 0, 32)

    asyncio.run(check())


def test_a_forwarded_count_hides_the_recompute() -> None:
    async def check() -> None:
        async with pair(load_failure_policy="recompute") as (prefiller, decoder):
            kv = await handoff(prefiller) | {"remote_prefill_cached_tokens": 7}
            assert (await once(decoder, prompt(kv=kv))).cached_tokens == 7
            assert (await once(decoder, prompt(kv=kv))).cached_tokens == 7

    asyncio.run(check())


def test_prompt_logprobs_compute_here_and_release_there() -> None:
    async def check() -> None:
        async with pair() as (prefiller, decoder):
            kv = await handoff(prefiller)
            run = await once(decoder, prompt(kv=kv, reads_cache=False))
            assert (run.was_received, run.cached_tokens) == (False, 0)
            await until(lambda: prefiller.ledger.released)
            assert_idle(prefiller, decoder)

    asyncio.run(check())


def test_an_expired_lease_frees_and_is_counted() -> None:
    async def check() -> None:
        async with pair(lease_s=0.05) as (prefiller, decoder):
            kv = await handoff(prefiller)
            await until(lambda: prefiller.ledger.expired)
            assert_idle(prefiller)
            assert b"nixl_num_kv_expired_reqs_total{" in prefiller.metrics.render()
            with pytest.raises(KvLost):
                await once(decoder, prompt(kv=kv))

    asyncio.run(check())


def test_who_leaves_before_the_pull_releases() -> None:
    async def check() -> None:
        async with pair(num_blocks=3) as (prefiller, decoder):
            kv = await handoff(prefiller)
            async with decoder.run(prompt(list(range(48))), AS_IT_IS):  # takes all blocks
                waiting = asyncio.ensure_future(once(decoder, prompt(kv=kv)))
                await until(lambda: decoder.waiting == 1)
                waiting.cancel()
                await until(lambda: prefiller.ledger.released)
            assert waiting.cancelled()
            assert_idle(prefiller, decoder)

    asyncio.run(check())


def test_who_waits_keeps_the_lease() -> None:
    async def check() -> None:
        async with pair(num_blocks=3, lease_s=3.0) as (prefiller, decoder):
            kv = await handoff(prefiller)
            deadline = prefiller.ledger.next_deadline() or 0.0
            async with decoder.run(prompt(list(range(48))), AS_IT_IS):
                waiting = asyncio.ensure_future(once(decoder, prompt(kv=kv)))
                await until(lambda: (prefiller.ledger.next_deadline() or 0.0) > deadline)
                assert b'stage="waiting_to_start"} 1.0' in decoder.metrics.render()
            assert (await waiting).was_received
            assert prefiller.ledger.expired == 0

    asyncio.run(check())


def test_leaving_in_the_middle_of_a_prefill_frees_at_once() -> None:
    async def check() -> None:
        latency = Latency(prefill_us_per_token=1e9)
        async with pair(latency=latency) as (prefiller, _):
            computing = asyncio.ensure_future(once(prefiller, prompt(kv=WANTS_PIN)))
            await until(lambda: prefiller.running)
            assert prefiller.pool.used == 3
            computing.cancel()
            await until(lambda: not prefiller.running)
            assert_idle(prefiller)
            assert prefiller.ledger.pinned == 0

    asyncio.run(check())


def test_the_queue_is_first_come_first_served() -> None:
    async def check() -> None:
        async with pair(num_blocks=4) as (one, _):
            order: list[str] = []

            async def run(name: str, blocks: int) -> None:
                async with one.run(prompt([len(name)] * 16 * blocks), AS_IT_IS):
                    order.append(name)
                    await asyncio.sleep(0)

            async with one.run(prompt(list(range(48))), AS_IT_IS):
                runs = [run("large", 4), run("tiny", 1), run("tiniest", 1)]
                tasks = [asyncio.ensure_future(each) for each in runs]
                await until(lambda: one.waiting == 3)
                assert order == []  # the small ones would fit, but it is not their turn
            await asyncio.gather(*tasks)
            assert order == ["large", "tiny", "tiniest"]
            assert_idle(one)

    asyncio.run(check())


def test_seats_are_limited() -> None:
    async def check() -> None:
        async with pair(max_num_seqs=2) as (one, _):
            async with one.run(prompt([1, 2]), AS_IT_IS), one.run(prompt([3, 4]), AS_IT_IS):
                third = asyncio.ensure_future(once(one, prompt([5, 6])))
                await until(lambda: one.waiting == 1)
                assert one.running == 2
            await third
            await once(one, prompt([1, 2], sequences=5))  # alone, more than there are seats
            assert_idle(one)

    asyncio.run(check())


def test_several_answers_pin_several_times_and_tell_of_the_last() -> None:
    async def check() -> None:
        async with pair() as (prefiller, decoder):
            run = await once(prefiller, prompt(kv=WANTS_PIN, sequences=2))
            assert run.kv is not None
            assert run.kv["remote_request_id"] == "1_request"
            await once(decoder, prompt(kv=run.kv))
            left = prefiller.ledger.describe(0)["pins"]
            assert [pin["request_id"] for pin in left] == ["0_request"]

    asyncio.run(check())


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_lost_kv(side: str) -> None:
    async def check() -> None:
        lost = Plan([KvLostFault()])
        async with pair() as (prefiller, decoder):
            kv = await handoff(prefiller, plan=lost if side == "prefill" else AS_IT_IS)
            with pytest.raises(KvLost):
                await once(decoder, prompt(kv=kv), lost if side == "decode" else AS_IT_IS)
            await until(lambda: prefiller.ledger.released)
            assert_idle(prefiller, decoder)

    asyncio.run(check())


def test_a_peer_that_talks_nonsense_disturbs_nobody() -> None:
    async def check() -> None:
        async with pair() as (prefiller, decoder):
            kv = await handoff(prefiller)
            for nonsense in (b"", b"\n", b"{}\n", b"\xff" * 100 + b"\n"):
                reader, writer = await asyncio.open_connection(kv["remote_host"], kv["remote_port"])
                writer.write(nonsense)
                writer.write_eof()
                assert await reader.read() == b""
                writer.close()
            assert (await once(decoder, prompt(kv=kv))).was_received

    asyncio.run(check())
