"""`/v1/embeddings` is served as vLLM serves it. What a vector is depends on nothing but the prompt."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import shake_128
from typing import Any, Literal

import msgspec
import numpy
import orjson
from numpy.typing import NDArray

from worker.sim import text
from worker.sim.delivery import Content, EngineResponse, Wire
from worker.sim.engine import Engine
from worker.sim.faults import Plan
from worker.sim.journal import Entry
from worker.sim.protocol import Refused, check_model, check_prompt, prompts_of, random_id
from worker.sim.runs import Prompt
from worker.sim.settings import Settings

DIMENSIONS = 1024

Vectors = NDArray[numpy.float32]  # a row for each prompt

_DTYPES = {"float32": "f4", "float16": "f2"}
_ORDERS = {"native": "=", "little": "<", "big": ">"}
_OCTETS = b"application/octet-stream"


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """Unknown fields are ignored."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64", "bytes", "bytes_only"] = "float"
    embed_dtype: Literal["float32", "float16"] = "float32"
    endianness: Literal["native", "little", "big"] = "native"
    cache_salt: str | None = None
    request_id: str = msgspec.field(default_factory=random_id)
    kv_transfer_params: dict[str, Any] | None = None  # for a hand-off in a request that is refused


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """This is a request that can be served."""

    request_id: str  # as in the answer
    model: str
    prompts: list[Prompt]
    dimensions: int
    encoding: str
    dtype: str
    endianness: str

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    def packed(self, vectors: Vectors) -> list[bytes]:
        rows = vectors.astype(_ORDERS[self.endianness] + _DTYPES[self.dtype])
        return [row.tobytes() for row in rows]


def embedding_job(request: EmbeddingRequest, settings: Settings, header_id: str | None) -> EmbeddingJob:
    """Make the job of a request. Raises `Refused`, and `Malformed` for an input of mixed types."""
    inputs = prompts_of(request.input, "input")
    check_model(request.model, settings)
    if not inputs:
        raise Refused("You must pass at least one prompt")
    dimensions = DIMENSIONS if request.dimensions is None else request.dimensions
    if not 1 <= dimensions <= DIMENSIONS:
        raise Refused(f"dimensions must be between 1 and {DIMENSIONS}, got {dimensions}.", param="dimensions")
    answer_id = f"embd-{request.request_id if header_id is None else header_id}"
    return EmbeddingJob(
        request_id=answer_id,
        model=request.model or settings.model_name,
        prompts=[
            _prompt(f"{answer_id}-{index}", given, request, settings) for index, given in enumerate(inputs)
        ],
        dimensions=dimensions,
        encoding=request.encoding_format,
        dtype=request.embed_dtype,
        endianness=request.endianness,
    )


def _prompt(request_id: str, given: str | list[int], request: EmbeddingRequest, settings: Settings) -> Prompt:
    tokens = text.encode(given) if isinstance(given, str) else given
    check_prompt(tokens, settings)
    return Prompt(request_id=request_id, tokens=tokens, salt=request.cache_salt or "")


def vectors_of(digests: Sequence[bytes], dimensions: int) -> Vectors:
    """Return vectors of length 1. Fewer dimensions are the first of all, brought to that length again."""
    noise = b"".join(shake_128(digest).digest(4 * DIMENSIONS) for digest in digests)
    rows = numpy.frombuffer(noise, "<i4").reshape(-1, DIMENSIONS)[:, :dimensions].astype(numpy.float32)
    unit: Vectors = rows / numpy.linalg.norm(rows, axis=1, keepdims=True)
    return unit


class EmbeddingResponse(EngineResponse):
    def __init__(self, engine: Engine, job: EmbeddingJob, plan: Plan, entry: Entry) -> None:
        super().__init__(engine, plan, entry)
        self._job = job

    async def _send_answer(self, wire: Wire) -> None:
        vectors = vectors_of(await self._digests(), self._job.dimensions)
        await self._send_content(_ENCODINGS[self._job.encoding](self._job, vectors), wire)

    async def _digests(self) -> list[bytes]:
        digests = []
        for prompt in self._job.prompts:
            async with self._engine.run(prompt, self._plan) as run:
                digests.append(run.digest)
            self._engine.metrics.finished["stop"].inc()
        return digests


# --- the forms of an answer ---------------------------------------------------------------------


def _base64(job: EmbeddingJob, vectors: Vectors) -> Content:
    return _document(job, [base64.b64encode(packed).decode() for packed in job.packed(vectors)])


def _bytes(job: EmbeddingJob, vectors: Vectors) -> Content:
    metadata = json.dumps(_head(job) | {"data": _entries(job), "usage": _usage(job)}).encode()
    return Content(b"".join(job.packed(vectors)), _OCTETS, ((b"metadata", metadata),))


def _bytes_only(job: EmbeddingJob, vectors: Vectors) -> Content:
    return Content(b"".join(job.packed(vectors)), _OCTETS)


def _document(job: EmbeddingJob, embeddings: Vectors | list[str]) -> Content:
    data = [
        {"index": index, "object": "embedding", "embedding": embedding}
        for index, embedding in enumerate(embeddings)
    ]
    details = {"completion_tokens": 0, "prompt_tokens_details": None, "completion_tokens_details": None}
    document = {**_head(job), "object": "list", "data": data, "usage": _usage(job) | details}
    return Content(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))


def _entries(job: EmbeddingJob) -> list[dict[str, Any]]:
    """Return where each vector is in the body."""
    width = job.dimensions * numpy.dtype(_DTYPES[job.dtype]).itemsize
    numbers = {"embed_dtype": job.dtype, "endianness": job.endianness, "shape": [job.dimensions]}
    return [
        {"index": index, "start": index * width, "end": (index + 1) * width, **numbers}
        for index in range(len(job.prompts))
    ]


def _head(job: EmbeddingJob) -> dict[str, Any]:
    return {"id": job.request_id, "created": int(time.time()), "model": job.model}


def _usage(job: EmbeddingJob) -> dict[str, Any]:
    return {"prompt_tokens": job.prompt_tokens, "total_tokens": job.prompt_tokens}


_ENCODINGS: Mapping[str, Callable[[EmbeddingJob, Vectors], Content]] = {
    "float": _document,
    "base64": _base64,
    "bytes": _bytes,
    "bytes_only": _bytes_only,
}
