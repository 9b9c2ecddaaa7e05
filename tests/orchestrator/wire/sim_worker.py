"""The simulated engine as pure functions: a request's stream in one go, and `/tokenize`."""

from __future__ import annotations

import json
from typing import Any

from worker.sim import frames, protocol, text
from worker.sim.generate import Choice, Opened
from worker.sim.runs import Run
from worker.sim.settings import Settings

Json = dict[str, Any]

SETTINGS = Settings(model_name="tiny", max_model_len=4096)


def stream(document: Json, request_id: str = "first") -> list[bytes]:
    """The events of a streamed answer."""
    job = _job(document, request_id)
    (prompt,) = job.prompts
    tokens = len(prompt.tokens)
    run = Run(prompt, text.digest_of(prompt.tokens), tokens, 0, was_received=True)
    answer = frames.answer_for(job)
    events = answer.opened(Opened(0, run))
    choice = Choice(0, run.digest, job.sampling, 0)
    while not choice.is_done:
        events.append(answer.piece(choice.next_piece()))
    if job.include_usage:
        events.append(answer.usage_event())
    return [*map(frames.event, events), frames.DONE]


def tokenize(body: bytes) -> bytes:
    asked = protocol.parse(json.loads(body), protocol.TokenizeRequest)
    tokens = protocol.tokens_to_count(asked, SETTINGS)
    answer = {"count": len(tokens), "max_model_len": SETTINGS.context_tokens, "tokens": tokens}
    return json.dumps(answer | {"token_strs": None}).encode()


def _job(document: Json, request_id: str) -> protocol.Job:
    if "messages" in document:
        return protocol.chat_job(protocol.parse(document, protocol.ChatRequest), SETTINGS, request_id)
    return protocol.completion_job(protocol.parse(document, protocol.CompletionRequest), SETTINGS, request_id)
