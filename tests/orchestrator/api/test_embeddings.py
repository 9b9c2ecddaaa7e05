from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.embeddings import (
    MAX_INLINE_BYTES,
    METADATA_HEADER,
    SUMMARY_HEADER,
    EmbeddingForm,
    Embeddings,
    InvalidEmbeddings,
    Layout,
    ask_base64,
    convert,
    form_of,
)
from orchestrator.api.view import RequestView, view_request
from orchestrator.errors import WorkerGarbage
from orchestrator.legs.bodies import LegBodies
from orchestrator.loop.offload import Offload
from orchestrator.wire.codec import CODECS, Codec
from orchestrator.wire.headers import fields_of

OCTETS = b"application/octet-stream"
FLOATS, RAW, BYTES = (EmbeddingForm(layout) for layout in Layout)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = [[0.5, -0.25, 1e-5], [0.1, 0.2, 0.3]]


def view(**fields: Any) -> RequestView:
    return view_request(json.dumps({"model": "m", "input": "a", **fields}).encode())


def packed(vector: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(vector)}f", *vector)


def encoded(vector: Sequence[float]) -> str:
    return base64.b64encode(packed(vector)).decode()


def document(embeddings: Sequence[Any], **more: Any) -> bytes:
    """What a worker answers."""
    items = [
        {"index": index, "object": "embedding", "embedding": embedding}
        for index, embedding in enumerate(embeddings)
    ]
    about = {"id": "embd-1", "object": "list", "created": 17, "model": "m"}
    return json.dumps(
        {**about, "data": items, "usage": {"prompt_tokens": 7, "details": None}, **more}
    ).encode()


def made(form: EmbeddingForm, content: bytes) -> tuple[bytes, bytes]:
    return convert(content, form)


def same_float32(found: Sequence[float], expected: Sequence[float]) -> bool:
    return numpy.array(found, "f4").tobytes() == packed(expected)


def headers_of(form: EmbeddingForm, content: bytes) -> dict[bytes, bytes]:
    return dict(fields_of(made(form, content)[0]))


# --- what the client wants ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, FLOATS),
        ({"encoding_format": "float"}, FLOATS),
        ({"dimensions": 8, "user": "u"}, FLOATS),
        ({"encoding_format": "base64"}, None),
        ({"encoding_format": "bytes_only"}, RAW),
        ({"encoding_format": "bytes"}, BYTES),
        ({"encoding_format": "bytes", "embed_dtype": "float16"}, EmbeddingForm(BYTES.layout, "float16")),
        ({"encoding_format": "bytes", "endianness": "native"}, BYTES),
        ({"encoding_format": "bytes", "endianness": "big"}, EmbeddingForm(BYTES.layout, endianness="big")),
    ],
)
def test_the_form_is_read_from_the_request(given: dict[str, Any], expected: EmbeddingForm | None) -> None:
    assert form_of(view(**given), None) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"encoding_format": "hex"},
        {"encoding_format": None},
        {"encoding_format": 3},
        {"encoding_format": "bytes", "embed_dtype": "int7"},
        {"encoding_format": "bytes_only", "endianness": ["big"]},
        {"embed_dtype": "nonsense"},  # vLLM looks at it, though it has no effect on numbers
    ],
)
def test_what_is_wrong_is_left_to_the_worker(given: dict[str, Any]) -> None:
    assert form_of(view(**given), None) is None


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, FLOATS),
        (b"*/*", FLOATS),
        (b"application/json", FLOATS),
        (OCTETS, RAW),
        (b" Application/Octet-Stream;q=0.9 , application/json", RAW),
        (b"application/json, application/octet-stream", FLOATS),
    ],
)
def test_the_accept_header_asks_for_bytes(accept: bytes | None, expected: EmbeddingForm) -> None:
    assert form_of(view(), accept) == expected


def test_the_accept_header_wins_over_what_an_sdk_adds() -> None:
    assert form_of(view(encoding_format="base64"), OCTETS) == RAW


