"""An upload leg sends its body to the worker while it comes from the client.

Each waits for the other: what the worker has not taken keeps more from being taken from the client, whose
connection is not read then. There is no task and no queue: whatever happens on either side wakes the sender.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from orchestrator.api.upload import Upload
from orchestrator.legs.leg import AnswerLeg, Legs
from orchestrator.transport.base import Answer, Sending
from orchestrator.wire.codec import FORM, Codec
from orchestrator.workers.worker import Worker


class UploadLeg(AnswerLeg):
    """Await `upload()`, and read it then."""

    def __init__(self, legs: Legs, worker: Worker, upload: Upload) -> None:
        super().__init__(legs, worker)
        self._upload = upload

    async def upload(self) -> None:
        """Send all of the form, or as much as the worker wants: it may have refused it, or be lost, which
        `read()` tells then.

        Raises `WorkerUnreachable` and `OutOfResources` if nothing was sent, and what `Upload.take` raises.
        """
        legs, worker, upload = self.legs, self.worker, self._upload
        dispatcher = legs.dispatcher
        legs.count += 1
        self.id = name = f"{legs.id}-{legs.count}"
        self.epoch = worker.epoch
        size = upload.restart(legs.adapter or worker.address.served_model)
        head = dispatcher.head(worker, FORM.name) + self._id_header(name) + legs.headers + worker.rank_header
        sending = await dispatcher.upstream.open(worker.origin, "POST", self.path, head, size)
        self.answer = sending.answer
        self.sent = self.heard = dispatcher.time()
        upload.on_more(sending.wake)
        try:
            await self._send_all(sending)
        except BaseException:
            self.abort()
            raise
        finally:
            upload.on_more(None)

    async def _send_all(self, sending: Sending) -> None:
        upload, time = self._upload, self.legs.dispatcher.time
        while not sending.is_over:
            if not sending.is_full:
                pieces = upload.take()
                for piece in pieces:
                    sending.write(piece)
                if upload.is_whole and not pieces:
                    sending.end()
                    return
                if pieces:
                    continue
            await sending.wait()
            self.heard = time()

    def _send(self, codec: Codec) -> Coroutine[Any, Any, Answer]:
        return self._sent()

    async def _sent(self) -> Answer:
        return self.written
