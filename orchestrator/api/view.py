"""The orchestrator decodes of a request only the fields that it routes on. Everything else stays bytes.

One pass of msgspec gives the top level as `dict[str, Raw]`; a `Raw` is a view of the client's own bytes.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw

from orchestrator.api.refusable import JUDGED, is_refusable
from orchestrator.http.exchange import Exchange
from orchestrator.routing.policies.base import Request
from orchestrator.wire.codec import Parts, json_object
from orchestrator.wire.depth import MAX_DEPTH, SHALLOW_BYTES, TOO_DEEP, nesting_fault
from orchestrator.wire.lax import lax_bool, lax_int
from orchestrator.wire.shapes import RoutedOwn, StreamOptions

# Of a large body. OpenAI's requests have some thirty and vLLM adds as many; a million would hold the loop up.
MAX_FIELDS: Final = 1000

# Of English text in common tokenizers; JSON and other languages have more bytes, and count for more.
BYTES_PER_TOKEN: Final = 4

# What the model reads. A chat template puts tools in front of the messages: what begins alike for the model
# begins alike in this order. Caches are not shared between salts. None of these is among `OWN`.
PROMPT_FIELDS: Final = (
    "cache_salt",
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "instructions",
    "system",
    "messages",
    "prompt",
    "input",
)


class InvalidRequest(ValueError):
    """The client's document cannot be used. `param` names the field, if one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class RequestView(Request):
    """A view is a request as the orchestrator sees it; the values are the client's own bytes. It is not
    changed once made.
    """

    __slots__ = (
        "_exchange",
        "common",
        "given",
        "is_refusable",
        "is_stream",
        "limit",
        "model",
        "own",
        "own_json",
        "shared",
        "wants_usage",
        "whole_reason",
    )

    def __init__(
        self,
        shared: dict[str, Raw],
        common: Parts,
        own: dict[str, Raw],
        own_json: bytes,
        model: str,
        is_stream: bool,
        wants_usage: bool,
        whole_reason: str | None,
        exchange: Exchange | None = None,
        limit: int = 0,
        is_refusable: bool = False,
        given: int = -1,
    ) -> None:
        """`shared` are the fields that all legs share, `common` the same as one JSON object; `own` are the
        others (`OWN`), in `own_json` as well. `model` is "" if the client named none. `wants_usage` if the
        client asked for the usage event of a stream. `whole_reason` is why no hand-off is possible; None if
        the request can go in two legs. `exchange` has the client's headers. `limit` is how many tokens the
        answer may have; 0 if it does not say. `is_refusable` if a worker that decodes is likely to refuse it,
        and one that prefills is not. `given` is how many fields the client's document has; -1 if that is not
        known.
        """
        self._exchange = exchange
        self.shared = shared
        self.common = common
        self.own = own
        self.own_json = own_json
        self.model = model
        self.is_stream = is_stream
        self.wants_usage = wants_usage
        self.whole_reason = whole_reason
        self.limit = limit
        self.is_refusable = is_refusable
        self.given = given

    def with_own(self, own: dict[str, Raw]) -> RequestView:
        """Return the same request with other fields of its own; none of those that the view itself tells."""
        return RequestView(
            self.shared,
            self.common,
            own,
            _json.encode(own),
            self.model,
            self.is_stream,
            self.wants_usage,
            self.whole_reason,
            self._exchange,
            self.limit,
            self.is_refusable,
            self.given,
        )

    def choices(self) -> int:
        """Return how many choices the answer has; 0 if that is not clear."""
        if self.whole_reason is None and "n" not in self.own:
            return 1
        return _count_of(self.own.get("n")) * _prompts_in(self.shared)

    def refuses(self, limit: str) -> bool:
        """Tell whether workers will refuse the request for its limit of tokens, which must be positive."""
        value = self.own.get(limit)
        try:
            return value is not None and lax_int(value) < 1
        except ValueError:  # null, or for the worker to judge
            return False

    def for_model(self, model: str) -> RequestView:
        """Return the same request with a model, for one whose client named none."""
        own = {**self.own, "model": Raw(_json.encode(model))}
        return RequestView(
            self.shared,
            self.common,
            own,
            _json.encode(own),
            model,
            self.is_stream,
            self.wants_usage,
            self.whole_reason,
            self._exchange,
            self.limit,
            self.is_refusable,
            self.given,
        )

    def without_body(self) -> RequestView:
        """Return the same request without the fields that all legs share, for one that is not kept."""
        return RequestView(
            {},
            (),
            self.own,
            self.own_json,
            self.model,
            self.is_stream,
            self.wants_usage,
            self.whole_reason,
            self._exchange,
        )

    # --- what routing policies may ask ----------------------------------------------------------

    def body_bytes(self) -> int:
        return sum(map(len, self.common)) + len(self.own_json)

    def prompt_tokens(self) -> int:
        """Estimate how many tokens the prompt has: ids are counted, of text there is one per four bytes."""
        prompt = self.shared.get("prompt")
        if prompt is not None:
            listed = bytes(prompt)
            if listed.startswith(b"[") and b'"' not in listed:
                return listed.count(b",") + 1
        common = self.common
        size = len(common[0]) if len(common) == 1 else sum(map(len, common))
        return size // BYTES_PER_TOKEN

    def prompt(self, most: int) -> bytes:
        pieces: list[memoryview] = []
        shared = self.shared
        for name in PROMPT_FIELDS:
            value = shared.get(name)
            if value is not None and most > 0:
                pieces.append(memoryview(value)[:most])
                most -= len(value)
        return b"".join(pieces)

    def prompt_ids(self) -> Sequence[int] | None:
        value = self.field("prompt")
        if value is None or value[0] != _BRACKET:
            return None
        try:
            return _IDS.decode(value)
        except msgspec.DecodeError:
            return None  # several prompts, or nonsense that the worker will refuse

    def field(self, name: str) -> memoryview | None:
        value = self.shared.get(name, self.own.get(name))
        return None if value is None else memoryview(value)

    def header(self, name: bytes) -> bytes | None:
        return None if self._exchange is None else self._exchange.header(name)


