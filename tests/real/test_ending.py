"""Requests that are ended by their name, on real vLLM: each is answered, and no blocks are pinned unheard."""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Any

import httpx
import pytest

from orchestrator.wire.info import BEGUN_PATH, END_PATH
from tests.contract.engines import ASK_PINNED
from tests.real.ask import LIMIT, chat
from tests.real.conftest import Cluster, metric
from tests.waiting import LIMIT_S, wait_for

PREFILLS = 96
AT_ONCE = 8
WORDS = 1000
SEED = 7
EXPIRED = "vllm:nixl_num_kv_expired_reqs_total"


def document(number: int, **fields: Any) -> dict[str, Any]:
    """A long prompt of its own: no other's blocks serve it."""
    return chat(" ".join([str(number)] * WORDS), **fields)


async def prefill(client: httpx.AsyncClient, number: int, ends_after_s: float | None) -> dict[str, Any]:
    """The answer to a prefill that is told to end after some time, be it there by then or not."""
    name = f"end-{number}"

    async def end() -> None:
        if ends_after_s is not None:
            await asyncio.sleep(ends_after_s)
            assert (await client.post(END_PATH, json={"request_id": name})).status_code == 202

    leg = document(number, max_tokens=1, kv_transfer_params=ASK_PINNED)
    asked = client.post("/v1/chat/completions", json=leg, headers={"x-request-id": name})
    answer, _ = await asyncio.gather(asked, end())
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def hammer(url: str) -> list[dict[str, Any]]:
    """Prefills of which every one is told to end about when it does."""
    random, seats = Random(SEED), asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT) as client:

        async def one(number: int, longest_s: float) -> dict[str, Any]:
            async with seats:
                return await prefill(client, number, random.uniform(0, longest_s))

        first = [await prefill(client, -1, None)]  # what is slow the first time
        start = time.monotonic()
        first += await asyncio.gather(*(prefill(client, number, None) for number in range(AT_ONCE)))
        longest_s = time.monotonic() - start
        others = (one(number, longest_s) for number in range(AT_ONCE, PREFILLS))
        return first + list(await asyncio.gather(*others))


def wait_until_free(url: str) -> None:
    wait_for(lambda: metric(url, "vllm:kv_cache_usage_perc") == 0, "the end of all blocks' use")


def test_whoever_ends_a_prefill_hears_of_all_that_it_pins(trio: Cluster) -> None:
    """Nobody pulls them here, so that they run out, and vLLM counts them."""
    before = metric(trio.prefill, EXPIRED)
    told = asyncio.run(hammer(trio.prefill))
    pinned = [answer for answer in told if answer["kv_transfer_params"] is not None]
    reasons = {answer["choices"][0]["finish_reason"] for answer in told if answer not in pinned}
    print(f"{len(pinned)} of {len(told)} had ended before")
    assert AT_ONCE + 1 < len(pinned) < len(told)
    assert reasons == {"abort"}
    wait_until_free(trio.prefill)
    assert metric(trio.prefill, EXPIRED) - before == len(pinned)


def ended_leg(cluster: Cluster, stream: bool) -> str:
    """The answer to a long decode leg that is told to end all the while."""

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(timeout=LIMIT) as client:
            leg = document(-2, max_tokens=1, kv_transfer_params=ASK_PINNED)
            handoff = (await client.post(f"{cluster.prefill}/v1/chat/completions", json=leg)).json()
            params = handoff["kv_transfer_params"]
            params.pop("remote_prefill_cached_tokens", None)
            long = document(-2, max_tokens=3000, ignore_eos=True, stream=stream, kv_transfer_params=params)
            ask = client.post(
                f"{cluster.decode}/v1/chat/completions", json=long, headers={"x-request-id": "long"}
            )
            asked = asyncio.ensure_future(ask)
            while not asked.done():
                assert (await client.post(cluster.decode + END_PATH, json={"request_id": "long"})).is_success
                await asyncio.wait([asked], timeout=0.1)
            return asked.result()

    answer = asyncio.run(main())
    assert answer.status_code == 200
    return answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_decode_leg_that_is_ended_gives_the_blocks_back(trio: Cluster, stream: bool) -> None:
    before = metric(trio.prefill, EXPIRED)
    # Where servers get no time at all, an engine may have come to its end before anyone asks for it.
    while '"finish_reason":"length"' in (text := ended_leg(trio, stream)):
        print("it was whole before")
    # A stream that is ended before its first token has an end, and no reason for it.
    assert '"finish_reason":"abort"' in text or (stream and text.endswith("data: [DONE]\n\n"))
    wait_until_free(trio.decode)
    wait_until_free(trio.prefill)
    assert metric(trio.prefill, EXPIRED) == before


def test_of_two_requests_of_one_id_the_leg_that_is_meant_is_ended(trio: Cluster) -> None:
    long = chat("Go on", max_tokens=400, ignore_eos=True, temperature=0.5)

    async def main() -> None:
        async with httpx.AsyncClient(base_url=trio.decode, timeout=LIMIT) as client:

            async def ask(leg: str, **fields: Any) -> dict[str, Any]:
                headers = {"x-request-id": "same", "x-baton-leg": leg}
                answer = await client.post("/v1/chat/completions", json=long | fields, headers=headers)
                told: dict[str, Any] = answer.json()
                return told

            asked = [asyncio.ensure_future(ask(f"leg-{number}", n=number)) for number in (1, 2)]
            while not asked[1].done():
                assert (await client.post(END_PATH, json={"request_id": "leg-2"})).status_code == 202
                await asyncio.wait([asked[1]], timeout=0.1)
            stays, ended = await asyncio.gather(*asked)
            assert {choice["finish_reason"] for choice in ended["choices"]} == {"abort"}
            assert [choice["finish_reason"] for choice in stays["choices"]] == ["length"]
            assert stays["id"] == ended["id"] == "chatcmpl-same"

    asyncio.run(main())


def test_a_worker_says_how_long_its_leases_are_and_whether_an_answer_has_begun(trio: Cluster) -> None:
    url = trio.decode
    assert httpx.get(f"{trio.prefill}/baton/info", timeout=LIMIT).json()["kv_lease_s"] == 30.0

    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT) as client:

            async def has_begun() -> bool:
                answer = await client.post(BEGUN_PATH, json={"request_id": "begun-1"})
                assert answer.status_code == 200, answer.text
                return bool(answer.json()["begun"])

            assert not await has_begun()
            long = chat("Go on", max_tokens=300, ignore_eos=True)
            asked = asyncio.create_task(
                client.post("/v1/chat/completions", json=long, headers={"x-request-id": "begun-1"})
            )
            async with asyncio.timeout(LIMIT_S):
                while not await has_begun():
                    assert not asked.done()
            assert (await asked).status_code == 200
            assert not await has_begun()

    asyncio.run(main())
