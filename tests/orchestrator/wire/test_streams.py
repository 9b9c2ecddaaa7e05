"""The reader of frames, whatever a connection brings it, and in whatever pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    END,
    HEAD,
    HEADER,
    HEADER_SIZE,
    LAST,
    LEAVE,
    MAX_PAYLOAD,
    OPEN,
    PING,
    RESET,
    FrameError,
    FrameReader,
    credit,
    frame,
    reset,
)

FIXED = {RESET: 1, LEAVE: 0, CREDIT: 4, PING: 8, LAST: 0}
KINDS = range(OPEN, LAST + 1)

Frame = tuple[int, bool, int, bytes]


class Read:
    """What a reader has given so far."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.reader = FrameReader(lambda *frame: self.frames.append(frame))

    @property
    def held(self) -> int:
        return len(self.reader._rest)

    def feed(self, *pieces: bytes) -> list[Frame]:
        for piece in pieces:
            self.reader.feed(piece)
        return self.frames


def as_bytes(frames: list[Frame]) -> bytes:
    return b"".join(
        frame(kind | END if is_last else kind, stream, data) for kind, is_last, stream, data in frames
    )


@st.composite
def frames_of_any_kind(draw: st.DrawFn) -> Frame:
    kind = draw(st.sampled_from(KINDS))
    size = FIXED.get(kind)
    payload = draw(st.binary(max_size=40) if size is None else st.binary(min_size=size, max_size=size))
    return kind, draw(st.booleans()), draw(st.integers(0, 2**32 - 1)), payload


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[start:end] for start, end in pairwise(places)]


@given(st.lists(frames_of_any_kind(), max_size=8), st.lists(st.integers(0, 2**16)))
def test_frames_are_the_same_however_they_are_cut(frames: list[Frame], places: list[int]) -> None:
    read = Read()
    assert read.feed(*cut(as_bytes(frames), places)) == frames
    assert read.held == 0


@given(st.lists(frames_of_any_kind(), min_size=1, max_size=4))
def test_byte_by_byte_a_frame_comes_with_its_last_one(frames: list[Frame]) -> None:
    read = Read()
    ends = 0
    for number, one in enumerate(frames, 1):
        data = as_bytes([one])
        read.feed(*cut(data[:-1], list(range(len(data)))))
        assert len(read.frames) == ends
        assert read.held == len(data) - 1
        ends = len(read.feed(data[-1:]))
        assert ends == number


@given(st.binary(max_size=300), st.lists(st.integers(0, 300)))
def test_garbage_is_frames_or_an_error_however_it_is_cut(data: bytes, places: list[int]) -> None:
    whole, cut_up = Read(), Read()
    errors = []
    for read, pieces in ((whole, [data]), (cut_up, cut(data, places))):
        try:
            read.feed(*pieces)
        except FrameError as error:
            errors.append(str(error))
    assert whole.frames == cut_up.frames
    assert errors in ([], [*errors[:1]] * 2)
    if not errors:
        assert as_bytes(whole.frames) + whole.reader._rest == data


@given(st.data())
def test_garbage_that_begins_like_frames_leaves_one_unfinished_frame(data: st.DataObject) -> None:
    """The size and the kind are often right here: what is held is never more than one frame."""
    sizes = st.sampled_from((0, 1, 4, 8, 9, 100, MAX_PAYLOAD - 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 2**32 - 1))
    headers = st.builds(HEADER.pack, sizes, st.sampled_from([*KINDS, DATA | END, 0, 77]), st.just(1))
    read = Read()
    try:
        for _ in range(data.draw(st.integers(1, 10))):
            read.feed(data.draw(headers) + data.draw(st.sampled_from((b"", b"a" * 100, b"b" * MAX_PAYLOAD))))
            assert read.held < HEADER_SIZE + MAX_PAYLOAD
    except FrameError:
        pass


@pytest.mark.parametrize("kind", [0, LAST + 1, 0x7F, END, END | 0x7F])
def test_a_kind_that_is_unknown_is_an_error_before_its_payload(kind: int) -> None:
    with pytest.raises(FrameError, match="unknown kind"):
        Read().feed(HEADER.pack(0, kind, 1))


@pytest.mark.parametrize("kind", [OPEN, BODY, HEAD, DATA, DATA | END])
@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 2**31, 2**32 - 1])
def test_a_payload_that_is_too_large_is_an_error_before_it_comes(kind: int, size: int) -> None:
    with pytest.raises(FrameError, match=f"with {size} bytes"):
        Read().feed(HEADER.pack(size, kind, 1))


@pytest.mark.parametrize(("kind", "size"), FIXED.items())
def test_a_payload_has_the_size_of_its_kind(kind: int, size: int) -> None:
    Read().feed(HEADER.pack(size, kind | END, 1))
    for wrong in {0, size - 1, size + 1} - {size, -1}:
        with pytest.raises(FrameError, match=f"kind {kind} with {wrong} bytes"):
            Read().feed(HEADER.pack(wrong, kind, 1))


def test_what_comes_before_an_error_has_been_given() -> None:
    read = Read()
    with pytest.raises(FrameError):
        read.feed(credit(3, 70_000) + reset(4, 2) + HEADER.pack(0, 0, 1))
    assert read.frames == [(CREDIT, False, 3, b"\x00\x01\x11\x70"), (RESET, False, 4, b"\x02")]


def test_the_largest_payload_goes_through() -> None:
    payload = bytes(MAX_PAYLOAD)
    assert Read().feed(frame(DATA | END, 2**32 - 1, payload)) == [(DATA, True, 2**32 - 1, payload)]


def test_what_its_callback_raises_comes_out() -> None:
    def refuse(*frame: object) -> None:
        raise FrameError("a rule of its own")

    with pytest.raises(FrameError, match="of its own"):
        FrameReader(refuse).feed(frame(PING, 0, bytes(8)))