def _text(raw: Raw) -> str:
    return _STRING.decode(raw)


def _stream_options(raw: Raw) -> StreamOptions:
    fields = _fields_of(raw)
    switches = {name: fields[name] for name in StreamOptions.__struct_fields__ if name in fields}
    given = {name: lax_bool(value) for name, value in switches.items() if not _is_null(value)}
    return StreamOptions(**given)


# The routed fields, and who reads them: as vLLM does, so that the worker finds in them what the orchestrator
# found. A wrong type is refused here, and so is a field given twice: the two must not read two different
# values out of one document. `null` is taken everywhere, and means that the field is not there.
ROUTED: Final[dict[str, Callable[[Raw], Any]]] = {
    "model": _text,
    "stream": lax_bool,
    "stream_options": _stream_options,
    "max_tokens": lax_int,
    "max_completion_tokens": lax_int,
    "echo": lax_bool,
    "use_beam_search": lax_bool,
    "prompt_logprobs": lax_int,
}
# vLLM's completions do not know it, so it may say anything there.
_OF_CHATS: Final = frozenset({"max_completion_tokens"})
# Routed on by presence or shape; nobody here decodes their values.
BY_SHAPE: Final = frozenset({"prompt", "prompt_embeds", "kv_transfer_params", "ec_transfer_params"})

# A worker connects to whatever host these name, and its engine dies of values that it does not expect: they
# are never taken from a client. A leg leaves out those of the top level, the view those in `_CARRIERS`.
TRANSFER_FIELDS: Final = frozenset({"kv_transfer_params", "ec_transfer_params"})

# Objects whose entries become arguments of vLLM's sampling (0.32), among which the transfer fields are, too:
# `vllm_xargs` of all its OpenAI endpoints, `extra_args` of the sampling parameters that others take.
_ARGUMENTS: Final = frozenset({"vllm_xargs", "extra_args"})
_CARRIERS: Final = _ARGUMENTS | frozenset({"sampling_params"})
_NO_NAMES: Final[frozenset[str]] = frozenset()

