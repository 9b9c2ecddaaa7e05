"""Transfers between two engines in one event loop, whatever comes of their legs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.shared.processes import free_port
from tests.worker.sim.test_engine import AS_IT_IS, TOKENS, assert_idle, engine, once, prompt, until
from worker.sim import side_channel, text
from worker.sim.engine import Engine
from worker.sim.faults import KvLost as KvLostFault
from worker.sim.faults import Plan
from worker.sim.handoffs.base import KvLost
from worker.sim.handoffs.transfers import Transfers
from worker.sim.latency import Latency
from worker.sim.runs import Prompt, Run
from worker.sim.side_channel import PushAsk, Reply

LIMIT_S = 10
LOST = Plan([KvLostFault()])
PUSH = {"transfer_mode": "push"}
NUMBERS = count()


@asynccontextmanager
async def pair(**options: Any) -> AsyncIterator[tuple[Engine, Engine, int]]:
    """A prefill engine, a decode engine, and the port where the former sends from."""
    port = free_port()
    prefiller, decoder = engine(side_channel_port=port, **options), engine(**options)
    async with asyncio.timeout(LIMIT_S), prefiller.serving(), decoder.serving():
        yield prefiller, decoder, port


async def prefill(engine: Engine, name: str, tokens: list[int] = TOKENS, plan: Plan = AS_IT_IS) -> Run:
    kv = PUSH | {"transfer_id": name, "do_remote_decode": True}
    return await once(engine, Prompt(f"{name}-{next(NUMBERS)}", tokens, kv=kv), plan)


async def decode(engine: Engine, name: str, port: int, tokens: list[int] = TOKENS) -> Run:
    kv = PUSH | {"transfer_id": name, "do_remote_prefill": True}
    kv |= {"remote_host": "127.0.0.1", "remote_port": port}
    return await once(engine, Prompt(f"{name}-{next(NUMBERS)}", tokens, kv=kv))


# --- whatever comes of the legs


@dataclass(frozen=True)
class Leg:
    comes_ms: int
    leaves_ms: int | None  # after it has come; None: stays to the end


@dataclass(frozen=True)
class Story:
    """One transfer's legs, of which there may be too few or too many."""

    prefills: list[Leg]
    decodes: list[Leg]
    is_lost: bool
    tokens: int


LEGS = st.builds(Leg, comes_ms=st.integers(0, 30), leaves_ms=st.none() | st.integers(0, 40))
STORIES = st.builds(
    Story,
    prefills=st.lists(LEGS, max_size=2),
    decodes=st.lists(LEGS, max_size=2),
    is_lost=st.integers(0, 9).map(lambda number: number == 0),
    tokens=st.integers(1, 60),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(STORIES, max_size=40))
def test_nothing_is_left_of_any_story(stories: list[Story]) -> None:
    asyncio.run(_tell(stories))


async def _tell(stories: list[Story]) -> None:
    latency = Latency(prefill_us_per_token=20, transfer_us_per_token=100)
    limits = {"num_blocks": 40, "max_num_seqs": 8, "lease_s": 0.3, "latency": latency}
    async with pair(**limits) as (prefiller, decoder, port):
        runs = []
        for number, story in enumerate(stories):
            tokens, plan = [number] * story.tokens, LOST if story.is_lost else AS_IT_IS
            runs += [_live(leg, prefill(prefiller, f"{number}", tokens, plan)) for leg in story.prefills]
            runs += [_live(leg, decode(decoder, f"{number}", port, tokens)) for leg in story.decodes]
        for run in filter(None, await asyncio.gather(*runs)):
            assert run.digest == text.digest_of(run.prompt.tokens)
        await until(lambda: not prefiller.ledger.describe(0)["pins"])
        assert_idle(prefiller, decoder)
        assert (prefiller.sending, decoder.sending) == (0, 0)
        ledger = prefiller.ledger
        assert ledger.pinned == ledger.pushed + ledger.released + ledger.expired


async def _live(leg: Leg, work: Any) -> Run | None:
    """The leg's run, if it has come to its end."""
    await asyncio.sleep(leg.comes_ms / 1000)
    running = asyncio.ensure_future(work)
    try:
        if leg.leaves_ms is not None:
            asyncio.get_running_loop().call_later(leg.leaves_ms / 1000, running.cancel)
        return await running
    except (KvLost, asyncio.CancelledError):
        return None


# --- what HTTP cannot show


