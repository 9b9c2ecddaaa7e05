"""Snapshots say what is known of a worker at one moment, for other processes and for people."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from orchestrator.config.addresses import WorkerAddress
from orchestrator.wire.info import WorkerInfo
from orchestrator.wire.load import LoadReport
from orchestrator.workers.figures import CacheStatus
from orchestrator.workers.states import WorkerState


class WorkerSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot holds what is known of a worker, apart from its load: the same in all processes."""

    address: WorkerAddress
    slot: int  # its cell in shared memory
    state: WorkerState
    epoch: int  # how often it has come into service: tells what was seen before its return
    is_drained: bool
    warm_from: float
    info: WorkerInfo | None
    max_model_len: int | None
    last_error: str | None
    reason: str | None = None
    adapters: tuple[str, ...] = ()
    drains_itself: bool = False
    senders: int = 1  # orchestrators that send to it


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A status shows one worker at one moment, in the admin API and the metrics."""

    address: WorkerAddress
    state: WorkerState
    in_flight: int  # legs that hold a seat on this worker now
    info: WorkerInfo | None  # None until announced, and for workers without our plugin
    max_model_len: int | None
    last_error: str | None
    is_drained: bool = False  # takes no new legs until the operator says so, whatever its state
    reason: str | None = None  # as `last_error`, in words that everybody may read
    cache: CacheStatus | None = None  # None if routing does not go by caches
    adapters: tuple[str, ...] = ()  # that it lists beside its model
    drains_itself: bool = False  # takes no new legs until it says so itself
    report: LoadReport | None = None  # what it last said of its load; None if it says nothing
