"""A request that its decode worker will refuse is not prefilled first."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from orchestrator.api.view import view_request
from orchestrator.workers.introduction import Introduction
from tests.orchestrator.api.refusals import MAX_MODEL_LEN, REFUSED, TAKEN
from tests.orchestrator.fakes import FakeCluster


def path_of(document: dict[str, Any]) -> str:
    return "/v1/completions" if "prompt" in document else "/v1/chat/completions"


def prefills(document: dict[str, Any]) -> int:
    """How many prefill legs a request has."""

    async def main() -> int:
        cluster = FakeCluster()
        decode = cluster.worker("decode/0")
        decode.announce(Introduction(None, MAX_MODEL_LEN))
        cluster.registry.judge.note_failed(decode, "to be ready anew, with what it has announced")
        cluster.registry.judge.mark_ready(decode)
        await cluster.ask({"model": "m"} | document, path=path_of(document))
        await cluster.aclose()
        cluster.assert_at_rest()
        return len(cluster.legs("prefill"))

    return asyncio.run(main())


@pytest.mark.parametrize("document", REFUSED, ids=json.dumps)
def test_what_decode_will_refuse_is_not_prefilled(document: dict[str, Any]) -> None:
    assert prefills(document) == 0


@pytest.mark.parametrize("document", TAKEN, ids=json.dumps)
def test_what_it_takes_is(document: dict[str, Any]) -> None:
    assert prefills(document) == 1


@pytest.mark.parametrize("document", TAKEN, ids=json.dumps)
def test_what_is_common_to_all_legs_is_not_judged(document: dict[str, Any]) -> None:
    """The prefill worker does that, in the same words."""
    more = {"top_p": 7, "logprobs": "x", "temperature": "warm"} | document
    is_judged = document.get("n") not in (None, 1, "1")
    assert view_request(json.dumps({"model": "m"} | more).encode()).is_refusable == (
        is_judged and more["temperature"] == "warm"
    )
