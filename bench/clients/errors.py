"""What clients' SDKs make of Baton's errors: a server that answers with each of them, in Baton's own bytes.

`docs/clients.md` has the expectations, as tables that are read here: what each error looks like, and which
exception each SDK raises after how many tries.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

from orchestrator import errors
from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.errors import BatonError
from orchestrator.loop.offload import Offload

DOCS = Path(__file__).resolve().parents[2] / "docs/clients.md"
ANSWERS, EXCEPTIONS = "| error | status |", "| error | openai |"  # how the two tables of the docs begin
# Errors that no client is told of: nobody is there to read it, or another one is told in its place.
UNTOLD = frozenset({"client_closed_request", "worker_error", "worker_answered"})
RETRIED, OF_TOKENS, STREAM = ", retried", ", of tokens", " in a stream"
IN_STREAMS = ("worker_cut_short", "deadline_exceeded")

# What a stream begins with, before it breaks.
_FIRST = {
    "/v1/chat/completions": b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"So"},"finish_reason":null}]}\n\n',
    "/v1/messages": b'event: message_start\ndata: {"type":"message_start","message":{"id":"1",'
    b'"type":"message","role":"assistant","model":"m","content":[],"stop_reason":null,"stop_sequence":null,'
    b'"usage":{"input_tokens":1,"output_tokens":1}}}\n\n',
}


def told() -> dict[str, BatonError]:
    """Return one error of each kind that a client may be told of, by what the docs call it."""
    made = [
        BatonError("internal error"),
        errors.ClientError("a wrong field"),
        errors.UnsupportedMediaType("Unsupported Media Type"),
        errors.Unauthorized("the API key is not valid"),
        errors.Forbidden("pages of other sites may not use this listener"),
        errors.MissingScope("the API key has not the scope that this needs"),
        errors.NotFound("nothing is there"),
        errors.UnknownModel("no model 'x'; there is m", param="model"),
        errors.UnknownResponse("resp_1"),
        errors.MethodNotAllowed("use POST"),
        errors.RequestTimeout("the request's body came too slowly"),
        errors.Conflict("it is being removed"),
        errors.BodyTooLarge("the body is over 16 bytes"),
        errors.UriTooLong("the target is too long"),
        errors.UnsupportedEncoding("the body is encoded"),
        errors.Misdirected("not a name of this server"),
        errors.HeadersTooLarge("the head is too large"),
        errors.Unavailable("no worker is ready"),
        errors.Overloaded("the queue is full"),
        errors.ShuttingDown("this server is shutting down"),
        errors.TooManyConnections("all connections are in use"),
        errors.OutOfResources("no descriptor is left"),
        errors.TooBusy("the queue is full"),
        errors.RequestsLimited("this API key may send 60 requests per minute: ask again in 1 s", 1),
        errors.DeadlineExceeded("not answered within 1 s"),
        errors.WorkerGarbage("the worker's answer is not valid HTTP"),
        errors.KvMissing("the KV cache is missing"),
        errors.Poison("2 workers were lost with this request"),
        errors.WorkerUnfit(401),
        errors.WorkerUnreachable("no connection to the worker"),
        errors.WorkerCutShort("the worker closed the connection"),
        errors.UploadLost("the worker was lost in the middle of an upload"),
        errors.HandoffLate("it began after the lease"),
        errors.HandoffStalled("no first byte"),
    ]
    named = {error.code: error for error in made}
    named[errors.TokensLimited.code + OF_TOKENS] = errors.TokensLimited("too many tokens per minute", 1)
    for last in (errors.WorkerUnreachable("no connection"), errors.WorkerCutShort("cut short")):
        last.should_retry = False  # as the flow says of one that it has retried itself
        named[last.code + RETRIED] = last
    return named | {f"the worker's own {status}": _workers(status) for status in (400, 404, 429, 500, 503)}


def _workers(status: int) -> BatonError:
    content = b'{"error":{"message":"no","type":"SomeError","param":null,"code":%d}}' % status
    return errors.WorkerAnswered(status, content)


def codes() -> set[str]:
    """Return the codes of all errors that there are."""

    def below(kind: type[BatonError]) -> Iterator[type[BatonError]]:
        yield kind
        for one in kind.__subclasses__():
            yield from below(one)

    return {kind.code for kind in below(BatonError) if kind.__module__ == errors.__name__}


# --- the docs -----------------------------------------------------------------------------------


def table(begin: str) -> dict[str, dict[str, str]]:
    """Read the table of the docs whose first line begins so: its cells by row and column. One row may be
    about several errors.
    """
    lines = DOCS.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(begin))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    head, _, *body = (list(map(_plain, line.strip("|").split("|"))) for line in rows)
    return {
        name.strip(): dict(zip(head, cells, strict=True)) for cells in body for name in cells[0].split(";")
    }


def _plain(cell: str) -> str:
    return cell.strip().replace("`", "")


# --- the server ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """At `url` every request is answered with one error, or with a stream that begins and ends with it."""

    name: str
    url: str
    in_stream: bool


@dataclass(frozen=True)
class Stub:
    """A server of all cases. It counts requests, by the case's name."""

    cases: list[Case]
    tries: Counter[str]


@contextmanager
def serving() -> Iterator[Stub]:
    """Serve until the block ends."""
    with _Server() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield Stub(server.cases(), server.tries)
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # an SDK is asked for all cases at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoints = {path: ENDPOINTS[path](Offload()) for path in _FIRST}
        self.told = told()
        self.names = [*self.told, *(code + STREAM for code in IN_STREAMS)]
        self.tries: Counter[str] = Counter()
        self.lock = Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients cut their connections when they end."""

    def cases(self) -> list[Case]:
        url = f"http://127.0.0.1:{self.server_port}"
        return [Case(name, f"{url}/{index}", name.endswith(STREAM)) for index, name in enumerate(self.names)]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        _, index, path = self.path.split("/", 2)
        name = self.server.names[int(index)]
        with self.server.lock:
            self.server.tries[name] += 1
        self._tell(name, f"/{path}")

    def _tell(self, name: str, path: str) -> None:
        error = self.server.told[name.removesuffix(STREAM)]
        endpoint = self.server.endpoints[path]
        if name.endswith(STREAM):
            body = _FIRST[path] + endpoint.error_event(error)
            self._answer(200, [(b"content-type", b"text/event-stream")], body)
        else:
            self._answer(error.status, *endpoint.error(error))

    def _answer(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name.decode(), value.decode())
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
