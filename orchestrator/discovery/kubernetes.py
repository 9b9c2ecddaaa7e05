"""Workers are the pods of a Service of Kubernetes: its EndpointSlices are listed, and then watched.

A watch tells of changes only while it lasts: what is deleted while it is cut, it never tells. So after every
end of a watch, whatever has ended it, all is listed again, and a watch lasts half a minute at most: whatever
it may have missed shows by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, NoReturn, cast

import httpx
import msgspec

from orchestrator.config.options import DiscoverConfig, KubernetesConfig, join_address
from orchestrator.discovery.base import PoolKey, Source, SourceAway, Take
from orchestrator.discovery.slices import SliceError, Slices, decode_slice
from orchestrator.wire.member import MAX_FILE_BYTES, MemberSet, Problem
from orchestrator.wire.regular import read_regular
from orchestrator.workers.troubles import trouble_of

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # in every pod that may have a token
HOST_ENV, PORT_ENV = "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"
OUTSIDE: Final = (
    f"{HOST_ENV} is not set, so this orchestrator runs in no pod of a cluster: give discover.kubernetes.url"
)

LIST_S: Final = 10.0  # until a list has come
CONNECT_S: Final = 5.0
WATCH_S: Final = 30.0  # how long a watch is asked for
JITTER: Final = 0.2  # of that: replicas that started together do not all list at once
LATE_S: Final = 5.0  # how much longer than asked for a watch may be silent; a live one has ended by then
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5  # from a watch that was cut soon to the next list
STABLE_S: Final = 1.0  # a watch that has lasted so long was not cut soon
PAGE: Final = 500  # slices in a part of a list
MAX_PAGES: Final = 100
MAX_LIST_BYTES: Final = 32 * 1024 * 1024  # of a part
MAX_LINE_BYTES: Final = 8 * 1024 * 1024  # of a watch: etcd takes no object above 1.5 MiB
MAX_TEXT: Final = 200  # characters of what the API server says


def kubernetes_source(config: DiscoverConfig, pools: Sequence[PoolKey], random: Random) -> Source:
    assert config.kubernetes is not None  # noqa: S101  # for the type checker
    return KubernetesSource(config.kubernetes, pools, random)


@dataclass(frozen=True, slots=True)
class Api:
    """Where the API server is, and what it must be shown."""

    url: str
    namespace: str
    headers: Mapping[str, str]
    tls: ssl.SSLContext | bool


class KubernetesSource(Source):
    """It has one connection to the API server, on which it lists and watches the slices of one Service."""

    def __init__(
        self,
        config: KubernetesConfig,
        pools: Sequence[PoolKey],
        random: Random,
        *,
        account: Path = ACCOUNT,
        environ: Mapping[str, str] = os.environ,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`account` is the folder of the service account's files. A test's `transport` stands in for the
        network.
        """
        self._config = config
        self._random = random
        self._account = account
        self._environ = environ
        self._transport = transport
        self._slices = Slices(config.port, pools)
        self._pause_s = FIRST_PAUSE_S

    async def watch(self, take: Take) -> NoReturn:
        api = find_api(self._config, self._account, self._environ)
        async with self._client(api) as client:
            while True:
                with _away(api):
                    version = await self._list(client, api)
                take(self._found(api))
                began = asyncio.get_running_loop().time()
                with contextlib.suppress(_Cut), _cut():
                    await self._follow(client, api, version, take)
                await self._rest(asyncio.get_running_loop().time() - began)

    def _client(self, api: Api) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=api.url,
            headers={"accept": "application/json", "accept-encoding": "identity"},
            timeout=httpx.Timeout(None, connect=CONNECT_S),  # what is slow is ended by limits of our own
            verify=api.tls,
            trust_env=False,
            transport=self._transport,
        )

    async def _rest(self, lasted_s: float) -> None:
        """Wait before the next list: the longer, the more often watches were cut soon."""
        if lasted_s >= STABLE_S:
            self._pause_s = FIRST_PAUSE_S
        await asyncio.sleep(self._pause_s * self._random.uniform(0.5, 1.0))
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _found(self, api: Api) -> MemberSet:
        found = self._slices.found()
        if found.members or found.problems:
            return found
        why = f"the Service {self._config.service} has no endpoints in the namespace {api.namespace}"
        problem = Problem("the list", f"{why}: is its name right, and do its pods run?")
        return msgspec.structs.replace(found, problems=(problem,))

    # --- the list -------------------------------------------------------------------------------

    async def _list(self, client: httpx.AsyncClient, api: Api) -> str:
        """Take over all slices that there are, and return the version from which on to watch. Raises
        `SourceAway`.
        """
        items: list[msgspec.Raw] = []
        more = ""
        async with asyncio.timeout(LIST_S):
            for _ in range(MAX_PAGES):
                page = await self._page(client, api, more)
                items += page.items or ()
                more = page.metadata.next_part
                if not more:
                    self._slices.replace(items)
                    return page.metadata.resourceVersion
        raise SourceAway(f"{api.url} has a list that does not end")

    async def _page(self, client: httpx.AsyncClient, api: Api, more: str) -> _List:
        parameters = {"limit": str(PAGE), **({"continue": more} if more else {})}
        async with self._asked(client, api, parameters) as response:
            content = bytearray()
            async with contextlib.aclosing(_pieces(response)) as pieces:
                async for piece in pieces:
                    content += piece
                    if len(content) > MAX_LIST_BYTES:
                        raise SourceAway(f"{api.url} answers with more than {MAX_LIST_BYTES} bytes")
        try:
            return _decode_list(bytes(content))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SourceAway(f"{api.url} answers with what is no list of EndpointSlices: {error}") from error

    @contextlib.asynccontextmanager
    async def _asked(
        self, client: httpx.AsyncClient, api: Api, parameters: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """Ask for the slices. Raises `SourceAway` for an answer other than 200."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{api.namespace}/endpointslices"
        selected = {"labelSelector": f"kubernetes.io/service-name={self._config.service}", **parameters}
        headers = {**api.headers, **self._authorization()}
        async with client.stream("GET", path, params=selected, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise await _refused(response, api)
            yield response

    def _authorization(self) -> Mapping[str, str]:
        """Return the token as it is now: Kubernetes puts another one into its file once an hour."""
        if self._config.url is not None:
            return {}
        token = _read(self._account / "token")
        return {"authorization": f"Bearer {token}"}

    # --- the watch ------------------------------------------------------------------------------

    async def _follow(self, client: httpx.AsyncClient, api: Api, version: str, take: Take) -> None:
        """Act on what a watch tells until it ends. Raises `_Cut` if that is not as it should, and
        `SourceAway` if there can be none.
        """
        seconds = WATCH_S * self._random.uniform(1 - JITTER, 1 + JITTER)
        parameters = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(round(seconds)),
        }
        limit = asyncio.get_running_loop().time() + seconds + LATE_S
        async with asyncio.timeout_at(limit), self._asked(client, api, parameters) as response:
            rest = b""
            async with contextlib.aclosing(_pieces(response)) as pieces:
                async for piece in pieces:
                    *lines, rest = (rest + piece).split(b"\n")  # a rest without its end is no event
                    changes = [self._heard(line) for line in lines if line.strip()]
                    if any(changes):
                        take(self._found(api))
                    if len(rest) > MAX_LINE_BYTES:
                        raise _Cut

    def _heard(self, line: bytes) -> bool:
        """Take an event over; return whether anything can have changed. Raises `_Cut` for one after which
        nothing that follows can be relied on.
        """
        try:
            event = _decode_event(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _Cut from error
        if event.type == "ERROR":  # above all 410: the version is too old
            raise _Cut
        if event.type not in ("ADDED", "MODIFIED", "DELETED"):
            return False  # a bookmark: the next list is asked for anew, whatever the version
        try:
            found = decode_slice(event.object)
        except SliceError as error:
            self._slices.note_problem(error)
        else:
            (self._slices.remove if event.type == "DELETED" else self._slices.put)(found)
        return True


# --- where the API server is --------------------------------------------------------------------


def find_api(config: KubernetesConfig, account: Path, environ: Mapping[str, str]) -> Api:
    """Return the API server of the config, or of the cluster around. Raises `SourceAway`."""
    if config.url is not None:
        is_plain = config.url.startswith("http://")  # certificates are read in vain then
        return Api(config.url.rstrip("/"), config.namespace or "default", {}, tls=not is_plain)
    host = environ.get(HOST_ENV)
    if not host:
        raise SourceAway(OUTSIDE)
    port = environ.get(PORT_ENV) or "443"
    address = f"{join_address(host, 0)[:-1]}{port}"
    namespace = config.namespace or _read(account / "namespace")
    try:
        tls = ssl.create_default_context(cafile=str(account / "ca.crt"))
    except OSError as error:
        raise SourceAway(f"{account / 'ca.crt'} holds no certificates: {error}") from error
    return Api(f"https://{address}", namespace, {}, tls)


def _read(path: Path) -> str:
    """Raises `SourceAway`."""
    try:
        text = read_regular(path, MAX_FILE_BYTES).decode("ascii").strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        hint = "may the pod's service account have a token (automountServiceAccountToken)?"
        raise SourceAway(f"{path} cannot be read: {why}; {hint}") from error
    if not text.isprintable():
        raise SourceAway(f"{path} holds more than one line")
    return text


# --- what comes over the wire -------------------------------------------------------------------


class _ListMeta(msgspec.Struct):
    resourceVersion: str  # Kubernetes' own names
    next_part: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


_decode_list = msgspec.json.Decoder(_List).decode
_decode_event = msgspec.json.Decoder(_Event).decode


def _pieces(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Return the body as it comes, which whoever reads closes: one that is left alone is closed late."""
    return cast(AsyncGenerator[bytes, None], aiter(cast(AsyncIterable[bytes], response.stream)))


class _Cut(Exception):
    """A watch is over, and what has changed since must be found out by a list."""


_ON_THE_WAY: Final = (TimeoutError, httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError)


@contextlib.contextmanager
def _away(api: Api) -> Iterator[None]:
    """Turn what goes wrong with a list into `SourceAway`."""
    try:
        yield
    except _Cut as error:
        raise SourceAway(f"{api.url} let a list expire while it was read") from error
    except _ON_THE_WAY as error:
        raise SourceAway(f"{api.url} {trouble_of(error).what}: {type(error).__name__} {error}") from error


@contextlib.contextmanager
def _cut() -> Iterator[None]:
    """Turn what goes wrong with a watch into `_Cut`; the next list says whether the server is away."""
    try:
        yield
    except _ON_THE_WAY as error:
        raise _Cut from error


class _Status(msgspec.Struct):
    message: str = ""


_ADVICE: Final = {
    401: "is the token of the service account right?",
    403: "let its service account get, list and watch endpointslices of discovery.k8s.io in the namespace",
    404: "is this the API of Kubernetes 1.21 or later?",
}


async def _refused(response: httpx.Response, api: Api) -> Exception:
    """Return what an answer other than 200 means: 410 is a version that is too old."""
    if response.status_code == httpx.codes.GONE:
        return _Cut()
    said = ""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        said = msgspec.json.decode(await _head_of(response), type=_Status).message[:MAX_TEXT]
    advice = _ADVICE.get(response.status_code, "")
    why = f"{api.url} answers {response.status_code}"
    text = "; ".join(part for part in (f"{why} ({said})" if said else why, advice) if part)
    after = response.headers.get("retry-after", "")
    return SourceAway(text, float(after) if after.isascii() and after.isdigit() and len(after) < 4 else 0.0)


async def _head_of(response: httpx.Response) -> bytes:
    content = b""
    async with contextlib.aclosing(_pieces(response)) as pieces:
        async for piece in pieces:
            content += piece
            if len(content) > MAX_LINE_BYTES:
                break
    return content
