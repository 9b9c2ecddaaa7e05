"""A leg's body is written as JSON, or as msgpack for workers that announce it.

A leg is the common part of a request, the same for every leg, and a small overlay of its own. The common
part is encoded once and shared; legs are sent as several parts, so it is never copied either. In JSON not
even its large values are: they go to the workers as they lie in the client's body.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw

from orchestrator.wire.info import MSGPACK_HEADER

Parts = tuple[bytes | memoryview, ...]
Headers = tuple[tuple[bytes, bytes], ...]

_msgpack: Final = msgspec.msgpack.Encoder()
_json: Final = msgspec.json.Encoder()
# A transcode decodes every value: 0.7 ms per MiB of text, 5 ms per MiB of token ids. A larger document could
# take over 200 us and is not transcoded in place.
MAX_INLINE_BYTES: Final = 64 * 1024

_PARAMS_KEY: Final = "kv_transfer_params"
TOKEN_IDS_KEY: Final = "prompt_token_ids"  # noqa: S105  # no secret; in kv_transfer_params, as vLLM reads it

_CONTENT_TYPE = (b"content-type", b"application/json")

# A longer value is not copied: a part of its own costs about as much as a copy of this.
_LARGE: Final = 16 * 1024


class NotEncodable(ValueError):
    """The document has a value that this encoding cannot carry; send it as JSON."""


class TooLarge(NotEncodable):
    """Making another encoding of the document here would hold up the event loop."""


def json_object(fields: Mapping[str, Raw]) -> Parts:
    """Return the fields as one JSON object, without white space between them; large values are not copied.

    The last part ends the object.
    """
    large = {name: memoryview(raw) for name, raw in fields.items() if len(raw) > _LARGE}
    if not large:
        return (_json.encode(fields),)
    parts: list[bytes | memoryview] = []
    for name, value in large.items():
        parts += (b"%b%b:" % (b"," if parts else b"{", _json.encode(name)), value)
    rest = _json.encode({name: raw for name, raw in fields.items() if name not in large})
    return *parts, b"," + rest[1:] if len(rest) > 2 else b"}"


class Codec(ABC):
    """A codec is one encoding. It has no state; `common()` results belong to the codec that made them."""

    name: str
    headers: Headers  # what a leg with this body says of it
    keeps_bytes: bool  # the client's own bytes are sent: there is nothing to encode

    @abstractmethod
    def common(self, document: Parts) -> Parts:
        """Return the part that all legs share, a JSON object, in this encoding.

        Raises `NotEncodable`, and `TooLarge` for what has to be done by `transcoded()`.
        """
        ...

    @abstractmethod
    def leg(self, common: Parts, overlay: bytes) -> Parts:
        """Return the whole document as parts to be written one after the other.

        `overlay` is a JSON object; no key may be in both. Raises `NotEncodable`.
        """
        ...

    @abstractmethod
    def leg_with_ids(self, common: Parts, overlay: bytes, params: bytes, packed: bytes) -> Parts:
        """Do the same with `params` as `kv_transfer_params`, a JSON object, and packed token ids in them."""
        ...


class JsonCodec(Codec):
    """It writes the client's own bytes for every value, with the overlay's fields behind them."""

    def __init__(self) -> None:
        self.name = "json"
        self.keeps_bytes = True
        self.headers = (_CONTENT_TYPE,)

    def common(self, document: Parts) -> Parts:
        return document

    def leg(self, common: Parts, overlay: bytes) -> Parts:
        end = common[-1]
        if len(common) == 1:
            if 2 < len(end) <= _LARGE and len(overlay) > 2:  # nearly all
                return (b"".join((end[:-1], b",", overlay[1:])),)
            if len(end) == 2:  # {}
                return (overlay,)
        if len(overlay) == 2:
            return common
        if len(end) <= _LARGE:
            return *common[:-1], b"".join((end[:-1], b",", overlay[1:]))
        return common[:-1] + (memoryview(end)[:-1], b"," + overlay[1:])  # noqa: RUF005  # copies nothing else

    def leg_with_ids(self, common: Parts, overlay: bytes, params: bytes, packed: bytes) -> Parts:
        with_ids = _followed_by(params, _json.encode({TOKEN_IDS_KEY: packed}))  # bytes become base64
        return self.leg(common, _followed_by(overlay, b'{"%b":%b}' % (_PARAMS_KEY.encode(), with_ids)))


class MsgpackCodec(Codec):
    """It writes the same document as msgpack. The content type stays JSON: see `wire.info.MSGPACK_HEADER`."""

    def __init__(self) -> None:
        self.name = "msgpack"
        self.keeps_bytes = False
        self.headers = (_CONTENT_TYPE, (MSGPACK_HEADER.lower().encode(), b"1"))

    def common(self, document: Parts) -> Parts:
        return (_packed(b"".join(document)),)

    def leg(self, common: Parts, overlay: bytes) -> Parts:
        return self._joined(common, _packed(overlay))

    def leg_with_ids(self, common: Parts, overlay: bytes, params: bytes, packed: bytes) -> Parts:
        return self._joined(common, _to_msgpack(overlay, params, packed))

    def _joined(self, parts: Parts, own: bytes) -> Parts:
        (common,) = parts
        common_size, common_at = _map_header(common)
        own_size, own_at = _map_header(own)
        header = _encode_map_header(common_size + own_size)
        return header, memoryview(common)[common_at:], memoryview(own)[own_at:]


def _packed(document: bytes) -> bytes:
    if len(document) > MAX_INLINE_BYTES:
        raise TooLarge("transcoding would hold up the event loop")
    return _to_msgpack(document)


def transcoded(document: bytes) -> tuple[bool, bytes]:
    """Do `MsgpackCodec.common()` for any size, elsewhere; False and no bytes if it is not encodable."""
    try:
        return True, _to_msgpack(document)
    except NotEncodable:
        return False, b""


def _followed_by(fields: bytes, more: bytes) -> bytes:
    """Join two JSON objects, the second of which is not empty."""
    return more if len(fields) == 2 else b"%b,%b" % (fields[:-1], more[1:])


def _to_msgpack(document: bytes, params: bytes | None = None, ids: bytes = b"") -> bytes:
    """Encode a JSON object anew, with these transfer parameters and packed token ids if there are some.

    Raises `NotEncodable` for what msgpack, or msgspec, has no words for: integers of more than 64 bits,
    numbers out of range, NaN.
    """
    try:
        fields: Any = msgspec.json.decode(document)
        if params is not None:
            fields[_PARAMS_KEY] = {**msgspec.json.decode(params), TOKEN_IDS_KEY: ids}
        return _msgpack.encode(fields)
    except (OverflowError, RecursionError, ValueError, msgspec.MsgspecError) as error:
        raise NotEncodable(str(error)) from error


def _map_header(packed: bytes | memoryview) -> tuple[int, int]:
    """Return (number of pairs, bytes of the header) of a msgpack map: fixmap or map 16, for
    `view.MAX_FIELDS`.
    """
    if packed[0] & 0xF0 == 0x80:
        return packed[0] & 0x0F, 1
    return int.from_bytes(packed[1:3], "big"), 3


def _encode_map_header(size: int) -> bytes:
    if size < 16:
        return bytes((0x80 | size,))
    return b"\xde" + size.to_bytes(2, "big")


class FormCodec(Codec):
    """It writes a multipart form, of which the common part is what is around the name of the model, or all of
    a form that names none. Its content type, with the boundary, is the client's.
    """

    def __init__(self) -> None:
        self.name = "form"
        self.keeps_bytes = True
        self.headers = ()

    def common(self, document: Parts) -> Parts:
        return document

    def leg(self, common: Parts, overlay: bytes) -> Parts:
        if len(common) == 1:
            return common
        before, behind = common
        return before, str(msgspec.json.decode(overlay)["model"]).encode(), behind

    def leg_with_ids(self, common: Parts, overlay: bytes, params: bytes, packed: bytes) -> Parts:
        raise NotEncodable("a form has no token ids")


JSON: Final = JsonCodec()
FORM: Final = FormCodec()
CODECS: Final[dict[str, Codec]] = {"json": JSON, "orjson": JSON, "msgpack": MsgpackCodec()}
"""By the orchestrator's transport: `orjson` changes the worker's parser only, the bytes are the same."""
