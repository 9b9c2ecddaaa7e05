"""Requests that no connection can be opened for: the client is told so, and no worker is blamed."""

from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

import httpx
import pytest

from orchestrator.workers.health import HttpProbe, ProbeImpossible, Prober
from orchestrator.workers.states import WorkerState
from tests.orchestrator.fakes import FakeCluster, FakeExchange

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
DOCUMENTS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": "hi", "max_tokens": 5},
    "/v1/embeddings": {"model": "m", "input": "hi"},
    "/tokenize": {"model": "m", "prompt": "hi"},
}


@pytest.mark.parametrize("path", DOCUMENTS)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_without_a_connection_is_503_and_counts_against_no_worker(
    path: str, is_stream: bool
) -> None:
    async def main() -> None:
        cluster = FakeCluster()
        cluster.upstream.is_short = True
        for _ in range(10):
            body = json.dumps(DOCUMENTS[path] | ({"stream": True} if is_stream else {})).encode()
            answer = await cluster.serve(FakeExchange(body, path=path))
            assert answer.status == 503
            assert json.loads(answer.sent)["error"]["code"] == "out_of_resources"
            assert b"retry-after" in answer.answer_headers
        assert {worker.state for worker in cluster.registry.workers} == {WorkerState.READY}
        assert [worker.failures for worker in cluster.registry.workers] == [0, 0]
        cluster.upstream.is_short = False
        assert (await cluster.ask(CHAT)).status == 200
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


def test_a_probe_that_we_cannot_send_says_nothing() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no") from OSError(errno.EMFILE, "Too many open files")

    async def main() -> None:
        cluster = FakeCluster()
        probe = HttpProbe(None, transport=httpx.MockTransport(answer))
        worker = cluster.registry.workers[0]
        with pytest.raises(ProbeImpossible):
            await probe(worker)
        prober = Prober(cluster.registry, probe, random=cluster.registry.judge._random)  # type: ignore[attr-defined]
        for _ in range(20):
            await prober._probe(worker)
        assert worker.state is WorkerState.READY
        await probe.aclose()
        await cluster.aclose()

    asyncio.run(main())
