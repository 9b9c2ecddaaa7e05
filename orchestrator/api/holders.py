"""The id of a response says which worker has made it: only that one may know what was said.

What a worker stores of Responses is in its memory. All orchestrators of a config read an id alike, so none
has to remember whose it is. An id names the worker by a digest, as clients have no business with names.
"""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
from typing import Final

_SECRET_BYTES: Final = 16  # whoever knows an id may read the response: nobody must guess one
_MARK_CHARS: Final = 12  # of a digest; two of a thousand workers have the same one with a chance of 1 in 10^8

_id: Final = re.compile(rf"resp_[0-9a-f]{{{2 * _SECRET_BYTES}}}([0-9a-f]{{{_MARK_CHARS}}})").fullmatch


def response_id(worker: str) -> str:
    """Return a fresh id for a response that the worker of this name will make."""
    return f"resp_{secrets.token_hex(_SECRET_BYTES)}{mark_of(worker)}"


def mark_in(response_id: str) -> str | None:
    """Return the mark of the worker that has made this response; None if the id is none of ours."""
    found = _id(response_id)
    return None if found is None else found[1]


@functools.lru_cache(maxsize=4096)
def mark_of(worker: str) -> str:
    """Return the mark of the worker of this name."""
    return hashlib.sha256(worker.encode()).hexdigest()[:_MARK_CHARS]
