"""A worker says who it is when it comes into service."""

from __future__ import annotations

import msgspec

from orchestrator.wire.info import WorkerInfo


class Introduction(msgspec.Struct, frozen=True):
    """A worker that comes into service, or back into it, says this of itself."""

    info: WorkerInfo | None  # None without our plugin
    max_model_len: int | None
    adapters: tuple[str, ...] = ()  # that it lists beside its model
