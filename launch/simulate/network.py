"""A network has zones: hand-offs between two of them take longer than within one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class Network:
    """This says which workers are in which zone, and what a hand-off between two zones takes."""

    __slots__ = ("_between", "_links", "_zones")

    def __init__(
        self,
        zones: Sequence[str] = (),
        between: float = 1.0,
        links: Mapping[frozenset[str], float] | None = None,
    ) -> None:
        """The workers of each pool are in these `zones` in turn; without any they are where the config has
        them. A hand-off between two different zones takes `between` times as long, or what `links` says of
        the two.
        """
        self._zones = zones
        self._between = between
        self._links = links or {}

    def zone(self, index: int, configured: str | None) -> str | None:
        """Return the zone of the worker with this index in its pool."""
        return self._zones[index % len(self._zones)] if self._zones else configured

    def factor(self, one: str | None, other: str | None) -> float:
        """Return how many times as long a hand-off takes. What is in no zone is as near as can be."""
        if one is None or other is None or one == other:
            return 1.0
        return self._links.get(frozenset((one, other)), self._between)
