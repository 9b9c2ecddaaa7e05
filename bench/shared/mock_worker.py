"""A worker costs next to nothing if it answers at once from constants: then a benchmark times the router.

    python -m bench.shared.mock_worker --port 9001

POST with `do_remote_decode` in the body: a prefill answer with `kv_transfer_params`. POST with
`"stream":true`: a stream of events. Any other POST: a chat completion. GET: health, the model list, and what
it announces to Baton; at /mock/counts what it has answered. A connection may be upgraded, and then carries
many requests at once.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

import httptools
import uvloop

from bench.shared.command import parser
from bench.shared.mock_answers import EVENT, STREAM_END, STREAM_HEAD, Whole, answer_to, page
from bench.shared.mock_steps import Counts, MockStream, Steps
from bench.shared.mock_streams import MockStreams, check_fits
from orchestrator.wire.streams import UPGRADE_PATH


class MockWorker(asyncio.Protocol, MockStream):
    """A connection answers one request after the other; it may have one stream at a time."""

    def __init__(self, steps: Steps, counts: Counts) -> None:
        self._steps = steps
        self._counts = counts
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            MockStreams(self._transport, self._steps, self._counts)

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body, self._body = b"".join(self._body), []
        if self._path == UPGRADE_PATH.encode():
            return
        if self._parser.get_method() == b"GET":
            self._transport.write(self._page().http)
            return
        self._counts.requests += 1
        if (whole := answer_to(body)) is not None:
            self._transport.write(whole.http)
        else:
            self._transport.write(STREAM_HEAD)
            self._steps.begin(self)

    def _page(self) -> Whole:
        if self._path == b"/mock/counts":
            return Whole(json.dumps(asdict(self._counts)).encode())
        return page(self._path)

    def is_wanted(self) -> bool:
        return not self._transport.is_closing()

    def send_event(self) -> None:
        self._transport.write(EVENT)

    def send_end(self) -> None:
        self._transport.write(STREAM_END)


async def serve(port: int, events: int, gap_s: float) -> None:
    loop = asyncio.get_running_loop()
    counts = Counts()
    steps = Steps(events, gap_s, counts)
    server = await loop.create_server(lambda: MockWorker(steps, counts), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--events", type=int, default=64, help="events per stream")
    options.add_argument("--gap-ms", type=float, default=0.0, help="time between steps: an event per stream")
    given = options.parse_args()
    check_fits(given.events)
    uvloop.run(serve(given.port, given.events, given.gap_ms / 1e3))
