"""Workers hand KV caches over to each other only if they agree on what a KV cache is made of.

These are the fields of their announcements (`wire/info.py`) that must be equal. They are what vLLM's NIXL
connector (0.32) puts into its compatibility hash, or checks when two engines meet, as far as a server knows
them; what it finds there fails each hand-off of the pair. A field that a worker leaves out fits anything.

| field | of prefill and decode |
|---|---|
| path, engine, dtype, kv_dtype, block_size, connector | equal |
| tp | one divides the other: vLLM splits or joins the heads |
| engine_version | equal: engines of two refuse each other |
| revision | may differ, as in a rolling update: KV caches of two models are not told apart |

Where pairs are kept within one revision (`revision_of`), workers of two need not fit each other in anything:
they are never a pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from orchestrator.wire.info import Role, WorkerInfo

NO_CONNECTOR: Final = "none"

# What to do about a field that differs.
ADVICE: Final[Mapping[str, str]] = {
    "path": "start both with the same model (models.*.path, or --model)",
    "engine": "give both pools the same engine",
    "dtype": "give both the same --dtype",
    "kv_dtype": "give both the same --kv-cache-dtype",
    "block_size": "give both the same --block-size",
    "connector": "give both the same --kv-transfer-config",
    "engine_version": "install one version, or let pairs be kept within one (routing.pair: same_revision)",
    "tp": "choose values of --tensor-parallel-size of which one divides the other",
}
NO_CONNECTOR_ADVICE: Final = "start it with --kv-transfer-config, or put it into the pool `both`"
OTHER_ROLE_ADVICE: Final = "are the URLs of the two pools exchanged? else start it with BATON_ROLE={role}"


@dataclass(frozen=True, slots=True)
class Difference:
    """Two workers announce different values in a field in which they must agree."""

    field: str
    mine: object
    theirs: object

    @property
    def advice(self) -> str:
        return ADVICE[self.field]


def differences(
    mine: WorkerInfo, theirs: WorkerInfo, *, within_revision: bool = False
) -> tuple[Difference, ...]:
    """Return why two workers cannot hand KV caches over to each other; empty if they can.

    `within_revision`: pairs are kept within one revision, so that those of others need not fit.
    """
    if within_revision and revision_of(mine) != revision_of(theirs):
        return ()
    return tuple(_differences(mine, theirs))


def _differences(mine: WorkerInfo, theirs: WorkerInfo) -> Iterator[Difference]:
    for field in ADVICE:
        own, other = getattr(mine, field), getattr(theirs, field)
        if own is not None and other is not None and not _fits(field, own, other):
            yield Difference(field, own, other)


def _fits(field: str, own: object, other: object) -> bool:
    if field == "tp" and isinstance(own, int) and isinstance(other, int):
        least, most = sorted((own, other))
        return least > 0 and most % least == 0
    return own == other


def is_for(info: WorkerInfo, role: Role) -> bool:
    """Return whether a worker that announces this may be in the pool of `role`.

    One that announces `both`, as is the default, may be in any. In the pool `both` may be any: an engine with
    a connector, whatever its `kv_role`, answers whole requests, too.
    """
    return "both" in (info.role, role) or info.role == role


def lacks_connector(info: WorkerInfo) -> bool:
    """Return whether a worker says that it can hand no KV cache over."""
    return info.connector == NO_CONNECTOR


def revision_of(info: WorkerInfo | None) -> str | None:
    """Return what must be equal in a pair that is kept within one revision; None if the worker does not say.

    It names the model's revision and the engine's version: engines of two versions refuse each other. A
    deployment that has a name is a revision of its own, which may differ from others in all that pairs must
    agree in.
    """
    if info is None:
        return None
    name = "" if info.deployment is None else f"{info.deployment}:"
    return f"{name}{info.revision or ''}@{info.engine_version}"