# What makes an embedding's form; see `orchestrator.api.embeddings`.
EMBEDDING_FORM: Final = frozenset({"encoding_format", "embed_dtype", "endianness"})

# Fields in which a request's legs differ, or that a leg changes; all others are common to them.
OWN: Final = EMBEDDING_FORM | frozenset(
    {
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "min_tokens",
        "n",
        "best_of",
        "stop",
        "stop_token_ids",
        "stop_sequences",
        "store",
        "background",
        "request_id",
        "ignore_eos",
        "return_token_ids",
        "kv_transfer_params",
        "ec_transfer_params",
    }
)

# Fields that are looked at where they are there: all but the carriers can make a hand-off impossible, next to
# a limit of no tokens. Most requests have none of them.
_LOOKED_AT: Final = _CARRIERS | frozenset(
    {"use_beam_search", "prompt_logprobs", "echo", "prompt_embeds", "prompt"}
)

_ALL_ROUTED: Final = frozenset(ROUTED) | BY_SHAPE
_json: Final = msgspec.json.Encoder()
_TOP_LEVEL: Final = msgspec.json.Decoder(dict[str, Raw])
_ROUTED_OWN: Final = msgspec.json.Decoder(RoutedOwn)
_ONLY_ONE: Final = msgspec.json.Decoder(tuple[Raw])  # gives up at a second one
_LIST: Final = msgspec.json.Decoder(list[Raw])
_IDS: Final = msgspec.json.Decoder(list[int])
_EMPTY: Final = Raw(b"{}")
_BRACKET: Final = ord("[")
_STRING: Final = msgspec.json.Decoder(str)
_LITERALS: Final = tuple(f'"{name}"'.encode() for name in _ALL_ROUTED)
_SMALL: Final = 8192  # bytes; above, looking at every key costs less than looking for a dozen names
_WHITESPACE: Final = b" \t\n\r"
_IS: Final = "the request body is "


def view_request(body: bytes, exchange: Exchange | None = None) -> RequestView:
    """Read the routing fields of an OpenAI request, whose headers `exchange` has.

    Raises `InvalidRequest` for anything that is not one JSON object in UTF-8, for one that is nested too
    deeply (`wire/depth.py`), for a routed field of the wrong type, and for one given twice (also when its
    name is spelt with escapes). What Python's parser takes beside JSON is taken as well: a BOM, NaN,
    infinities. A prompt that is a list of one is unwrapped, because the KV cache of one prompt can be handed
    over. Transfer fields are left out of arguments for vLLM's sampling.
    """
    size = len(body)
    is_small = size <= _SMALL
    fields = _decode_top_level(body, is_small=is_small)
    if size > SHALLOW_BYTES and (not is_small or body.count(b"[") + body.count(b"{") > MAX_DEPTH):
        _refuse_nesting(body, fields)
    shared = dict(fields)
    own = {name: shared.pop(name) for name in OWN.intersection(fields)}
    common: Parts = (_json.encode(shared),) if is_small else json_object(shared)
    own_json = _json.encode(own)
    routed = _decode_routed(own_json, own, shared)
    if is_small and size != _compact_length(len(common[0]), len(own_json)):
        _refuse_duplicates(body)
    whole_reason = None
    if not _LOOKED_AT.isdisjoint(shared):
        common, whole_reason = _look_closer(common, shared)
    if routed.max_tokens == 0 or (routed.max_completion_tokens == 0 and "messages" in shared):
        whole_reason = "no token asked for"
    options, limit = routed.stream_options, routed.max_completion_tokens or routed.max_tokens or 0
    has_stray_options = options is not None and not routed.stream and own["stream_options"] != _EMPTY
    is_judged = not JUDGED.isdisjoint(own)
    return RequestView(
        shared,
        common,
        own,
        own_json,
        routed.model or "",
        bool(routed.stream),
        options is not None and bool(options.include_usage),
        whole_reason,
        exchange,
        limit,
        limit < 0 or has_stray_options or (is_judged and is_refusable(own_json, shared)),
        len(fields),
    )


