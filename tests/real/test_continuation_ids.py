"""A stream that is cut goes on word for word on real vLLM, as a completion of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from orchestrator.api.view import RequestView
from orchestrator.failover.continuation import CARRIED, REFUSED
from orchestrator.legs.bodies import LegBodies
from orchestrator.wire.codec import JSON
from tests.orchestrator.wire.cut_streams import Client, content_of, names_in, view_of
from tests.orchestrator.wire.documents import joined
from tests.real.ask import ANSWERS, LIMIT, PREFILL, chat, completion
from tests.real.conftest import Cluster

LONG = max(ANSWERS, key=lambda ask: len(ANSWERS[ask]))
CUTS = 8  # per stream

_KIND = {"content-type": "application/json"}


class VllmWorker:
    """One worker that does everything."""

    model = "tiny-chat"
    model_len = 4096

    def __init__(self, url: str) -> None:
        self._url = url

    def stream(self, view: RequestView, request_id: str) -> bytes:
        is_chat = "messages" in view.shared
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        return self._post(path, joined(LegBodies(view).whole(JSON, self.model)), request_id)

    def tokenize(self, body: bytes) -> bytes:
        return self._post("/tokenize", body, "tokens")

    def _post(self, path: str, body: bytes, request_id: str) -> bytes:
        headers = _KIND | {"x-request-id": request_id}
        answer = httpx.post(self._url + path, content=body, headers=headers, timeout=LIMIT)
        assert answer.status_code == 200, answer.text
        return answer.content


@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize("ask", [chat, completion])
@pytest.mark.parametrize("question", [PREFILL, LONG])
def test_a_stream_that_is_cut_goes_on_word_for_word(
    cluster: Cluster, question: str, ask: Callable[..., dict[str, Any]], has_ids: bool
) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": has_ids}
    view, worker = view_of(ask(question, **fields)), VllmWorker(cluster.decode)
    whole = Client(view, worker=worker).read()
    assert ANSWERS[question] in whole_text(whole)
    for number in range(1, CUTS):
        mended = Client(view, worker=worker).read([len(whole) * number // CUTS])
        assert content_of(mended) == content_of(whole)
        assert len(names_in(mended)) == 1


def test_a_stream_can_be_cut_twice(cluster: Cluster) -> None:
    view, worker = view_of(chat(LONG, stream=True)), VllmWorker(cluster.decode)
    whole = Client(view, worker=worker).read()
    mended = Client(view, worker=worker).read([len(whole) // 3, len(whole) // 3])
    assert content_of(mended) == content_of(whole)


def test_text_that_was_held_back_comes_after_the_cut(cluster: Cluster) -> None:
    view, worker = view_of(chat(LONG, stream=True, stop=["never said"])), VllmWorker(cluster.decode)
    whole = Client(view, worker=worker).read()
    for number in range(1, CUTS):
        mended = Client(view, worker=worker).read([len(whole) * number // CUTS])
        assert content_of(mended) == content_of(whole)


def whole_text(stream: bytes) -> str:
    content = content_of(stream)
    return str(content["text"] + content["content"])


def test_every_field_that_chats_and_completions_share_is_accounted_for(cluster: Cluster) -> None:
    schemas = httpx.get(cluster.decode + "/openapi.json").json()["components"]["schemas"]
    fields = [schemas[name]["properties"].keys() for name in ("ChatCompletionRequest", "CompletionRequest")]
    shared = fields[0] & fields[1]
    assert shared >= CARRIED
    assert shared - CARRIED - REFUSED.keys() == LEFT_OUT


# Fields that both have and that a continuation does not carry over.
LEFT_OUT = {
    "add_special_tokens",  # the ids are the prompt
    "ec_transfer_params",
    "echo",  # one worker's
    "kv_transfer_params",
    "max_tokens",  # what is left of it
    "mm_payload",
    "prompt_logprobs",  # one worker's
    "request_id",  # the header's
    "response_format",  # text, or not to be gone on with
    "return_mm_kwargs",
    "return_token_offsets",
    "return_tokens_as_token_ids",  # for logprobs
    "routed_experts_prompt_start",
    "truncation_side",
    "use_beam_search",  # one worker's
}
