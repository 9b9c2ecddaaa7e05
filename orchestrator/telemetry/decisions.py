"""The log of decisions has a line per request: when it came, how long it was, what else begins like it, where
it was sent, and how that went. There is no text in it.

`baton simulate` reads it as a trace.
"""

from __future__ import annotations

from array import array
from typing import Annotated, Final

import msgspec
from xxhash import xxh3_64_intdigest

BLOCK_BYTES: Final = 1024  # of a prompt: so long a beginning can be known again, and each multiple of it
MOST_BYTES: Final = 1 << 20  # of a prompt are looked at

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class Decision(msgspec.Struct, kw_only=True, omit_defaults=True):
    """This is a line. `blocks` are the names of the prompt's beginnings, each of `BLOCK_BYTES` more: equal
    names are equal beginnings, and nobody who does not know the salt can tell of which text.
    """

    received: float  # seconds since 1970
    model: str
    status: int = 200
    prompt_tokens: _Tokens
    output_tokens: _Tokens | None = None
    cached_tokens: int | None = None  # of the prompt, as the prefill worker said
    ttft_s: float | None = None
    prefill_worker: str | None = None
    decode_worker: str | None = None
    blocks: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{16})*$")] = ""

    def names(self) -> list[int]:
        """Return the blocks' names as numbers."""
        return array("Q", bytes.fromhex(self.blocks)).tolist()


def names_of(prompt: bytes, salt: int) -> str:
    """Return the names of a prompt's whole blocks, as `Decision.blocks` has them."""
    view = memoryview(prompt)[:MOST_BYTES]
    name, found = salt, array("Q")
    for end in range(BLOCK_BYTES, len(view) + 1, BLOCK_BYTES):
        name = xxh3_64_intdigest(view[end - BLOCK_BYTES : end], name)
        found.append(name)
    return found.tobytes().hex()
