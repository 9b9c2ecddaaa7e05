"""What a routing policy is. A new policy is one file beside this one and one entry in `POLICIES`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """A worker as a policy sees it. Policies read, they change nothing."""

    @property
    def name(self) -> str: ...

    @property
    def in_flight(self) -> int:
        """Legs that the worker serves now."""
        ...


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """Chooses one of the ready workers of a role. One instance per model and role."""

    reason: str  # in words, for logs and the admin API

    def choose(self, candidates: Sequence[C]) -> C:
        """`candidates` is not empty, and is in the order of the config. Synchronous; never fails."""
        ...
