"""The data plane's paths. What is not in this list is the control plane's, or 404."""

from __future__ import annotations

from enum import Enum


class Serving(Enum):
    TWO_LEGS = "prefill on one worker, decode on another"
    ONE_LEG = "one worker does everything"


ENDPOINTS: dict[str, Serving] = {
    "/v1/chat/completions": Serving.TWO_LEGS,
    "/v1/completions": Serving.TWO_LEGS,
    "/v1/embeddings": Serving.ONE_LEG,
    "/tokenize": Serving.ONE_LEG,
    "/detokenize": Serving.ONE_LEG,
}
