"""The latency model says how long an engine takes: the simulated worker, and those of `baton simulate`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """This is the stated model. Prompts are computed one after the other; a decode step serves all that are
    running.

    prefill: `prefill_ms`, `prefill_us_per_token` for each prompt token that no cache holds, and
    `prefill_ns_per_token_squared` times (the square of all tokens less that of those that a cache holds)
    transfer: `transfer_ms`, and `transfer_us_per_token` for each prompt token of a hand-off
    decode: a step takes `decode_ms_per_token`, `decode_ms_per_running` more per further running request, and
    `decode_ns_per_kv_token` more per token of KV cache that it reads
    """

    prefill_ms: float = 0.0
    prefill_us_per_token: float = 0.0
    prefill_ns_per_token_squared: float = 0.0
    transfer_ms: float = 0.0
    transfer_us_per_token: float = 0.0
    decode_ms_per_token: float = 0.0
    decode_ms_per_running: float = 0.0
    decode_ns_per_kv_token: float = 0.0

    def prefill_s(self, tokens: int, cached: int = 0) -> float:
        """Return the seconds of a prompt of `tokens`, of which a cache holds the first `cached`."""
        new = tokens - cached
        square = new * (tokens + cached)
        return (
            self.prefill_ms / 1e3
            + new * self.prefill_us_per_token / 1e6
            + square * self.prefill_ns_per_token_squared / 1e9
        )

    def transfer_s(self, tokens: int) -> float:
        return self.transfer_ms / 1e3 + tokens * self.transfer_us_per_token / 1e6

    def step_s(self, running: int, kv_tokens: float = 0.0) -> float:
        """Return the seconds of a step of so many sequences, which have `kv_tokens` together."""
        milliseconds = self.decode_ms_per_token + self.decode_ms_per_running * max(0, running - 1)
        return milliseconds / 1e3 + kv_tokens * self.decode_ns_per_kv_token / 1e9
