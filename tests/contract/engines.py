"""What the contract is about: a prefill and a decode worker, and how they are asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from tests.metrics import sum_of

LIMIT_S = 300.0
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
ASK_PINNED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass(frozen=True)
class Engine:
    """Two workers of one model. They must have `--enable-prompt-tokens-details`."""

    prefill_url: str
    decode_url: str
    model: str

    def chat(self, said: str = "What is prefill?", **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": said}]
        return {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 4} | fields

    def completion(
        self, prompt: Any = "Question: What is prefill?\nAnswer:", **fields: Any
    ) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 4} | fields

    def ask(self, document: dict[str, Any], **headers: str) -> httpx.Response:
        """The decode worker, which can do everything."""
        return post(self.decode_url, document, **headers)

    def prefill(self, document: dict[str, Any]) -> dict[str, Any]:
        """The whole answer of a prefill leg. Its hand-off must be pulled, or blocks stay pinned."""
        leg = document | {"max_tokens": 1, "ignore_eos": True, "kv_transfer_params": ASK_PINNED}
        answer = post(self.prefill_url, leg)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def handoff(self, document: dict[str, Any]) -> dict[str, Any]:
        """As the orchestrator passes it on."""
        params = dict(self.prefill(document)["kv_transfer_params"])
        del params["remote_prefill_cached_tokens"]
        return params

    def decode(self, document: dict[str, Any], handoff: dict[str, Any], **fields: Any) -> httpx.Response:
        return self.ask(document | {"kv_transfer_params": handoff} | fields)

    def kv_usage(self) -> float:
        """Of the prefill worker, 0 to 1."""
        return metric(self.prefill_url, "vllm:kv_cache_usage_perc")


def post(url: str, document: dict[str, Any], **headers: str) -> httpx.Response:
    path = CHAT if "messages" in document else COMPLETION
    return httpx.post(url + path, json=document, headers=headers, timeout=LIMIT_S)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The documents of a stream, which must end as a complete one does."""
    assert answer.status_code == 200, answer.text
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""], answer.text
    assert all(frame.startswith("data: ") for frame in frames[:-1])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def metric(url: str, name: str) -> float:
    return sum_of(httpx.get(f"{url}/metrics", timeout=LIMIT_S).text, name)
