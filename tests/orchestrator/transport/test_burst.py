from __future__ import annotations

from orchestrator.transport.burst import Burst


def test_what_is_put_is_written_at_the_end_in_its_order() -> None:
    burst, written = Burst(), []
    burst.is_on = True
    burst.put(written.append, b"one")
    burst.put(lambda data: written.append(data.upper()), b"two")
    assert written == []
    burst.end()
    assert written == [b"one", b"TWO"]
    assert not burst.is_on
    burst.end()
    assert written == [b"one", b"TWO"]  # and not again


def test_a_closed_connection_does_not_keep_others_from_theirs() -> None:
    def closed(data: bytes) -> None:
        raise RuntimeError("unable to perform operation; the handler is closed")

    burst, written = Burst(), []
    burst.put(closed, b"one")
    burst.put(written.append, b"two")
    burst.end()
    assert written == [b"two"]
