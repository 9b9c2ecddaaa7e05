"""Worker handles: who they are, what state they are in, how busy they are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.topology import WorkerAddress
from orchestrator.wire.info import WorkerInfo


class WorkerState(StrEnum):
    """A worker takes requests only in READY."""

    STARTING = "starting"  # never answered a probe yet
    READY = "ready"
    GONE = "gone"  # answered before, refuses or fails now; probes bring it back


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker at one moment, for policies, the admin API and the metrics."""

    address: WorkerAddress
    state: WorkerState
    in_flight: int  # legs that hold a lease on this worker now
    info: WorkerInfo | None  # None until announced, and for workers without our plugin
    max_model_len: int | None
    last_error: str | None
