"""Embeddings have several forms: this finds out which one a client wants, and makes it of what the worker
sends.

Between worker and orchestrator vectors travel as base64, which every OpenAI server has: half the bytes of
JSON floats, and for vLLM half the work, or a twentieth where it has no orjson. Raw bytes would be fewer, but
vLLM sends them vector by vector, each from a thread, and describes them in a header that grows by 100 bytes
with each (bench/embeddings/forms.py).

| the client asks | it gets |
|---|---|
| nothing, or `encoding_format: float` | JSON floats, made here |
| `encoding_format: base64` | the worker's answer, unchanged |
| `Accept: application/octet-stream`, or `encoding_format: bytes_only` | bytes and `x-baton-embeddings` |
| `encoding_format: bytes` | the same with vLLM's `metadata` header |
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any

import msgspec
import orjson
from msgspec import Raw

from orchestrator.api.base import Content, Conversion, Endpoint
from orchestrator.api.view import RequestView
from orchestrator.errors import WorkerGarbage
from orchestrator.http.exchange import Exchange
from orchestrator.loop.offload import Offload
from orchestrator.wire.headers import header_block

PATH = "/v1/embeddings"
SUMMARY_HEADER = b"x-baton-embeddings"  # what the bytes are; as long for one vector as for a thousand
METADATA_HEADER = b"metadata"  # vLLM's, with an entry for each vector

_NUMBER_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}  # vLLM's names
_ABOUT_ALL = ("id", "created", "model", "usage")
_USAGE = ("prompt_tokens", "total_tokens")
_BASE64 = Raw(b'"base64"')
_JSON_HEADER = header_block([(b"content-type", b"application/json")])

_STRING = msgspec.json.Decoder(str)
_BYTES = msgspec.json.Decoder(bytes)  # of a base64 string
_DOCUMENT = msgspec.json.Decoder(dict[str, Raw])
_ITEMS = msgspec.json.Decoder(list[dict[str, Raw]])


class InvalidEmbeddings(ValueError):
    """The worker's answer does not hold the vectors that it was asked for."""


# --- what the client wants ----------------------------------------------------------------------


class Layout(Enum):
    FLOATS = "a JSON document with numbers in it"
    RAW = "the numbers' bytes, vector after vector"
    RAW_WITH_METADATA = "the same, and vLLM's header"


# What is converted within 200 us, in bytes of the worker's answer. 256 vectors of 1024 have 1.4 MB, and take
# 7 ms to become numbers, 2 ms to become bytes.
MAX_INLINE_BYTES = {
    Layout.FLOATS: 40 * 1024,
    Layout.RAW: 128 * 1024,
    Layout.RAW_WITH_METADATA: 128 * 1024,
}


@dataclass(frozen=True, slots=True)
class EmbeddingForm:
    """The client wants this form of answer, made here of base64: `dtype` and `endianness` are those of the
    numbers in it.
    """

    layout: Layout
    dtype: str = "float32"
    endianness: str = "little"

    @property
    def number_bytes(self) -> int:
        return _NUMBER_BYTES[self.dtype]


def form_of(view: RequestView, accept: bytes | None) -> EmbeddingForm | None:
    """Return the form that the request and its `Accept` header ask for.

    None: the client gets the worker's own answer. So it is also with whatever is unknown here, or wrong: the
    worker may know it, and says what it refuses.
    """
    encoding = _text(view.own, "encoding_format", "float")
    if encoding == "bytes":
        return _raw_form(Layout.RAW_WITH_METADATA, view.own)
    if encoding == "bytes_only" or (encoding in ("float", "base64") and _prefers_bytes(accept)):
        return _raw_form(Layout.RAW, view.own)
    if encoding == "float" and not view.own.keys() & {"embed_dtype", "endianness"}:
        return EmbeddingForm(Layout.FLOATS)
    return None


def ask_base64(view: RequestView) -> RequestView:
    """Return the request as the worker gets it when the client wants another form."""
    return view.with_own({**view.own, "encoding_format": _BASE64})


def _raw_form(layout: Layout, fields: Mapping[str, Raw]) -> EmbeddingForm | None:
    dtype = _text(fields, "embed_dtype", "float32")
    endianness = _text(fields, "endianness", "native")
    if dtype not in _NUMBER_BYTES or endianness not in ("native", "little", "big"):
        return None
    return EmbeddingForm(layout, dtype, "big" if endianness == "big" else "little")


def _prefers_bytes(accept: bytes | None) -> bool:
    """Tell whether bytes are the first in the list of what the client takes."""
    first = (accept or b"").partition(b",")[0].partition(b";")[0]
    return first.strip().lower() == b"application/octet-stream"


def _text(fields: Mapping[str, Raw], name: str, default: str) -> str | None:
    """Return a field's value; None if it is no string."""
    try:
        return _STRING.decode(fields[name]) if name in fields else default
    except msgspec.DecodeError:
        return None


# --- the answer ---------------------------------------------------------------------------------