def test_the_accept_header_does_not_take_the_metadata_away() -> None:
    assert form_of(view(encoding_format="bytes"), OCTETS) == BYTES


@pytest.mark.parametrize("codec", [CODECS["json"], CODECS["msgpack"]], ids=lambda codec: codec.name)
def test_the_worker_is_asked_for_base64_and_everything_else_stays(codec: Codec) -> None:
    given = {"input": [[1, 2], [3]], "dimensions": 8, "embed_dtype": "float16", "unknown": {"a": 1}}
    asked = ask_base64(view(**given, encoding_format="bytes"))
    leg = b"".join(LegBodies(asked).whole(codec, "m"))
    document = msgspec.msgpack.decode(leg) if codec.name == "msgpack" else json.loads(leg)
    assert document == {"model": "m", **given, "encoding_format": "base64"}


# --- floats -------------------------------------------------------------------------------------


def test_numbers_take_the_place_of_base64_and_the_rest_stays() -> None:
    content = document(map(encoded, VECTORS), unknown={"é": [1.50, None]})
    headers, body = made(FLOATS, content)
    assert headers == b"content-type: application/json\r\n"
    expected = json.loads(content)
    for item, vector in zip(expected["data"], VECTORS, strict=True):
        item["embedding"] = vector
    assert json.loads(body) == expected
    assert b"[0.1,0.2,0.3]" in body  # no digit more than the float32 needs


@given(st.lists(FLOAT32, min_size=1))
def test_numbers_are_exactly_the_workers(vector: list[float]) -> None:
    _, body = made(FLOATS, document([encoded(vector)]))
    assert same_float32(json.loads(body)["data"][0]["embedding"], vector)


def test_all_bit_patterns_of_a_sample_survive() -> None:
    """Random bits are mostly numbers of extreme size, subnormal ones too."""
    bits = numpy.frombuffer(random.Random(4).randbytes(4 * 100_000), "<f4")
    vector = bits[numpy.isfinite(bits)]
    _, body = made(FLOATS, document([base64.b64encode(vector.tobytes()).decode()]))
    assert numpy.array(json.loads(body)["data"][0]["embedding"], "f4").tobytes() == vector.tobytes()


def test_what_is_no_number_is_null() -> None:
    _, body = made(FLOATS, document([encoded([float("nan"), float("inf"), 1.0])]))
    assert json.loads(body)["data"][0]["embedding"] == [None, None, 1.0]


def test_numbers_of_a_worker_without_base64_keep_their_digits() -> None:
    content = document([[0.10000000149011612, 1]])
    assert json.loads(made(FLOATS, content)[1]) == json.loads(content)
    assert b"0.10000000149011612" in made(FLOATS, content)[1]


def test_no_vectors_are_no_error() -> None:
    assert json.loads(made(FLOATS, document([]))[1])["data"] == []


# --- bytes --------------------------------------------------------------------------------------


def test_raw_bytes_and_what_they_are() -> None:
    block, body = made(RAW, document(map(encoded, VECTORS)))
    assert body == b"".join(map(packed, VECTORS))
    headers = dict(fields_of(block))
    assert headers.keys() == {b"content-type", SUMMARY_HEADER}
    assert headers[b"content-type"] == OCTETS
    assert json.loads(headers[SUMMARY_HEADER]) == {
        "id": "embd-1",
        "created": 17,
        "model": "m",
        "usage": {"prompt_tokens": 7},
        "embed_dtype": "float32",
        "endianness": "little",
        "shape": [2, 3],
    }


def test_bytes_are_described_as_vllm_does() -> None:
    headers = headers_of(BYTES, document(map(encoded, VECTORS)))
    number = {"embed_dtype": "float32", "endianness": "little", "shape": [3]}
    assert json.loads(headers[METADATA_HEADER]) == {
        "id": "embd-1",
        "created": 17,
        "model": "m",
        "usage": {"prompt_tokens": 7},
        "data": [
            {"index": 0, "start": 0, "end": 12, **number},
            {"index": 1, "start": 12, "end": 24, **number},
        ],
    }


