"""Whatever a model is called, its objects have names that Kubernetes takes, and that are its own."""

from __future__ import annotations

import re
from hashlib import sha256

# A pod of a LeaderWorkerSet has a label of its set's name, an index and a hash: 63 characters in all.
MAX_SLUG = 24
# The sets that a DisaggregatedSet makes have an index, a revision and the role in their names besides.
MAX_SHORT_SLUG = 16

_DIGITS = 8  # of the hash that tells models apart whose names are alike
_is_hashed = re.compile(rf".*-[0-9a-f]{{{_DIGITS}}}").fullmatch


def slug(name: str, limit: int = MAX_SLUG) -> str:
    """Return a name of lower-case letters, digits and hyphens, of at most `limit` characters.

    Of two different names no two are alike: one that had to be changed ends with its hash. It depends on this
    name alone, so that another model in the file renames nothing.
    """
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if words == name and len(words) <= limit and not _is_hashed(words):
        return words
    head = words[: limit - _DIGITS - 1].strip("-") or "model"
    return f"{head}-{digest(name, _DIGITS)}"


def digest(text: str, length: int) -> str:
    """Return the beginning of the text's SHA-256."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]