def test_a_decode_side_that_falls_silent_does_not_keep_the_blocks() -> None:
    """It said that it was ready; a worker that hangs says nothing more, and its connection stays."""

    async def check() -> None:
        latency = Latency(transfer_us_per_token=25_000)  # 1 s
        async with pair(lease_s=0.2, latency=latency) as (prefiller, _, port):
            async with side_channel.connect("127.0.0.1", port) as line:
                line.tell(PushAsk("silent", is_ready=True))
                with pytest.raises(KvLost):
                    await prefill(prefiller, "silent")
                assert (await line.read_reply()).is_pending
                assert await line.read_reply() == Reply()
            assert (prefiller.ledger.expired, prefiller.ledger.pushed) == (1, 0)
            assert_idle(prefiller)

    asyncio.run(check())


def test_a_side_that_came_first_hears_of_the_prefill_leg_at_once() -> None:
    """It may have waited for nearly a lease by then."""

    async def check() -> None:
        async with pair(latency=Latency(prefill_us_per_token=1e9)) as (prefiller, _, port):
            async with side_channel.connect("127.0.0.1", port) as line:
                line.tell(PushAsk("first"))
                hearing = asyncio.ensure_future(line.read_reply())
                await asyncio.wait((hearing,), timeout=0.05)
                assert not hearing.done()
                computing = asyncio.ensure_future(prefill(prefiller, "first"))
                assert (await hearing).is_pending
                computing.cancel()
                assert await line.read_reply() == Reply()
            assert_idle(prefiller)

    asyncio.run(check())


def test_a_side_that_waits_for_blocks_does_not_keep_the_lease() -> None:
    async def check() -> None:
        async with pair(lease_s=0.3, num_blocks=3) as (prefiller, decoder, port):
            async with decoder.run(prompt(list(range(48))), AS_IT_IS):  # takes all blocks
                waiting = asyncio.ensure_future(decode(decoder, "late", port))
                with pytest.raises(KvLost):
                    await prefill(prefiller, "late")
                with pytest.raises(KvLost):
                    await waiting
                assert (prefiller.ledger.expired, decoder.waiting) == (1, 0)
            assert_idle(prefiller, decoder)

    asyncio.run(check())


def test_a_queued_leg_that_is_to_recompute_stays_in_the_queue() -> None:
    async def check() -> None:
        async with pair(lease_s=0.3, num_blocks=3, load_failure_policy="recompute") as (one, decoder, port):
            async with decoder.run(prompt(list(range(48))), AS_IT_IS):
                waiting = asyncio.ensure_future(decode(decoder, "lost", port))
                with pytest.raises(KvLost):
                    await prefill(one, "lost")
                assert decoder.waiting == 1
            run = await waiting
            assert (run.was_received, run.digest) == (False, text.digest_of(TOKENS))
            assert_idle(one, decoder)

    asyncio.run(check())


def test_prompt_logprobs_compute_here_and_leave_the_transfer_alone() -> None:
    async def check() -> None:
        async with pair() as (prefiller, decoder, port):
            kv = PUSH | {"transfer_id": "logprobs", "do_remote_prefill": True}
            kv |= {"remote_host": "127.0.0.1", "remote_port": port}
            run = await once(decoder, prompt(kv=kv, reads_cache=False))
            assert (run.was_received, run.cached_tokens) == (False, 0)
            assert prefiller.ledger.unknown == 0

    asyncio.run(check())


@pytest.mark.parametrize("nonsense", [b"", b"\n", b'{"op": "push"}\n', b'{"op": "push", "transfer_id": 7}\n'])
def test_a_peer_that_talks_nonsense_disturbs_nobody(nonsense: bytes) -> None:
    async def check() -> None:
        async with pair() as (prefiller, decoder, port):
            sending = asyncio.ensure_future(prefill(prefiller, "sane"))
            await until(lambda: prefiller.sending)
            for opening in (b"", b'{"op": "push", "transfer_id": "sane"}\n'):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(opening + nonsense)
                writer.write_eof()
                await reader.read()
                writer.close()
            assert (await decode(decoder, "sane", port)).was_received
            await sending
            assert_idle(prefiller, decoder)

    asyncio.run(check())


def test_ids_that_were_used_are_forgotten_some_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.sim.handoffs.transfers._REMEMBERED", 2)
    transfers = Transfers()
    for name in "abc":
        transfers.end(transfers.begin(name, name))
    for name in "bc":
        with pytest.raises(KvLost):
            transfers.begin(name, name)
    assert transfers.begin("a", "a").id == "a"
