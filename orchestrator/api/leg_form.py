"""A leg form says how the requests of an API become legs: which fields hold what a leg changes.

`legs/bodies.py` makes the bodies by it. One object serves all requests of an endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Raw

from orchestrator.api.view import RequestView
from orchestrator.compiled import mypyc_attr
from orchestrator.wire.codec import Codec

SALT: Final = "cache_salt"  # two requests share cached prefixes only if it is the same for both


@mypyc_attr(allow_interpreted_subclasses=True)
class LegForm:
    """This is the form of OpenAI's chats and completions; a subclass changes what differs."""

    def __init__(
        self, *, gives_ids: bool = True, names_legs: bool = False, codec: Codec | None = None
    ) -> None:
        """With `gives_ids` a prefill worker tells the prompt's token ids, and a decode worker takes them.
        With `names_legs` the engine goes by the `request_id` in the body, and not by the `x-request-id`.
        `codec` writes all legs; None if that depends on the worker.
        """
        self.gives_ids = gives_ids
        self.names_legs = names_legs
        self.codec = codec

    def kind(self, view: RequestView) -> str:
        """Return what about the request makes its `one_token` differ from that of others."""
        return "max_completion_tokens" if "max_completion_tokens" in view.own else ""

    def one_token(self, kind: str) -> dict[str, Any]:
        """Return the fields of a leg of which nothing but the prompt's KV cache is wanted: one token, not
        streamed. None of a request's own fields (`view.OWN`) are in such a leg but for these.
        """
        fields = {"stream": False, "max_tokens": 1, "ignore_eos": True}
        return fields | {kind: 1} if kind else fields

    def released(self, shared: Mapping[str, Raw]) -> Mapping[str, Raw]:
        """Return what a release leg keeps of the fields that all legs share: it has a salt of its own, and
        none that a decode worker would refuse next to a single token. The same object if that is all.
        """
        if SALT not in shared:
            return shared
        return {name: value for name, value in shared.items() if name != SALT}


OPENAI: Final = LegForm()
