"""An API server of Kubernetes for one resource: EndpointSlices, as they are listed and watched.

It has what the real one has and what surprises clients of it: versions, pages, bookmarks, a history that is
compacted (410, as a status and in the middle of a watch), watches that end by themselves, are cut in the
middle of a line, stand still, or never tell of a deletion.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx

GROUP = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"
Json = dict[str, Any]
PIECE = 1400  # bytes in which the server sends what is larger


def endpoint(
    address: str,
    uid: str,
    name: str | None = None,
    *,
    ready: bool | None = True,
    serving: bool | None = None,
    terminating: bool | None = None,
    zone: str | None = None,
) -> Json:
    conditions = {"ready": ready, "serving": serving, "terminating": terminating}
    made: Json = {
        "addresses": [address],
        "conditions": {key: value for key, value in conditions.items() if value is not None},
        "targetRef": {"kind": "Pod", "name": name or f"pod-{uid}", "uid": uid, "namespace": "team"},
    }
    return made if zone is None else {**made, "zone": zone}


class _Watch:
    """A watch has its place in the history, and a way to be ended."""

    def __init__(self, version: int) -> None:
        self.version = version  # what was told
        self.is_still = False
        self.cut: str | None = None  # how: "", "mid-line"
        self.changed = asyncio.Event()

    def wake(self) -> None:
        self.changed.set()


class FakeKubernetes:
    """It is used in memory, by `transport`, or over sockets, by `listening`."""

    def __init__(self, service: str = "workers", namespace: str = "team", port: int = 8000) -> None:
        self.service = service
        self.namespace = namespace
        self.ports: list[Json] = [{"name": "http", "port": port, "protocol": "TCP"}]
        self.version = 100
        self.slices: dict[str, Json] = {}
        self.history: list[tuple[int, str, Json]] = []
        self.compacted = 100  # watches from before are refused
        self.away: Exception | int | None = None  # what every question gets instead
        self.headers: dict[str, str] = {}  # of such an answer
        self.page = 500  # slices in a part of a list, at most
        self.repeats = False  # each event is told twice
        self.token: str | None = None  # that must be shown
        self.lists = 0
        self.watches: list[_Watch] = []
        self.begun = 0  # watches, ever
        self.tokens: list[str] = []  # that were shown
        self._connections: set[asyncio.Task[Any]] = set()
        self._lost: set[int] = set()  # versions that watches never tell of

    # --- what the cluster does ------------------------------------------------------------------

    def put(
        self, name: str, *endpoints: Json, family: str = "IPv4", is_told: bool = True, **more: Any
    ) -> None:
        """Add or change a slice."""
        kind = "MODIFIED" if name in self.slices else "ADDED"
        document = {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": self.service}},
            "addressType": family,
            "endpoints": list(endpoints) or None,
            "ports": self.ports,
            **more,
        }
        self.slices[name] = document
        self._note(kind, document, is_told=is_told)

    def delete(self, name: str, *, is_told: bool = True) -> None:
        self._note("DELETED", self.slices.pop(name), is_told=is_told)

    def _note(self, kind: str, document: Json, *, is_told: bool) -> None:
        self.version += 1
        document["metadata"] = {**document["metadata"], "resourceVersion": str(self.version)}
        if not is_told:
            self._lost.add(self.version)
        self.history.append((self.version, kind, json.loads(json.dumps(document))))
        self._wake()

    def bookmark(self) -> None:
        self.version += 1
        document = {"metadata": {"name": "", "resourceVersion": str(self.version)}}
        self.history.append((self.version, "BOOKMARK", document))
        self._wake()

    def compact(self) -> None:
        """Forget the history: watches that have not been told all of it get 410."""
        self.compacted = self.version
        self.history.clear()
        self._wake()

    def tell(self, line: bytes) -> None:
        """Have all watches told this, whatever it is."""
        for watch in self.watches:
            watch.cut = line.decode("latin-1")
        self._wake()

    def cut(self, how: str = "") -> None:
        """End all watches: in order, or with a part of a line."""
        for watch in self.watches:
            watch.cut = how
        self._wake()

    def hold(self, *, is_still: bool = True) -> None:
        """Have watches stand still, or go on."""
        for watch in self.watches:
            watch.is_still = is_still
        self._wake()

    def _wake(self) -> None:
        for watch in self.watches:
            watch.wake()

    def addresses(self) -> dict[str, str]:
        """Return what a client should have: the address of each endpoint that serves, by uid."""
        return {
            each["targetRef"]["uid"]: each["addresses"][0]
            for found in self.slices.values()
            for each in found["endpoints"] or ()
        }

    # --- what it answers ------------------------------------------------------------------------

    async def respond(
        self, target: str, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], AsyncGenerator[bytes, None]]:
        """Answer a GET: status, head and body, whose iterator ends or raises as the connection does."""
        if isinstance(self.away, Exception):
            raise self.away
        if self.away is not None:
            return self.away, self.headers, _whole({"kind": "Status", "message": "not now"})
        self.tokens.append(headers.get("authorization", "").removeprefix("Bearer "))
        if self.token is not None and self.tokens[-1] != self.token:
            return 401, {}, _whole({"kind": "Status", "message": "Unauthorized"})
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query))
        if parts.path != GROUP.format(self.namespace):
            return 404, {}, _whole({"kind": "Status", "message": "not found"})
        if query.get("watch") not in ("1", "true"):
            return 200, {}, _whole(self._listed(query))
        if int(query["resourceVersion"]) < self.compacted:
            return 410, {}, _whole({"kind": "Status", "code": 410, "message": "too old"})
        return 200, {}, self._watched(query)

    def _selected(self, query: Mapping[str, str]) -> list[Json]:
        wanted = query.get("labelSelector", "").removeprefix("kubernetes.io/service-name=")
        return [found for _, found in sorted(self.slices.items())] if wanted == self.service else []

    def _listed(self, query: Mapping[str, str]) -> Json:
        self.lists += 1
        found, first = self._selected(query), int(query.get("continue", "0"))
        size = min(self.page, int(query["limit"]))
        more = {"continue": str(first + size)} if first + size < len(found) else {}
        metadata = {"resourceVersion": str(self.version), **more}
        return {"kind": "EndpointSliceList", "metadata": metadata, "items": found[first : first + size]}

    async def _watched(self, query: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
        watch = _Watch(int(query["resourceVersion"]))
        self.watches.append(watch)
        self.begun += 1
        try:
            async with asyncio.timeout(float(query["timeoutSeconds"])):
                while True:
                    for line in self._told(watch):
                        yield line
                    if watch.cut is not None:
                        if watch.cut:
                            yield watch.cut.encode("latin-1")
                        if not watch.cut.endswith("\n"):
                            raise ConnectionResetError("the watch was cut")
                        watch.cut = None
                    watch.changed.clear()
                    await watch.changed.wait()
        except TimeoutError:
            return
        finally:
            self.watches.remove(watch)

    def _told(self, watch: _Watch) -> Iterator[bytes]:
        """Yield the lines that are due."""
        if watch.is_still:
            return
        if watch.version < self.compacted:
            status = {"kind": "Status", "code": 410, "message": "too old resource version"}
            yield _line("ERROR", status)
            watch.version = self.version
        for version, kind, document in list(self.history):
            if version > watch.version:
                watch.version = version
                if version not in self._lost:
                    line = _line(kind, document)
                    yield line + line if self.repeats else line

    # --- in memory, and over sockets ------------------------------------------------------------

    def transport(self) -> httpx.AsyncBaseTransport:
        return _Transport(self)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Serve over sockets; yields the URL."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                pairs = (line.partition(": ") for line in lines[1:] if line)
                headers = {name.lower(): value for name, _, value in pairs}
                status, more, body = await self.respond(lines[0].split(" ")[1], headers)
                fields = "".join(f"{name}: {value}\r\n" for name, value in more.items())
                writer.write(f"HTTP/1.1 {status} X\r\n{fields}transfer-encoding: chunked\r\n\r\n".encode())
                async for piece in body:
                    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the server goes
        finally:
            self._connections.discard(task)
            writer.close()


def _line(kind: str, document: Json) -> bytes:
    return json.dumps({"type": kind, "object": document}).encode() + b"\n"


async def _whole(document: Json) -> AsyncGenerator[bytes, None]:
    content = json.dumps(document).encode()
    for start in range(0, len(content), PIECE):
        yield content[start : start + PIECE]


class _Body(httpx.AsyncByteStream):
    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._pieces)
        except OSError as error:
            raise httpx.ReadError(str(error)) from error

    async def aclose(self) -> None:
        await self._pieces.aclose()


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, server: FakeKubernetes) -> None:
        self._server = server

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            status, headers, body = await self._server.respond(
                request.url.raw_path.decode(), {key.lower(): value for key, value in request.headers.items()}
            )
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return httpx.Response(status, headers=headers, stream=_Body(body))
