"""The roster holds the workers that are there, their names and their slots in shared memory."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from itertools import count

from orchestrator.config.addresses import WorkerAddress
from orchestrator.errors import Conflict
from orchestrator.wire.info import Role
from orchestrator.workers.worker import OwnWorker, SharedLoad, SharedWorker, Worker


class Roster:
    """A roster holds the workers of all models. Only the registry changes it."""

    def __init__(
        self, addresses: Sequence[WorkerAddress], transport: str, loads: Sequence[SharedLoad] | None
    ) -> None:
        """`transport` is what workers may be sent: json, orjson or msgpack.

        `loads` is given where other processes send to the same workers: one load for each slot.
        """
        self._transport = transport
        self._loads = loads
        self._tls: ssl.SSLContext | None = None
        self.workers: tuple[Worker, ...] = ()  # replaced, never changed
        for slot, address in enumerate(addresses):
            self.enter(address, slot)

    # --- who is there ---------------------------------------------------------------------------

    def find(self, name: str) -> Worker | None:
        return next((worker for worker in self.workers if worker.name == name), None)

    def at(self, model: str, role: Role, url: str) -> Worker | None:
        """Return the worker that serves `model` in this role at `url`, also one that is being removed."""
        return next(iter(self.all_at(model, role, url)), None)

    def all_at(self, model: str, role: Role, url: str) -> list[Worker]:
        """Return the same, all data-parallel engines of it."""
        there = (model, role, url)
        return [worker for worker in self.workers if _served_at(worker.address)[:3] == there]

    def of_model(self, model: str) -> Iterator[Worker]:
        return (worker for worker in self.workers if worker.address.model == model)

    def of_pool(self, model: str, role: Role) -> list[Worker]:
        """Return all workers of a model and role."""
        return [w for w in self.workers if (w.address.model, w.address.role) == (model, role)]

    def pool_of(self, worker: Worker) -> list[Worker]:
        """Return all workers of the same model and role, `worker` among them."""
        return self.of_pool(worker.address.model, worker.address.role)

    def next_index(self, model: str, role: Role) -> int:
        """Return the index that goes into the name of the next worker to be added."""
        prefix = f"{model}/{role}/"
        names = (worker.name for worker in self.workers if worker.name.startswith(prefix))
        firsts = (name.removeprefix(prefix).partition(".")[0] for name in names)
        # Those that are discovered have names of their own.
        return max((int(first) for first in firsts if first.isascii() and first.isdigit()), default=-1) + 1

    def has_room(self, wanted: int) -> bool:
        """Return whether so many workers can be added; only shared memory has bounds."""
        return self._loads is None or sum(1 for _ in self._free_slots(self._loads)) >= wanted

    # --- who comes and goes ---------------------------------------------------------------------

    def add(self, address: WorkerAddress) -> Worker:
        """Add a worker.

        Raises `Conflict` if it is there already, or if shared memory has no room for it.
        """
        for worker in self.workers:
            if worker.name == address.name or _served_at(worker.address) == _served_at(address):
                raise Conflict(f"there is {worker.name} at {worker.address.url} already")
        return self.enter(address, self._free_slot())

    def enter(self, address: WorkerAddress, slot: int) -> Worker:
        """Add a worker whose slot is known."""
        worker = self._made(address, slot)
        self.workers = (*self.workers, worker)
        return worker

    def drop(self, worker: Worker) -> None:
        self.workers = tuple(other for other in self.workers if other is not worker)

    def _made(self, address: WorkerAddress, slot: int) -> Worker:
        tls = self._tls_context() if address.url.startswith("https:") else None
        if self._loads is None:
            return OwnWorker(address, self._transport, tls, slot)
        return SharedWorker(address, self._transport, tls, slot, self._loads[slot])

    def _tls_context(self) -> ssl.SSLContext:
        """Return one context for all workers: making it reads all trusted certificates."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _free_slot(self) -> int:
        """Return a slot that nobody counts in, not even a process that has not heard of a removal yet."""
        if self._loads is None:  # the lowest: workers that come and go must not use slots up
            taken = {worker.slot for worker in self.workers}
            return next(slot for slot in count() if slot not in taken)
        slot = next(self._free_slots(self._loads), None)
        if slot is None:
            there = len(self.workers)
            raise Conflict(f"there are {there} workers, and no more can be added: restart with a new config")
        return slot

    def _free_slots(self, loads: Sequence[SharedLoad]) -> Iterator[int]:
        taken = {worker.slot for worker in self.workers}
        return (slot for slot, load in enumerate(loads) if slot not in taken and not any(load.legs))


def _served_at(address: WorkerAddress) -> tuple[str, str, str, int | None]:
    return address.model, address.role, address.url, address.rank