def _count_of(value: Raw | None) -> int:
    """Return the number that a field has, in whichever of the ways that vLLM takes; 0 if it has none."""
    if value is None or _is_null(value):
        return 1
    try:
        return max(0, lax_int(value))
    except ValueError:
        return 0


def _prompts_in(shared: Mapping[str, Raw]) -> int:
    """Return how many prompts a completion has; a chat is one. 0 if that is not clear."""
    prompt = shared.get("prompt")
    if "prompt_embeds" in shared:
        return 0
    if prompt is None or memoryview(prompt)[0] != _BRACKET:
        return 1
    listed = _LIST.decode(prompt)
    return len(listed) if listed and memoryview(listed[0])[0] in b'"[' else 1


def _refuse_nesting(body: bytes, fields: Mapping[str, Raw]) -> None:
    fault = nesting_fault(body, fields)
    if fault is not None:
        raise InvalidRequest(_IS + fault)


def _decode_top_level(body: bytes, *, is_small: bool, is_strict: bool = False) -> dict[str, Raw]:
    """Decode the top level, key by key unless the body is small. `is_strict`: nothing but JSON is taken."""
    if not body:
        raise InvalidRequest("the request body is empty")
    try:
        if not body.isascii():
            str(body, "utf-8")  # Raw values are not checked by the decoder
        return _TOP_LEVEL.decode(body) if is_small else _decode_key_by_key(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the request body is not valid UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise InvalidRequest(_IS + TOO_DEEP) from error
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidRequest):
            raise error.__cause__ from None
        raise InvalidRequest("the request body must be a JSON object") from error
    except msgspec.DecodeError as error:
        fields = None if is_strict else _decode_pythons(body)
        if fields is None:
            raise InvalidRequest(_lone_surrogate(body) or f"{_IS}not valid JSON: {error}") from error
        return fields


# What stands for one character in a JSON string: a backslash, a surrogate pair, and half of one.
_SURROGATES: Final = re.compile(
    rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)


def _lone_surrogate(body: bytes) -> str | None:
    """Say where half of a surrogate pair is in a document that is refused; None if there is none."""
    for found in _SURROGATES.finditer(body):
        if found[1] is not None:
            half, at = found[1].decode(), found.start()
            return f"the request body has half of a surrogate pair, {half}, which is no text (byte {at})"
    return None


def _decode_routed(own_json: bytes, own: Mapping[str, Raw], shared: Mapping[str, Raw]) -> RoutedOwn:
    """Return the routed fields among `OWN`, None for those that are not there."""
    try:
        return _ROUTED_OWN.decode(own_json)
    except msgspec.DecodeError:  # another spelling of what is meant, or wrong; or there is a NaN in a field
        unread = _OF_CHATS if "messages" not in shared else _NO_NAMES
        names = [name for name in own if name in ROUTED and name not in unread]
        return RoutedOwn(**{name: _decode_field(name, own[name]) for name in names})


def _decode_field(name: str, raw: Raw) -> Any:
    if _is_null(raw):
        return None
    try:
        return ROUTED[name](raw)
    except (ValueError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"the field '{name}' is wrong: {error}", name) from error


# --- what Python's parser takes beside JSON -----------------------------------------------------

_BOM: Final = b"\xef\xbb\xbf"
_MOST_QUOTES: Final = 200_000  # 20 ms of looking for constants; a chat of 10,000 messages has as many
# Strings that stand for constants while a document is decoded. Nobody else can know them.
_MARK: Final = secrets.token_hex(16).encode()
_MARKS: Final = [
    (name, b'"%b%d"' % (_MARK, at)) for at, name in enumerate((b"-Infinity", b"Infinity", b"NaN"))
]


def _decode_pythons(body: bytes) -> dict[str, Raw] | None:
    """Decode the top level of what is no JSON, but what Python's `json` writes or reads; None if it is not.

    Raises `InvalidRequest` for what would be refused in JSON, too.
    """
    document = _with_marks(body.removeprefix(_BOM))
    if len(document) == len(body):
        return None
    fields = _decode_top_level(document, is_small=False, is_strict=True)
    return {name: _unmarked(raw) for name, raw in fields.items()}


