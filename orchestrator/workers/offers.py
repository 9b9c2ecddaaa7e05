"""The upstream is told which workers take many requests on one connection, as soon as they announce it."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.transport.base import Upstream
from orchestrator.workers.registry import Registry
from orchestrator.workers.worker import Worker


class Offers:
    """These follow the workers of a registry: each is offered once for each time that it came into service,
    as a worker that has refused is asked again with every offer.
    """

    def __init__(self, registry: Registry, upstream: Upstream, head: Callable[[Worker], bytes]) -> None:
        """`head` returns what the head of all legs to a worker has, as a header block."""
        self._registry = registry
        self._upstream = upstream
        self._head = head
        self._offered: dict[str, tuple[bool, int]] = {}  # by name: whether it takes them, in which epoch
        registry.news.announced.add(self._offer)
        registry.news.removed.add(self._withdraw)

    def _offer(self, worker: Worker) -> None:
        offer = (worker.takes_streams, worker.epoch)
        if self._offered.get(worker.name) != offer:
            self._offered[worker.name] = offer
            self._upstream.offer(worker.origin, worker.takes_streams, self._head(worker))

    def _withdraw(self, worker: Worker) -> None:
        self._offered.pop(worker.name, None)
        if all(other.origin != worker.origin for other in self._registry.workers):
            self._upstream.offer(worker.origin, False)
