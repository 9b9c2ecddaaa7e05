"""A body is served if its content type is one that vLLM's server takes, on every path of the data plane."""

from __future__ import annotations

import asyncio
import json

import pytest

from orchestrator.api.base import Endpoint
from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.config.keys import KeyRing
from orchestrator.errors import UnsupportedMediaType
from orchestrator.loop.offload import Offload
from tests.orchestrator.fakes import FakeCluster, FakeExchange

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
TAKEN = (
    b"application/json",
    b"application/json;",
    b"application/json; charset=utf-8",
    b"application/json;charset=latin1",
    b"Application/JSON; Charset=bogus",
    b"application/json ",
)
REFUSED = (
    None,
    b"",
    b"text/plain",
    b"text/plain; x=application/json",
    b"application/x-www-form-urlencoded",
    b"multipart/form-data; boundary=x",
    b"application/vnd.api+json",
    b"application/jsonp",
    b"application/json ; charset=utf-8",
    b"application/json, text/plain",
    b"application/msgpack",
    b"application/x-msgpack",
)


def ask(
    path: str, content_type: bytes | None, *, method: str = "POST", keys: KeyRing | None = None
) -> FakeExchange:
    async def main() -> FakeExchange:
        cluster = FakeCluster(keys=keys)
        answer = await cluster.serve(FakeExchange(BODY, path, method, content_type=content_type))
        await cluster.aclose()
        cluster.assert_at_rest()
        if answer.status >= 400:
            assert cluster.upstream.requests == []
        return answer

    return asyncio.run(main())


@pytest.mark.parametrize("content_type", TAKEN)
def test_json_is_served_with_any_parameter(content_type: bytes) -> None:
    assert ask("/v1/chat/completions", content_type).status == 200


@pytest.mark.parametrize("content_type", REFUSED)
@pytest.mark.parametrize("path", ENDPOINTS)
def test_nothing_else_is(path: str, content_type: bytes | None) -> None:
    endpoint = ENDPOINTS[path](Offload())
    if endpoint.media_type != b"application/json" or endpoint.asks_holder:  # that one reads no body
        return
    answer = ask(path, content_type)
    assert answer.status == 400
    assert "Unsupported Media Type: Only 'application/json' is allowed" in answer.sent.decode()


def test_key_and_method_are_looked_at_first() -> None:
    assert ask("/v1/chat/completions", b"text/plain", method="PUT").status == 405
    assert ask("/v1/chat/completions", b"text/plain", keys=KeyRing(())).status == 401


def test_an_endpoint_may_take_another_type() -> None:
    forms = Endpoint(media_type=b"multipart/form-data")
    forms.check_content_type(b"Multipart/Form-Data; boundary=x")
    with pytest.raises(UnsupportedMediaType, match="Only 'multipart/form-data' is allowed"):
        forms.check_content_type(b"application/json")
