"""The contract of a worker that embeds, simulated or real. Whoever imports this has a fixture `embedder`."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import httpx
import numpy
import pytest

from tests.contract.engines import LIMIT_S
from tests.contract.shapes import Is, assert_shape

INPUTS = ["What is prefill?", "What is decode?", "The quick brown fox"]
USAGE = {"prompt_tokens": int, "total_tokens": int}
DOCUMENT = {
    "id": str,
    "object": Is("list"),
    "created": int,
    "model": str,
    "data": [{"index": int, "object": Is("embedding"), "embedding": [float]}],
    "usage": USAGE
    | {"completion_tokens": Is(0), "prompt_tokens_details": None, "completion_tokens_details": None},
}
METADATA = {
    "id": str,
    "created": int,
    "model": str,
    "data": [{"index": int, "embed_dtype": str, "endianness": str, "start": int, "end": int, "shape": [int]}],
    "usage": USAGE,
}


@dataclass(frozen=True)
class Embedder:
    """A server that embeds: a worker, or an orchestrator before one."""

    url: str
    model: str

    def ask(self, given: Any = INPUTS, *, accept: str = "*/*", **fields: Any) -> httpx.Response:
        document = {"model": self.model, "input": given} | fields
        headers = {"accept": accept}
        return httpx.post(f"{self.url}/v1/embeddings", json=document, headers=headers, timeout=LIMIT_S)

    def vectors(self, given: Any = INPUTS, **fields: Any) -> numpy.ndarray[Any, Any]:
        """float32, a row for each input."""
        answer = self.ask(given, **fields)
        assert answer.status_code == 200, answer.text
        return numpy.array([item["embedding"] for item in answer.json()["data"]], "f4")


def unpacked(data: bytes, dtype: str = "<f4") -> numpy.ndarray[Any, Any]:
    return numpy.frombuffer(data, dtype).reshape(len(INPUTS), -1)


def of_base64(answer: httpx.Response) -> bytes:
    """All vectors, one after the other."""
    assert answer.status_code == 200, answer.text
    return b"".join(base64.b64decode(item["embedding"]) for item in answer.json()["data"])


def assert_same(found: numpy.ndarray[Any, Any], expected: numpy.ndarray[Any, Any]) -> None:
    """Of one input: an engine that batches adds up in another order each time."""
    assert found.shape == expected.shape
    assert numpy.allclose(found, expected, atol=1e-5)


# --- forms


def test_floats(embedder: Embedder) -> None:
    answer = embedder.ask()
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert_shape(document, DOCUMENT)
    assert document["id"].startswith("embd-")
    assert [item["index"] for item in document["data"]] == [0, 1, 2]
    assert document["usage"]["total_tokens"] == document["usage"]["prompt_tokens"] > 0


def test_base64_is_little_endian_float32(embedder: Embedder) -> None:
    assert_same(unpacked(of_base64(embedder.ask(encoding_format="base64"))), embedder.vectors())


def test_bytes_and_their_metadata(embedder: Embedder) -> None:
    answer = embedder.ask(encoding_format="bytes")
    assert answer.headers["content-type"] == "application/octet-stream"
    metadata = json.loads(answer.headers["metadata"])
    assert_shape(metadata, METADATA)
    for item in metadata["data"]:
        (size,) = item["shape"]
        vector = numpy.frombuffer(answer.content[item["start"] : item["end"]], "<f4")
        assert (item["embed_dtype"], vector.size) == ("float32", size)
    assert metadata["data"][-1]["end"] == len(answer.content)
    assert_same(unpacked(answer.content), embedder.vectors())


def test_bytes_only(embedder: Embedder) -> None:
    answer = embedder.ask(encoding_format="bytes_only")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "metadata" not in answer.headers
    assert_same(unpacked(answer.content), embedder.vectors())


@pytest.mark.parametrize(("endianness", "order"), [("native", "="), ("little", "<"), ("big", ">")])
@pytest.mark.parametrize(("dtype", "code"), [("float32", "f4"), ("float16", "f2")])
@pytest.mark.parametrize("encoding", ["base64", "bytes"])
def test_types_and_byte_orders(
    embedder: Embedder, encoding: str, dtype: str, code: str, endianness: str, order: str
) -> None:
    answer = embedder.ask(encoding_format=encoding, embed_dtype=dtype, endianness=endianness)
    data = answer.content if encoding == "bytes" else of_base64(answer)
    found = unpacked(data, order + code).astype("f4")
    assert numpy.allclose(found, embedder.vectors(), atol=1e-3)


# --- inputs


def test_one_input_is_embedded_as_among_others(embedder: Embedder) -> None:
    assert_same(embedder.vectors(INPUTS[1])[0], embedder.vectors()[1])
    assert not numpy.allclose(embedder.vectors()[0], embedder.vectors()[1], atol=1e-3)


def test_vectors_have_length_1(embedder: Embedder) -> None:
    assert numpy.allclose(numpy.linalg.norm(embedder.vectors(), axis=1), 1, atol=1e-4)


def test_token_ids(embedder: Embedder) -> None:
    document = {"model": embedder.model, "prompt": INPUTS[0]}
    ids = httpx.post(f"{embedder.url}/tokenize", json=document, timeout=LIMIT_S).json()["tokens"]
    assert_same(embedder.vectors(ids), embedder.vectors(INPUTS[0]))
    assert_same(embedder.vectors([ids, ids[:2]])[:1], embedder.vectors(INPUTS[0]))


def test_unknown_fields_are_ignored(embedder: Embedder) -> None:
    assert_same(embedder.vectors(user="u", stream=True, unknown={"a": [1]}), embedder.vectors())


# --- refusals


@pytest.mark.parametrize(
    "fields",
    [
        {"encoding_format": "hex"},
        {"encoding_format": None},
        {"encoding_format": "bytes", "embed_dtype": "int7"},
        {"encoding_format": "bytes_only", "endianness": "middle"},
        {"embed_dtype": "int7"},
        {"given": []},
        {"given": ["a", 1]},
        {"given": None},
        {"given": [[1], []]},
        {"given": [1 << 30]},
    ],
)
def test_what_is_wrong_is_refused(embedder: Embedder, fields: dict[str, Any]) -> None:
    answer = embedder.ask(**fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
