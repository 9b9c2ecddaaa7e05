"""The data plane has these paths. What is not in this table is the control plane's, or 404."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from orchestrator.api.base import Endpoint
from orchestrator.api.embeddings import PATH as EMBEDDINGS
from orchestrator.api.embeddings import EmbeddingsEndpoint
from orchestrator.loop.offload import Offload


def _two_legs(offload: Offload) -> Endpoint:
    return Endpoint()


def _one_leg(offload: Offload) -> Endpoint:
    return Endpoint(needs_one_worker=True, streams=False, can_continue=False)


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
    "/tokenize": _one_leg,
    "/detokenize": _one_leg,
}
