"""A prefill leg runs beside its decode leg, for connectors that send both at once."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from orchestrator.errors import OutOfResources, WorkerAnswered, WorkerError
from orchestrator.legs.leg import MAX_PREFILL_ANSWER_BYTES, AnswerLeg, PrefillLeg
from orchestrator.legs.releases import Releases


class ParallelPrefill:
    """It reads the prefill leg in a task of its own. If that leg fails, the decode leg is given up.

        with ParallelPrefill(leg, decode, releases, on_answered):
            ...  # the decode leg

    At the end of the block a prefill that has not answered is ended, in the background: that frees its
    blocks. A decode leg that was given up because of the prefill is not blamed for it, and the block
    raises what the prefill raised.
    """

    def __init__(
        self, leg: PrefillLeg, decode: AnswerLeg, releases: Releases, on_answered: Callable[[], None]
    ) -> None:
        """`on_answered` is called when the KV cache has gone over."""
        self._leg = leg
        self._decode = decode
        self._releases = releases
        self._on_answered = on_answered
        self._error: WorkerError | WorkerAnswered | OutOfResources | None = None

    def __enter__(self) -> ParallelPrefill:
        self._task = self._releases.start(self._run())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        if not isinstance(error, WorkerError | WorkerAnswered):
            return
        if self._error is not None:
            self._leg.legs.last = self._leg.worker
            raise self._error from error
        self._leg.legs.last = self._decode.worker

    async def _run(self) -> None:
        try:
            with self._leg:
                await self._read()
        except (WorkerError, WorkerAnswered, OutOfResources) as error:
            self._error = error
            self._decode.give_up()

    async def _read(self) -> None:
        try:
            await self._leg.read(MAX_PREFILL_ANSWER_BYTES)
        except BaseException:
            self._releases.abandon_prefill(self._leg)
            raise
        self._leg.succeed()
        self._on_answered()
