"""A request as policies see it, without a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.routing.policies.base import Request


class FakeRequest(Request):
    """It has a prompt and headers, and no client."""

    def __init__(
        self,
        prompt: bytes = b"",
        headers: Mapping[bytes, bytes] | None = None,
        fields: Mapping[str, bytes] | None = None,
    ) -> None:
        self.model = "m"
        self.headers = headers or {}
        self.fields = {"prompt": prompt, **(fields or {})}
        self._prompt = prompt

    def body_bytes(self) -> int:
        return len(self._prompt)

    def prompt_tokens(self) -> int:
        return len(self._prompt) // 4

    def prompt(self, most: int) -> bytes:
        return self._prompt[:most]

    def prompt_ids(self) -> Sequence[int] | None:
        return None

    def field(self, name: str) -> memoryview | None:
        return memoryview(self.fields[name]) if name in self.fields else None

    def header(self, name: bytes) -> bytes | None:
        return self.headers.get(name)