def _fields_of(raw: Raw) -> dict[str, Raw]:
    """Decode one level of a value, as `_decode_pythons` does. Raises `DecodeError` as msgspec does."""
    value = bytes(raw)
    try:
        return _decode_key_by_key(value, _NO_NAMES)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        fields = _decode_key_by_key(_with_marks(value), _NO_NAMES)
        return {name: _unmarked(field) for name, field in fields.items()}


def _with_marks(document: bytes) -> bytes:
    """Put strings in the place of constants, so that the document is JSON."""
    has_some = b"NaN" in document or b"Infinity" in document
    if not has_some or b"\0" in document or document.count(b'"') > _MOST_QUOTES:
        return document
    has_escapes = b"\\" in document
    if has_escapes:  # hidden, so that each quote begins a string or ends one
        document = document.replace(b"\\\\", b"\0\0").replace(b'\\"', b"\0\1")
    pieces = document.split(b'"')
    pieces[::2] = [_marked(piece) for piece in pieces[::2]]
    marked = b'"'.join(pieces)
    return marked.replace(b"\0\1", b'\\"').replace(b"\0\0", b"\\\\") if has_escapes else marked


def _marked(piece: bytes) -> bytes:
    for name, mark in _MARKS:
        piece = piece.replace(name, mark)
    return piece


def _unmarked(raw: Raw) -> Raw:
    value = bytes(raw)
    if _MARK not in value:
        return raw
    for name, mark in _MARKS:
        value = value.replace(mark, name)
    return Raw(value)


# --- one value per field ------------------------------------------------------------------------


def _compact_length(common: int, own: int) -> int:
    """Return the length of the document if it is written without white space, needless escapes and
    duplicates.

    Each of these can only make the real document longer, so one of this length has none of them. `common`
    and `own` are the lengths of its two halves as objects.
    """
    return common + own - 1 if common > 2 else own


def _refuse_duplicates(body: bytes) -> None:
    """Raise `InvalidRequest` if a routed field occurs twice in a small body."""
    # No name occurs twice as a literal, and none can hide behind an escape.
    if b"\\u" in body or any(body.count(literal) > 1 for literal in _LITERALS):
        _decode_top_level(body, is_small=False)