def test_bytes_of_another_type_are_counted_in_its_numbers() -> None:
    content = document([base64.b64encode(bytes(12)).decode()])
    summary = json.loads(headers_of(EmbeddingForm(Layout.RAW, "float16", "big"), content)[SUMMARY_HEADER])
    assert (summary["shape"], summary["embed_dtype"], summary["endianness"]) == ([1, 6], "float16", "big")


def test_a_summary_is_ascii_and_has_no_line_break() -> None:
    summary = headers_of(RAW, document([encoded([1.0])], model="mö\r\nx: y"))[SUMMARY_HEADER]
    assert summary.isascii()
    assert b"\r" not in summary
    assert b"\n" not in summary
    assert json.loads(summary)["model"] == "mö\r\nx: y"


# --- broken answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [FLOATS, RAW, BYTES], ids=lambda form: form.layout.name)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"data": null}',
        b'{"data": [1]}',
        b'{"data": [{}]}',
        b'{"data": [{"embedding": null}]}',
        b'{"data": [{"embedding": "AAAA"}]}',  # three bytes
        b'{"data": [{"embedding": "AAAAAAA"}]}',  # no padding
        b'{"data": [{"embedding": "AAAA*AA="}]}',
        b'{"data": [{"embedding": "\xff\xff\xff\xff"}]}',
        b'{"data": [{"embedding": ""}]}',
        document([encoded([1.0])])[:-9],
        b"[" * 100_000,
    ],
)
def test_what_holds_no_vectors_is_refused(form: EmbeddingForm, content: bytes) -> None:
    with pytest.raises(InvalidEmbeddings):
        made(form, content)


@pytest.mark.parametrize("form", [RAW, BYTES], ids=lambda form: form.layout.name)
@pytest.mark.parametrize("embeddings", [[encoded([1.0]), encoded([1.0, 2.0])], [], [[1.0, 2.0]]])
def test_bytes_need_vectors_of_one_length(form: EmbeddingForm, embeddings: list[Any]) -> None:
    with pytest.raises(InvalidEmbeddings):
        made(form, document(embeddings))


# --- where it is done ---------------------------------------------------------------------------


class WatchedOffload(Offload):
    calls = 0

    async def run(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return await super().run(*args, **kwargs)


def run(test: Callable[[Embeddings, WatchedOffload], Awaitable[None]]) -> None:
    async def main() -> None:
        offload = WatchedOffload()
        try:
            await test(Embeddings(offload), offload)
        finally:
            await offload.aclose()

    asyncio.run(main())


@pytest.mark.processes
@pytest.mark.parametrize("form", [FLOATS, RAW, BYTES], ids=lambda form: form.layout.name)
def test_small_answers_are_made_here_and_large_ones_elsewhere(form: EmbeddingForm) -> None:
    async def test(embeddings: Embeddings, offload: WatchedOffload) -> None:
        small = document([encoded([0.1] * 100)])
        large = document([encoded([0.1] * MAX_INLINE_BYTES[form.layout])])
        assert await embeddings.answer(form, small) == made(form, small)
        assert offload.calls == 0
        assert await embeddings.answer(form, large) == made(form, large)
        assert offload.calls == 1

    run(test)


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, MAX_INLINE_BYTES[Layout.FLOATS]])
def test_a_broken_answer_is_the_workers_fault(size: int) -> None:
    async def test(embeddings: Embeddings, offload: WatchedOffload) -> None:
        with pytest.raises(WorkerGarbage, match="holds no embeddings"):
            await embeddings.answer(FLOATS, document(["*" * 4 * size]))

    run(test)


@pytest.mark.processes
def test_numpy_is_imported_by_the_first_answer_that_needs_it() -> None:
    """The memory and the time are for clusters with embeddings only."""
    code = "import sys, orchestrator.app; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