class Embeddings:
    """It makes answers of what workers send, large ones in another process."""

    def __init__(self, offload: Offload) -> None:
        """`offload` stays the caller's."""
        self._offload = offload
        self._has_numpy = False

    async def answer(self, form: EmbeddingForm, content: bytes) -> Content:
        """Make what the client gets of the base64 document that the worker sent. Raises `WorkerGarbage`."""
        try:
            return await self._convert(form, content)
        except InvalidEmbeddings as error:
            raise WorkerGarbage(f"the worker's answer holds no embeddings: {error}") from error

    async def _convert(self, form: EmbeddingForm, content: bytes) -> Content:
        if len(content) > MAX_INLINE_BYTES[form.layout]:
            return await self._offload.run(convert, content, form)
        if form.layout is Layout.FLOATS:
            await self._import_numpy()
        return convert(content, form)

    async def _import_numpy(self) -> None:
        """Import it with the first embedding: it takes 0.1 s and 14 MB, which only those shall pay who serve
        embeddings.
        """
        if not self._has_numpy:
            await asyncio.to_thread(import_module, "numpy")
            self._has_numpy = True


class EmbeddingsEndpoint(Endpoint):
    """It needs one leg, whose answer is base64 unless the client wants exactly what the worker has."""

    def __init__(self, offload: Offload) -> None:
        """`offload` stays the caller's."""
        super().__init__(needs_one_worker=True, streams=False, can_continue=False)
        self._embeddings = Embeddings(offload)

    def adapt(self, view: RequestView, exchange: Exchange) -> tuple[RequestView, Conversion | None]:
        form = form_of(view, exchange.header(b"accept"))
        if form is None:
            return view, None
        return ask_base64(view), _Conversion(self._embeddings, form)


class _Conversion(Conversion):
    def __init__(self, embeddings: Embeddings, form: EmbeddingForm) -> None:
        self._embeddings = embeddings
        self._form = form

    async def convert(self, content: bytes) -> Content:
        return await self._embeddings.answer(self._form, content)


def convert(content: bytes, form: EmbeddingForm) -> Content:
    """Make what `Embeddings.answer` returns. Raises `InvalidEmbeddings`."""
    try:
        document = _DOCUMENT.decode(content)
        items = _ITEMS.decode(document.get("data", b"null"))
        if form.layout is Layout.FLOATS:
            return _JSON_HEADER, _with_floats(document, items)
        vectors = [_vector(item, form.number_bytes) for item in items]
        return header_block(_raw_headers(form, document, vectors)), b"".join(vectors)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEmbeddings(str(error)) from error


def _vector(item: Mapping[str, Raw], number_bytes: int) -> bytes:
    vector = _BYTES.decode(item.get("embedding", b"null"))
    if not vector or len(vector) % number_bytes:
        raise InvalidEmbeddings(f"a vector has {len(vector)} bytes")
    return vector


# --- floats


def _with_floats(document: Mapping[str, Raw], items: Sequence[dict[str, Raw]]) -> bytes:
    """Return the document with numbers for base64, each the shortest that is the same float32.

    All else keeps its bytes; so does a vector that is a list already, of a worker that has no base64.
    """
    made = [item if _is_list(item) else {**item, "embedding": _array(item)} for item in items]
    return orjson.dumps({**document, "data": made}, _fragment, orjson.OPT_SERIALIZE_NUMPY)


def _is_list(item: Mapping[str, Raw]) -> bool:
    return bytes(memoryview(item.get("embedding", b""))[:1]) == b"["


def _array(item: Mapping[str, Raw]) -> Any:
    from numpy import frombuffer  # see `Embeddings._import_numpy`

    return frombuffer(_vector(item, 4), "<f4")


def _fragment(value: object) -> orjson.Fragment:
    if not isinstance(value, Raw):
        raise TypeError(f"{type(value).__name__} in an answer")
    return orjson.Fragment(bytes(value))


# --- bytes


def _raw_headers(
    form: EmbeddingForm, document: Mapping[str, Raw], vectors: Sequence[bytes]
) -> list[tuple[bytes, bytes]]:
    about = _about(document)
    numbers = {"embed_dtype": form.dtype, "endianness": form.endianness}
    width = _width(vectors)
    dimensions = width // form.number_bytes
    summary = {**about, **numbers, "shape": [len(vectors), dimensions]}
    headers = [(b"content-type", b"application/octet-stream"), (SUMMARY_HEADER, _ascii(summary))]
    if form.layout is Layout.RAW_WITH_METADATA:
        entries = [
            {"index": index, **numbers, "start": start, "end": start + width, "shape": [dimensions]}
            for index, start in enumerate(range(0, len(vectors) * width, width))
        ]
        headers.append((METADATA_HEADER, _ascii({**about, "data": entries})))
    return headers


def _about(document: Mapping[str, Raw]) -> dict[str, Any]:
    """Return what the answer says beside its vectors; of the usage as much as vLLM's header has."""
    about = {name: msgspec.json.decode(document[name]) for name in _ABOUT_ALL if name in document}
    usage = about.get("usage")
    if isinstance(usage, dict):
        about["usage"] = {name: usage[name] for name in _USAGE if name in usage}
    return about


def _width(vectors: Sequence[bytes]) -> int:
    """Return how many bytes each vector has."""
    widths = set(map(len, vectors))
    if len(widths) != 1:
        raise InvalidEmbeddings(f"vectors of {len(widths)} different lengths")
    return widths.pop()


def _ascii(value: object) -> bytes:
    """Return it as JSON that may stand in a header."""
    return json.dumps(value, separators=(",", ":")).encode()
