"""A worker costs next to nothing if it answers at once from constants: then a benchmark times the router.

    python -m bench.shared.mock_worker --port 9001

POST with `do_remote_decode` in the body: a prefill answer with `kv_transfer_params`. POST with
`"stream":true`: a stream of events. Any other POST: a chat completion. GET: health, the model list, and what
it announces to Baton; at /mock/counts what it has answered.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import httptools
import uvloop

from bench.shared.command import parser

MODEL = "mock"


def _response(body: bytes, content_type: bytes = b"application/json", status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
    return head % (status, content_type, len(body)) + body


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
DECODE = _response(COMPLETION % (CHOICE, USAGE, b""))
PREFILL = _response(COMPLETION % (CHOICE, USAGE, b',"kv_transfer_params":' + KV))
MODELS = _response(b'{"object":"list","data":[{"id":"mock","object":"model","max_model_len":131072}]}')
HEALTH = _response(b"")
INFO = _response(
    b'{"role":"both","model":"mock","decodes":["json","orjson","msgpack"],"engine":"mock","engine_version":"1"}'
)
SERVER_INFO = _response(b'{"served_model_name":"mock"}')  # where sglang-router looks for the model's name
PAGES = {b"/health": HEALTH, b"/v1/models": MODELS, b"/baton/info": INFO, b"/server_info": SERVER_INFO}
NOT_FOUND = _response(b'{"detail":"Not Found"}', status=b"404 Not Found")

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = _chunk(
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"mock",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)
STREAM_END = (
    _chunk(
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"mock",'
        b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
    )
    + _chunk(b'data: {"id":"chatcmpl-1","choices":[],"usage":%s}\n\n' % USAGE)
    + _chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)

# As JSON with or without spaces, or as msgpack.
PREFILL_MARK = re.compile(rb'"do_remote_decode": ?true|do_remote_decode\xc3')
STREAM_MARK = re.compile(rb'"stream": ?true|stream\xc3')


@dataclass
class Counts:
    """A worker has sent so many answers to POST, streams among them, and events of streams."""

    requests: int = 0
    events: int = 0


class MockWorker(asyncio.Protocol):
    """A connection answers; a stream has `events`, with `gap_s` between them."""

    def __init__(self, events: int, gap_s: float, counts: Counts) -> None:
        self._events = events
        self._gap_s = gap_s
        self._counts = counts
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body: list[bytes] = []
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body, self._body = b"".join(self._body), []
        if self._parser.get_method() == b"GET":
            self._transport.write(self._page())
            return
        self._counts.requests += 1
        if _holds(body, PREFILL_MARK):
            self._transport.write(PREFILL)
        elif _holds(body, STREAM_MARK):
            self._transport.write(STREAM_HEAD)
            self._next_event(self._events)
        else:
            self._transport.write(DECODE)

    def _page(self) -> bytes:
        if self._path == b"/mock/counts":
            return _response(json.dumps(asdict(self._counts)).encode())
        return PAGES.get(self._path, NOT_FOUND)

    def _next_event(self, left: int) -> None:
        if self._transport.is_closing():
            return
        if not left:
            self._transport.write(STREAM_END)
            return
        self._transport.write(EVENT)
        self._counts.events += 1
        if self._gap_s:
            self._loop.call_later(self._gap_s, self._next_event, left - 1)
        else:
            self._next_event(left - 1)


def _holds(body: bytes, mark: re.Pattern[bytes]) -> bool:
    """Routers put what they add at the end of the body or at its start; the middle is the client's text."""
    return bool(mark.search(body, max(0, len(body) - 2048)) or mark.search(body, 0, 2048))


async def serve(port: int, events: int, gap_s: float) -> None:
    loop = asyncio.get_running_loop()
    counts = Counts()
    server = await loop.create_server(
        lambda: MockWorker(events, gap_s, counts), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--events", type=int, default=64, help="events per stream")
    options.add_argument("--gap-ms", type=float, default=0.0, help="time between events")
    given = options.parse_args()
    uvloop.run(serve(given.port, given.events, given.gap_ms / 1e3))
