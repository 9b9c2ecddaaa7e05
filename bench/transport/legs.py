"""The transport study sends bodies that are made by the code with which Baton makes them.

A prompt of N tokens is a text of five characters per token, or N random ids. A decode leg carries one or the
other; an arm says which, in which encoding, and what the workers and the orchestrator are started with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import msgspec

from bench.shared.bodies import SYSTEM, encoded, prose
from bench.shared.load import post
from bench.transport.model import VOCABULARY
from orchestrator.api.view import view_request
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.base import Handoff, TokenIds
from orchestrator.wire.codec import CODECS, JSON, Codec, NotEncodable, Parts, transcoded
from orchestrator.wire.info import Encoding, TokenIdsForm
from worker import token_ids

MODEL = "study"
ABSENT = "absent"  # a model that no worker has
CHARACTERS_PER_TOKEN = 5
CHARACTERS_PER_MESSAGE = 2250
AGAIN = " again"

Kind = Literal["chat", "ids"]
PATHS: dict[Kind, str] = {"chat": "/v1/chat/completions", "ids": "/v1/completions"}


@dataclass(frozen=True)
class Arm:
    """An arm is one way to a worker. `ids` is the form of the prompt's ids, if they go to decode."""

    name: str
    transport: Encoding
    ids: TokenIdsForm | None = None

    @property
    def server(self) -> str:
        """Arms with one server are measured on one process; the A/A pair has a process each."""
        return self.transport + (AGAIN if self.name.endswith(AGAIN) else "")


BASE = Arm("json", "json")
_TEXT = [BASE, Arm(BASE.name + AGAIN, "json"), Arm("orjson", "orjson"), Arm("msgpack", "msgpack")]
_LIST = Arm("json, ids as list", "json", "list")
_PACKED = [Arm("orjson, ids as base64", "orjson", "base64"), Arm("msgpack, ids as bin", "msgpack", "bin")]
ARMS: dict[Kind, list[Arm]] = {
    "chat": [*_TEXT, _LIST, *_PACKED],  # the arms with ids: tokenised once
    "ids": [*_TEXT, *_PACKED],  # of a client that sent ids, and of a text that was tokenised once
}

# What vLLM's NIXL connector says, but for `do_remote_prefill`: nothing is to be pulled here.
_PARAMS = {
    "do_remote_prefill": False,
    "do_remote_decode": False,
    "remote_engine_id": "0b3e7f3c-8d0c-4f0e-9a49-6f0d2f7e5a11",
    "remote_request_id": "chatcmpl-00000000-0000-0000-0000-000000000000-1",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
}
_TOKENS_PER_BLOCK = 16


@dataclass(frozen=True)
class Request:
    """A request goes to a worker; `headers` is a block of lines."""

    path: str
    headers: bytes
    body: bytes

    def as_http(self) -> bytes:
        return post(self.path, self.body, self.headers)


@dataclass(frozen=True)
class Prompt:
    """A client's request has both forms; it is answered with one token."""

    kind: Kind
    tokens: int
    model: str = MODEL
    ids: list[int] = field(init=False)
    text: str = field(init=False)

    def __post_init__(self) -> None:
        random = Random(self.tokens)
        ids = [random.randrange(3, VOCABULARY) for _ in range(self.tokens)]  # the first are no text
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "text", prose(random, CHARACTERS_PER_TOKEN * self.tokens))

    def from_client(self) -> bytes:
        if self.kind == "ids":
            return encoded({"model": self.model, "prompt": self.ids, "max_tokens": 1, "temperature": 0})
        return encoded({"model": self.model, "messages": self._messages, "max_tokens": 1, "temperature": 0})

    def prefill_leg(self, arm: Arm) -> Request:
        bodies = LegBodies(view_request(self.from_client()))
        return self._request(
            arm, bodies, lambda codec: bodies.prefill(codec, self.model, asks_ids=arm.ids is not None)
        )

    def decode_leg(self, arm: Arm) -> Request:
        """Make it with ids if the arm has them, else with what the client sent."""
        bodies = LegBodies(
            view_request(self._text_completion() if self._is_packed(arm) else self.from_client())
        )
        handoff = Handoff(self.params(), 0, self.given_ids(arm.ids))
        return self._request(arm, bodies, lambda codec: bodies.decode(codec, self.model, handoff))

    def params(self) -> bytes:
        blocks = list(range(1, self.tokens // _TOKENS_PER_BLOCK + 2))
        return encoded({**_PARAMS, "remote_num_tokens": self.tokens, "remote_block_ids": [blocks]})

    def given_ids(self, form: TokenIdsForm | None) -> TokenIds | None:
        """Return them as they are found in the prefill worker's answer."""
        match form:
            case "list":
                return TokenIds(json=encoded(self.ids))
            case "base64":
                return TokenIds(json=msgspec.json.encode(token_ids.pack(self.ids)))
            case "bin":
                return TokenIds(packed=token_ids.pack(self.ids))
        return None

    @property
    def _messages(self) -> list[dict[str, str]]:
        starts = range(0, len(self.text), CHARACTERS_PER_MESSAGE)
        texts = [self.text[start : start + CHARACTERS_PER_MESSAGE] for start in starts]
        roles = ["user", "assistant"]
        return [SYSTEM, *({"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts))]

    def _is_packed(self, arm: Arm) -> bool:
        return self.kind == "ids" and arm.ids is not None

    def _text_completion(self) -> bytes:
        """Make the client's request whose prompt the packed ids take the place of."""
        return encoded({"model": self.model, "prompt": "-", "max_tokens": 1, "temperature": 0})

    def _request(self, arm: Arm, bodies: LegBodies, make: Callable[[Codec], Parts]) -> Request:
        codec = CODECS[arm.transport]
        if (large := bodies.to_transcode(codec)) is not None:
            bodies.adopt(codec, transcoded(large)[1])
        try:
            parts = make(codec)
        except NotEncodable:  # the hand-off of a huge prompt: Baton sends JSON instead
            codec, parts = JSON, make(JSON)
        headers = b"".join(b"%s: %s\r\n" % header for header in codec.headers)
        return Request(PATHS[self.kind], headers, b"".join(parts))
