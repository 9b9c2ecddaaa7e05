"""Any mix of transports works, and so does a worker that is plain vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.engines import Engine
from tests.contract.token_id_cases import Legs, cut, listed, read
from tests.real.ask import ANSWERS, PREFILL, chat, completion, post, text_of
from tests.real.conftest import Cluster, orchestrator


@pytest.fixture(scope="module", params=["json", "orjson", "msgpack"])
def front(request: pytest.FixtureRequest, mixed: Cluster, tmp_path_factory: Any) -> Iterator[str]:
    if request.param == "msgpack":
        yield mixed.front
        return
    with orchestrator(mixed, request.param, tmp_path_factory.mktemp("orchestrator")) as url:
        yield url


def test_the_workers_are_of_two_kinds(mixed: Cluster) -> None:
    assert httpx.get(f"{mixed.prefill}/baton/info").json()["decodes"] == ["json", "orjson"]
    assert httpx.get(f"{mixed.decode}/baton/info").status_code == 404


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize("stream", [False, True])
def test_every_transport_reaches_them(front: str, mixed: Cluster, make: Any, stream: bool) -> None:
    answer = post(front, make(PREFILL, stream=stream))
    assert text_of(answer).strip() == ANSWERS[PREFILL]
    assert answer.headers["x-baton-path"] == "disaggregated"
    if not stream:
        assert answer.headers["x-baton-kv"] == "transferred"


@pytest.mark.parametrize("make", [chat, completion])
def test_ids_of_one_kind_are_a_prompt_to_the_other(mixed: Cluster, make: Any) -> None:
    """With orjson they come as base64; plain vLLM takes a list."""
    legs = Legs(Engine(mixed.prefill, mixed.decode, "tiny-chat"), "base64", passed=listed)
    prefilled = read(legs.prefill(make(PREFILL)))
    assert isinstance(prefilled["prompt_token_ids"], str)
    assert text_of(legs.decode(cut(make(PREFILL)), prefilled)).strip() == ANSWERS[PREFILL]