class _Key:
    """The decoder shows us a key once per occurrence."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _KeyReader:
    """It sees every key as the decoder comes to it; raises `InvalidRequest`. Of others the last wins."""

    def __init__(self, once: frozenset[str]) -> None:
        """`once` has the names that must not occur twice."""
        self._once = once
        self._count = 0
        self._seen: set[str] = set()

    def __call__(self, _kind: type, key: str) -> _Key:
        self._count += 1
        if self._count > MAX_FIELDS:
            raise InvalidRequest(f"the request body has more than {MAX_FIELDS} fields")
        if key in self._once:
            if key in self._seen:
                raise InvalidRequest(f"the field '{key}' is given twice", key)
            self._seen.add(key)
        return _Key(key)


def _decode_key_by_key(body: bytes, once: frozenset[str] = _ALL_ROUTED) -> dict[str, Raw]:
    """Decode one level, and give up at the first mistake: a large body can have a million fields.

    `ValidationError` if it is no object, and with an `InvalidRequest` as its cause.
    """
    fields = msgspec.json.decode(body, type=dict[_Key, Raw], dec_hook=_KeyReader(once))
    return {key.name: raw for key, raw in fields.items()}


# --- what cannot be handed over -----------------------------------------------------------------


def _look_closer(common: Parts, shared: dict[str, Raw]) -> tuple[Parts, str | None]:
    """Return the common part with a prompt that is a list of one unwrapped, and without transfer fields; and
    why no hand-off is possible, if so.
    """
    mended = {
        name: _without_transfer(name, shared[name], _ARGUMENTS) for name in _CARRIERS.intersection(shared)
    }
    if "prompt" in shared:
        mended["prompt"] = _unwrap_single(shared["prompt"])
    if any(value is not shared[name] for name, value in mended.items()):
        shared.update(mended)
        common = json_object(shared)
    return common, _whole_reason(shared)


def _whole_reason(shared: Mapping[str, Raw]) -> str | None:
    """Return why this request must be served by one worker; with a hand-off it would be answered wrongly."""
    routed = {name: _decode_field(name, shared[name]) for name in ROUTED.keys() & shared.keys()}
    if routed.get("use_beam_search"):
        return "beam search"
    if routed.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    if routed.get("echo"):
        return "echo"
    if "prompt_embeds" in shared and not _is_null(shared["prompt_embeds"]):
        return "prompt_embeds"
    if "prompt" in shared and _holds_several_prompts(shared["prompt"]):
        return "several prompts"
    return None


def _is_null(raw: Raw) -> bool:
    return len(raw) == 4 and bytes(raw) == b"null"


def _first_inside(raw: Raw) -> bytes:
    """Return the first byte inside an array that is not white space; b"" if the value is no array."""
    view = memoryview(raw)
    if view[0] != _BRACKET:
        return b""
    start = bytes(view[1:64]).lstrip(_WHITESPACE)[:1]
    return start or bytes(view[1:]).lstrip(_WHITESPACE)[:1]  # a copy of the prompt, for one that begins so


def _holds_several_prompts(prompt: Raw) -> bool:
    """Tell whether these are several strings or several lists of ids. A list of numbers is one prompt of
    token ids.
    """
    return _first_inside(prompt) in (b'"', b"[", b"]")


def _unwrap_single(prompt: Raw) -> Raw:
    """Return the prompt in a list of one; if that is empty, the list, which workers refuse in other words."""
    if _first_inside(prompt) not in (b'"', b"["):
        return prompt
    try:
        (single,) = _ONLY_ONE.decode(prompt)
    except msgspec.DecodeError:  # several, or a NaN among them
        return prompt
    is_empty = single == _EMPTY_TEXT or _first_inside(single) == b"]"
    return prompt if is_empty else single


_EMPTY_TEXT: Final = Raw(b'""')

# --- what only workers may say ------------------------------------------------------------------


def _without_transfer(name: str, raw: Raw, inner: frozenset[str]) -> Raw:
    """Return the value of a field without the transfer fields, which may be in entries named `inner` as well;
    itself if it has none. What is no object is not the worker's arguments, but a text that holds one may be.

    Raises `InvalidRequest` if the object cannot be read.
    """
    value = bytes(raw)
    mend = _WITHOUT_TRANSFER.get(value[:1])
    if mend is None or (b"_transfer_params" not in value and b"\\" not in value):
        return raw
    try:
        return mend(raw, inner)
    except (msgspec.DecodeError, RecursionError) as error:
        if isinstance(error.__cause__, InvalidRequest):
            raise error.__cause__ from None
        raise InvalidRequest(f"the field '{name}' cannot be read", name) from error


def _object_without_transfer(raw: Raw, inner: frozenset[str]) -> Raw:
    fields = _fields_of(raw)
    kept = {name: raw for name, raw in fields.items() if name not in TRANSFER_FIELDS}
    mended = {name: _without_transfer(name, kept[name], _NO_NAMES) for name in inner.intersection(kept)}
    if len(kept) == len(fields) and all(value is kept[name] for name, value in mended.items()):
        return raw
    return Raw(_json.encode({**kept, **mended}))


def _text_without_transfer(raw: Raw, inner: frozenset[str]) -> Raw:
    """Mend a string that is itself JSON, as forms have it."""
    text = _STRING.decode(raw)
    if not text.lstrip().startswith("{"):
        return raw
    held = Raw(text.strip().encode())
    mended = _object_without_transfer(held, inner)
    return raw if mended is held else Raw(_json.encode(bytes(mended).decode()))


_WITHOUT_TRANSFER: Final = {b"{": _object_without_transfer, b'"': _text_without_transfer}
