"""The data plane has these paths. What is not in this table is the control plane's, or 404."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from orchestrator.api.audio import PATHS as AUDIO
from orchestrator.api.audio import AudioEndpoint
from orchestrator.api.base import Endpoint
from orchestrator.api.embeddings import PATH as EMBEDDINGS
from orchestrator.api.embeddings import EmbeddingsEndpoint
from orchestrator.api.messages import COUNT_PATH, MessagesEndpoint
from orchestrator.api.messages import PATH as MESSAGES
from orchestrator.api.one_leg import STREAMED, WHOLE, OneLegEndpoint
from orchestrator.api.responses import CANCEL, RETRIEVE, ResponsesEndpoint, StoredResponses
from orchestrator.api.responses import PATH as RESPONSES
from orchestrator.api.responses import entry_of as stored_entry_of
from orchestrator.loop.offload import Offload


def _two_legs(offload: Offload) -> Endpoint:
    return Endpoint()


def _one_leg(offload: Offload) -> Endpoint:
    return OneLegEndpoint()


def _streamed_leg(offload: Offload) -> Endpoint:
    return OneLegEndpoint(streams=True)


def _audio(offload: Offload) -> Endpoint:
    return AudioEndpoint()


def _messages(offload: Offload) -> Endpoint:
    return MessagesEndpoint()


def _count_tokens(offload: Offload) -> Endpoint:
    return MessagesEndpoint(counts=True)


def _responses(offload: Offload) -> Endpoint:
    return ResponsesEndpoint()


def _retrieve(offload: Offload) -> Endpoint:
    return StoredResponses("GET")


def _cancel(offload: Offload) -> Endpoint:
    return StoredResponses("POST")


def spellings(paths: Iterable[str]) -> list[str]:
    """Return the paths as they are served: also with a slash behind them, where vLLM redirects, after which
    not every client sends its body again.
    """
    return [spelt for path in paths for spelt in (path, f"{path}/")]


# How each endpoint is made; `offload` does work that would hold the event loop up, and stays the caller's.
ENDPOINTS: dict[str, Callable[[Offload], Endpoint]] = {
    "/v1/chat/completions": _two_legs,
    "/v1/completions": _two_legs,
    EMBEDDINGS: EmbeddingsEndpoint,
    MESSAGES: _messages,
    COUNT_PATH: _count_tokens,
    RESPONSES: _responses,
    RETRIEVE: _retrieve,
    CANCEL: _cancel,
    **dict.fromkeys(WHOLE, _one_leg),
    **dict.fromkeys(STREAMED, _streamed_leg),
    **dict.fromkeys(AUDIO, _audio),
}


UPLOADS = AUDIO
"""Of these the bodies may be large, and are sent on as they come."""


def entry_of(path: str) -> str | None:
    """Return the entry of `ENDPOINTS` that a path belongs to; None if the data plane does not have it."""
    if path in ENDPOINTS:
        return path
    path = path.removesuffix("/")
    return path if path in ENDPOINTS else stored_entry_of(path)
