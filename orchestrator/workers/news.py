"""A registry and its judge tell listeners what happens to workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec

from orchestrator.workers.lifecycle import Move
from orchestrator.workers.states import Event
from orchestrator.workers.worker import Worker

_Told = ParamSpec("_Told")


class Listeners(Generic[_Told]):
    """These callbacks wait for one kind of news; they are called in the order in which they were added."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[_Told, None]] = []

    def add(self, callback: Callable[_Told, None]) -> None:
        self._callbacks.append(callback)

    def tell(self, *args: _Told.args, **kwargs: _Told.kwargs) -> None:
        for callback in self._callbacks:
            callback(*args, **kwargs)


class News:
    """This is told of the workers of a registry, as soon as it has happened."""

    def __init__(self) -> None:
        self.announced: Listeners[[Worker]] = Listeners()  # it has said what it is, anew or as before
        self.added: Listeners[[Worker]] = Listeners()  # it came in after the start
        self.removed: Listeners[[Worker]] = Listeners()  # it is not known any more
        self.gone: Listeners[[Worker]] = Listeners()  # it fell out of service: gone or ejected
        self.doubted: Listeners[[Worker]] = Listeners()  # it is suspect, by no probe: one is due now
        # What has changed its state here; not told of what was adopted from another process.
        self.moved: Listeners[[Worker, Event]] = Listeners()
        self.changed: Listeners[[]] = Listeners()  # what other processes are told of workers may have

    def tell_move(self, worker: Worker, move: Move) -> None:
        """Tell of a worker that has come to another state."""
        self.moved.tell(worker, move.event)
        if move.ends_service:
            self.gone.tell(worker)
        if move.wants_probe:
            self.doubted.tell(worker)
