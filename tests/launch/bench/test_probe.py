from __future__ import annotations

import pytest

from launch.bench.errors import BenchError, WrongUsage
from launch.bench.probe import Target, probe
from launch.bench.shapes import WORKLOADS
from orchestrator.transport.memory import MemoryReply, MemoryRequest, MemoryUpstream
from tests.launch.bench.fakes import CORPUS, FakeEndpoint, client_of, run, serving


def look_at(handler: object, model: str | None = None) -> Target:
    async def main() -> Target:
        upstream = serving(handler) if handler else MemoryUpstream()
        try:
            return await probe(client_of(upstream), model, CORPUS)
        finally:
            await upstream.aclose()

    return run(main())


def test_an_endpoint_that_can_do_everything() -> None:
    target = look_at(FakeEndpoint())
    assert target.model == "tiny"
    assert target.tokens_per_word == 2.0  # what the template adds is not counted
    assert target.has_fixed_length


def test_what_it_refuses_is_not_asked_for() -> None:
    """OpenAI's own endpoint knows no `ignore_eos`."""
    endpoint = FakeEndpoint(refused=["ignore_eos"])
    target = look_at(endpoint)
    assert not target.has_fixed_length
    assert target.options == {"stream_options": {"include_usage": True}}
    assert [("ignore_eos" in asked) for asked in endpoint.seen] == [True, False, False]
    assert look_at(FakeEndpoint(refused=["ignore_eos", "stream_options"])).options == {}


def test_an_endpoint_that_counts_nothing() -> None:
    assert look_at(FakeEndpoint(counts_tokens=False)).tokens_per_word > 1


def test_the_model_is_the_only_one_or_the_one_named() -> None:
    assert look_at(FakeEndpoint(models=["a", "b"]), "b").model == "b"
    with pytest.raises(WrongUsage, match=r"several models, choose with --model: a, b$"):
        look_at(FakeEndpoint(models=["a", "b"]))
    with pytest.raises(WrongUsage, match=r"has no model 'c'; it has: a, b$"):
        look_at(FakeEndpoint(models=["a", "b"]), "c")
    with pytest.raises(BenchError, match=r"has no model$"):
        look_at(FakeEndpoint(models=[]))


def test_a_list_of_hundreds_is_not_shown() -> None:
    with pytest.raises(WrongUsage, match=r"m18, m19, \.\.\.$"):
        look_at(FakeEndpoint(models=[f"m{number}" for number in range(300)]))


def test_a_gateway_without_a_list() -> None:
    endpoint = FakeEndpoint()

    async def gateway(request: MemoryRequest, reply: MemoryReply) -> None:
        if request.method == "GET":
            reply.answer(404, b"no")
        else:
            await endpoint(request, reply)

    assert look_at(gateway, "m").model == "m"
    with pytest.raises(BenchError, match="is no OpenAI endpoint: it answers 404"):
        look_at(gateway)


def test_what_fits() -> None:
    roomy, small = look_at(FakeEndpoint()), look_at(FakeEndpoint(max_model_len=10_000))
    assert all(map(roomy.takes, WORKLOADS.values()))
    assert [name for name, workload in WORKLOADS.items() if small.takes(workload)] == [
        "chat",
        "long-prompt",
        "multi-turn",
    ]


def answering(status: int, body: bytes) -> object:
    async def handler(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(status, body)

    return handler


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (None, "no connection"),
        (answering(401, b""), "answers 401: is the key in BATON_API_KEY or OPENAI_API_KEY right"),
        (answering(500, b"oops"), "it answers 500 to GET"),
        (answering(200, b"<html>"), "its list of models is none"),
        (answering(200, b'{"data": [{}]}'), "its list of models is none"),
        (answering(200, b"\xff"), "its list of models is none"),
    ],
)
def test_what_is_no_endpoint(handler: object, said: str) -> None:
    with pytest.raises(BenchError, match=r"^http://endpoint:1/v1") as caught:
        look_at(handler)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_without_completions() -> None:
    endpoint = FakeEndpoint()

    async def half(request: MemoryRequest, reply: MemoryReply) -> None:
        if request.method == "GET":
            await endpoint(request, reply)
        else:
            reply.answer(500, b'{"error": {"message": "no\\nworker"}}')

    with pytest.raises(BenchError, match=r"a chat completion failed: http 500: no worker$"):
        look_at(half)
