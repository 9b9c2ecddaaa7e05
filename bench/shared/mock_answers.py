"""What mock workers answer: constants, in HTTP, in the frames of a shared connection, and what they look for.

The bodies are the same in both forms. A stream is a head, events, and an end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from orchestrator.wire.headers import header_block
from orchestrator.wire.streams import DATA, END, HEAD, U16, frame

MODEL = "mock"
OK = 200
NOT_FOUND_STATUS = 404
_REASONS = {OK: b"OK", NOT_FOUND_STATUS: b"Not Found"}


@dataclass(frozen=True)
class Whole:
    """An answer whose body is known when it begins."""

    body: bytes
    status: int = OK
    content_type: bytes = b"application/json"

    @cached_property
    def http(self) -> bytes:
        fields = self._fields
        return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (self.status, _REASONS[self.status], fields, self.body)

    def frames(self, stream: int) -> bytes:
        """Return both frames. The body must fit into one."""
        head = frame(HEAD, stream, U16.pack(self.status) + self._fields)
        return head + frame(DATA | END, stream, self.body)

    @cached_property
    def _fields(self) -> bytes:
        length = str(len(self.body)).encode()
        return header_block([(b"content-type", self.content_type), (b"content-length", length)])


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


USAGE = (
    b'{"prompt_tokens":21,"total_tokens":29,"completion_tokens":8,'
    b'"prompt_tokens_details":{"cached_tokens":21}}'
)
KV = (
    b'{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2,3]],"remote_engine_id":"mock",'
    b'"remote_request_id":"mock-1","remote_host":"127.0.0.1","remote_port":5600,"tp_size":1,'
    b'"remote_num_tokens":21,"transfer_mode":"pull","remote_prefill_cached_tokens":0}'
)
CHOICE = (
    b'{"index":0,"message":{"role":"assistant","content":"An answer of some eight tokens, always the same."},'
    b'"logprobs":null,"finish_reason":"stop"}'
)
COMPLETION = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"mock","choices":[%s],"usage":%s%s}'
)
DECODED = Whole(COMPLETION % (CHOICE, USAGE, b""))
PREFILLED = Whole(COMPLETION % (CHOICE, USAGE, b',"kv_transfer_params":' + KV))
_MODELS = Whole(b'{"object":"list","data":[{"id":"mock","object":"model","max_model_len":131072}]}')
_INFO = Whole(
    b'{"role":"both","model":"mock","decodes":["json","orjson","msgpack"],"engine":"mock","engine_version":"1",'
    b'"streams":["http","mux"]}'
)
_SERVER_INFO = Whole(b'{"served_model_name":"mock"}')  # where sglang-router looks for the model's name
_PAGES = {
    b"/health": Whole(b""),
    b"/v1/models": _MODELS,
    b"/baton/info": _INFO,
    b"/server_info": _SERVER_INFO,
}
_NOT_FOUND = Whole(b'{"detail":"Not Found"}', status=NOT_FOUND_STATUS)

DECODE, PREFILL = DECODED.http, PREFILLED.http

_STREAM_TYPE = b"text/event-stream; charset=utf-8"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n\r\n" % _STREAM_TYPE
STREAM_FIELDS = U16.pack(OK) + header_block([(b"content-type", _STREAM_TYPE)])
EVENT_BODY = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"mock",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)
END_BODIES = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"mock",'
    b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n',
    b'data: {"id":"chatcmpl-1","choices":[],"usage":%s}\n\n' % USAGE,
    b"data: [DONE]\n\n",
)
EVENT = _chunk(EVENT_BODY)
STREAM_END = b"".join(map(_chunk, END_BODIES)) + b"0\r\n\r\n"

# As JSON with or without spaces, or as msgpack.
PREFILL_MARK = re.compile(rb'"do_remote_decode": ?true|do_remote_decode\xc3')
STREAM_MARK = re.compile(rb'"stream": ?true|stream\xc3')


def page(path: bytes) -> Whole:
    """Return what GET is answered with."""
    return _PAGES.get(path, _NOT_FOUND)


def answer_to(body: bytes) -> Whole | None:
    """Return what POST is answered with; None: with a stream."""
    if _holds(body, PREFILL_MARK):
        return PREFILLED
    return None if _holds(body, STREAM_MARK) else DECODED


def _holds(body: bytes, mark: re.Pattern[bytes]) -> bool:
    """Routers put what they add at the end of the body or at its start; the middle is the client's text."""
    return bool(mark.search(body, max(0, len(body) - 2048)) or mark.search(body, 0, 2048))
