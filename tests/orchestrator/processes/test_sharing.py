from __future__ import annotations

import asyncio

from orchestrator.processes.sharing import MOST_BYTES, Note, Shared, Sharing


def test_notes_go_together_and_nothing_goes_if_there_is_none() -> None:
    sent: list[Shared] = []
    sharing = Sharing(sent.append)
    sharing.flush()
    sharing.note("m", "prefill", b"1")
    sharing.note("n", "both", b"2")
    sharing.flush()
    sharing.flush()
    assert sent == [Shared([Note("m", "prefill", b"1"), Note("n", "both", b"2")])]


def test_a_batch_is_bounded() -> None:
    sent: list[Shared] = []
    sharing = Sharing(sent.append)
    for _ in range(2):
        for _ in range(1000):
            sharing.note("m", "prefill", bytes(1024))
        sharing.flush()
    assert [sum(len(note.content) for note in shared.notes) for shared in sent] == [MOST_BYTES] * 2


def test_batches_go_from_time_to_time() -> None:
    async def run() -> None:
        sent: asyncio.Queue[Shared] = asyncio.Queue()
        sharing = Sharing(sent.put_nowait)
        running = asyncio.create_task(sharing.run())
        for content in (b"1", b"2"):
            sharing.note("m", "prefill", content)
            assert await sent.get() == Shared([Note("m", "prefill", content)])
        running.cancel()

    asyncio.run(run())
