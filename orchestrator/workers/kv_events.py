"""Workers publish what becomes of their KV caches; this hears it, and tells the policies that want it.

Each process that routes subscribes to each worker that announces its events (`wire/info.py`). Batches are
numbered, so it shows when some are missing: then the worker is asked for them again. If it has them no more,
its cache is known approximately only: until it is cleared, or all that it can hold was stored anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from orchestrator.routing.policies.base import CacheEvent, Cleared, Followed, Removed, Stored
from orchestrator.wire.info import KvEventsInfo
from orchestrator.wire.kv_events import (
    DEVICE,
    END_OF_REPLAY,
    SEQUENCE_BYTES,
    AllBlocksCleared,
    BlockStored,
    Event,
    decoded,
)
from orchestrator.workers.figures import NO_FIGURES, CacheFigures
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import IN_SERVICE
from orchestrator.workers.worker import Worker

IDLE_S: Final = 5.0  # without a batch, after which the worker is asked whether any was lost
REPLAY_S: Final = 2.0  # for each batch of an answer to that
RETRY_S: Final = 1.0  # between two attempts after something failed
LATE_S: Final = 5.0  # later than the soonest: what such a batch tells was missing for long
REMEMBERED: Final = 4096  # batches that are recognised if they come once more
MOST_MESSAGE: Final = 64 << 20  # bytes; a larger message ends the connection
MOST_UNREAD: Final = 10_000  # batches that wait to be read

Hears = Callable[[str, CacheEvent], None]  # of a worker, by its name
Tell = Callable[[CacheEvent], None]
Batches = Sequence[tuple[int, bytes]]

_log = logging.getLogger("baton.kv_events")


class Numbered:
    """Batches have numbers; this applies each once, in order, and notices what is missing. It is pure."""

    def __init__(self, tell: Tell, now: Callable[[], float], capacity: Callable[[], int]) -> None:
        """`now` is wall-clock time. `capacity` says how many tokens the worker's cache holds; 0: unknown."""
        self._tell = tell
        self._now = now
        self._capacity = capacity
        self._expected: int | None = None  # the number of the next batch; None before the first one
        self._digests: OrderedDict[int, int] = OrderedDict()
        self._is_whole: bool | None = None  # all is known; None: nobody can say yet
        self._is_late = False
        self._is_deaf = False  # nothing comes, or nobody answers: nothing was missed yet
        self._has_buffer = False  # the publisher keeps batches to be asked for
        self._told: bool | None = None
        self._soonest_s: float | None = None
        self._stale_tokens = 0  # that are to be stored until nothing of what was missed matters
        self.batches = self.late = self.gaps = self.unfilled = self.restarts = self.garbage = 0

    def figures(self) -> CacheFigures:
        return CacheFigures(
            following=int(self._told is True),
            approximate=int(self._told is False),
            batches=self.batches,
            late=self.late,
            gaps=self.gaps,
            unfilled=self.unfilled,
            restarts=self.restarts,
            garbage=self.garbage,
        )

    def asks_from(self) -> int:
        """Return from which number on batches are to be asked for again: with the last one that is known, if
        there is one, so that it shows whether it is still the same publisher.
        """
        return max((self._expected or 0) - 1, 0)

    def take(self, number: int, payload: bytes) -> bool:
        """Apply a batch; False if some before it are missing: then `fill`, and `force` it."""
        if self._expected is not None and number < self._expected:
            if self._is_known(number, payload):
                return True
            self._begin_anew()
        if number != (self._expected or 0):
            self.gaps += 1
            return False
        if self._expected is None:
            self._is_whole = True
        self._apply(number, payload)
        return True

    def fill(self, batches: Batches | None) -> bool:
        """Take what was asked for with `asks_from`; None if nobody answered. False if it has to be asked for
        anew, as the publisher is another one.
        """
        if batches is None:
            self.note_silence()
            return True
        self._is_deaf = False
        if self._expected and self._is_another(batches):
            self._begin_anew()
            return False
        self._has_buffer = self._has_buffer or bool(batches)
        if self._expected is None:
            self._is_whole = not batches or batches[0][0] == 0
            self._expected = batches[0][0] if batches else 0
            self._stale_tokens = 0 if self._is_whole else self._capacity()
        for number, payload in batches:
            if number >= self._expected:
                self.force(number, payload)
        self._say()
        return True

    def force(self, number: int, payload: bytes) -> None:
        """Apply a batch although some before it are missing."""
        if self._expected is not None and number < self._expected:
            return
        if number != self._expected:
            self._lose()
        self._apply(number, payload)

    def note_silence(self) -> None:
        """Note that nothing comes from the worker any more, so that something may be missed."""
        self._is_deaf = True
        self._is_whole = bool(self._is_whole)
        self._say()

    def note_garbage(self) -> None:
        """Note a message that is none of ours."""
        self.garbage += 1

    def _is_known(self, number: int, payload: bytes) -> bool:
        return self._digests.get(number) == hash(payload)

    def _is_another(self, batches: Batches) -> bool:
        """Tell whether what was answered is not from the publisher of what is known."""
        last = (self._expected or 0) - 1
        if not batches:
            return self._has_buffer
        number, payload = batches[0]
        return number == last and not self._is_known(number, payload)

    def _begin_anew(self) -> None:
        """Note that the publisher has begun anew: its engine was restarted, and its cache is empty."""
        self.restarts += 1
        self._expected = 0
        self._digests.clear()
        self._is_whole, self._stale_tokens, self._soonest_s = True, 0, None
        self._tell(Cleared())
        self._say()

    def _apply(self, number: int, payload: bytes) -> None:
        self._expected = number + 1
        self._is_deaf = False
        self._digests[number] = hash(payload)
        if len(self._digests) > REMEMBERED:
            self._digests.popitem(last=False)
        self.batches += 1
        try:
            made, events = decoded(payload)
            told = [_told(event) for event in events]
        except (msgspec.MsgspecError, OverflowError, TypeError, RecursionError, ValueError):
            self.garbage += 1
            self._lose()
            self._say()
            return
        self._note_delay(self._now() - made)
        for event in told:
            if event is not None:
                self._tell(event)
                self._note_turnover(event)
        self._say()

    def _note_delay(self, delay_s: float) -> None:
        """Compare with the soonest batch, as clocks differ from machine to machine."""
        if self._soonest_s is None or delay_s < self._soonest_s:
            self._soonest_s = delay_s
        self._is_late = delay_s > self._soonest_s + LATE_S
        self.late += self._is_late

    def _note_turnover(self, event: CacheEvent) -> None:
        if isinstance(event, Cleared):
            self._stale_tokens = 0
            self._is_whole = True
        elif isinstance(event, Stored) and self._is_whole is False and self._stale_tokens:
            self._stale_tokens -= event.block_size * len(event.hashes)
            self._is_whole = self._stale_tokens <= 0

    def _lose(self) -> None:
        self.unfilled += 1
        self._is_whole = False
        self._stale_tokens = self._capacity()

    def _say(self) -> None:
        if self._is_whole is None:
            return
        is_exact = self._is_whole and not self._is_late and not self._is_deaf
        if is_exact is not self._told:
            self._told = is_exact
            self._tell(Followed(is_exact=is_exact))


def _told(event: Event) -> CacheEvent | None:
    """Return what policies are told of an event; None if it is about what they do not go by: another medium,
    or more than the first group of layers.
    """
    if isinstance(event, AllBlocksCleared):
        return Cleared()
    if event.medium not in (None, DEVICE) or event.group_idx:
        return None
    if not isinstance(event, BlockStored):
        return Removed(list(event.block_hashes))
    if len(event.token_ids) != len(event.block_hashes) * event.block_size:
        return None  # some of its blocks are not cached, so that nothing is found by them
    ids = array("i", event.token_ids).tobytes()
    return Stored(list(event.block_hashes), event.parent_block_hash, ids, event.block_size, _salts(event))


def _salts(event: BlockStored) -> list[str] | None:
    keys = event.extra_keys
    if keys is None or not any(keys):
        return None if event.lora_name is None else [event.lora_name] * len(event.block_hashes)
    if len(keys) != len(event.block_hashes):
        raise ValueError("there are more or fewer keys than blocks")
    return ["\0".join(map(str, found)) if found else "" for found in keys]


# --- over ZeroMQ --------------------------------------------------------------------------------


class KvEventFeed:
    """A feed subscribes to one worker, as long as `run` runs."""

    def __init__(self, name: str, info: KvEventsInfo, host: str, sequence: Numbered) -> None:
        self._name = name
        self._endpoint = reachable(info.endpoint, host)
        replay = info.replay_endpoint
        self._replay_endpoint = None if replay is None else reachable(replay, host)
        self._topic = info.topic.encode()
        self.sequence = sequence

    async def run(self) -> None:
        """Hear events until cancelled."""
        import zmq
        import zmq.asyncio

        context = zmq.asyncio.Context.instance()
        while True:
            with contextlib.ExitStack() as stack:
                try:
                    await self._follow(context, stack)
                except (zmq.ZMQError, ValueError, OSError) as error:
                    _log.warning("%s: its KV events cannot be heard: %s", self._name, error)
                    self.sequence.note_silence()
            await asyncio.sleep(RETRY_S)

    async def _follow(self, context: Any, stack: contextlib.ExitStack) -> None:
        import zmq

        socket = stack.enter_context(context.socket(zmq.SUB))
        _limit(socket)
        socket.connect(self._endpoint)
        socket.subscribe(self._topic)
        await self._fill(context)
        while True:
            if await socket.poll(IDLE_S * 1000):
                await self._hear(context, await socket.recv_multipart())
            else:
                await self._fill(context)

    async def _hear(self, context: Any, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != SEQUENCE_BYTES or frames[0] != self._topic:
            self.sequence.note_garbage()
            return
        number, payload = int.from_bytes(frames[1], "big"), frames[2]
        if not self.sequence.take(number, payload):
            await self._fill(context)
            self.sequence.force(number, payload)

    async def _fill(self, context: Any) -> None:
        """Ask for what may be missing, once more if the publisher has begun anew."""
        if self._replay_endpoint is None:
            return
        for _ in range(2):
            if self.sequence.fill(await self._replayed(context, self.sequence.asks_from())):
                return

    async def _replayed(self, context: Any, first: int) -> Batches | None:
        """Return the batches from `first` on that the worker still has; None if it does not answer."""
        import zmq

        batches: list[tuple[int, bytes]] = []
        with context.socket(zmq.DEALER) as socket:
            _limit(socket)
            socket.connect(self._replay_endpoint)
            await socket.send_multipart([b"", first.to_bytes(SEQUENCE_BYTES, "big")])
            while await socket.poll(REPLAY_S * 1000):
                *_, number, payload = await socket.recv_multipart()
                if number == END_OF_REPLAY:
                    return batches
                batches.append((int.from_bytes(number, "big"), payload))
        return None


def _limit(socket: Any) -> None:
    import zmq

    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, MOST_UNREAD)
    socket.setsockopt(zmq.MAXMSGSIZE, MOST_MESSAGE)
    socket.setsockopt(zmq.IPV6, 1)


def reachable(endpoint: str, host: str) -> str:
    """Return where to connect to what a worker on `host` has bound."""
    scheme, _, place = endpoint.partition("://")
    if scheme != "tcp":
        return endpoint
    bound, _, port = place.rpartition(":")
    if bound not in ("*", "0.0.0.0", "[::]", "::"):  # nothing is bound
        return endpoint
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"


# --- all of them --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Followed:
    info: KvEventsInfo
    hears: Hears
    feed: KvEventFeed
    task: asyncio.Task[None]


class KvEventFeeds:
    """There is a feed for each worker whose policy wants one and that announces its events."""

    def __init__(
        self,
        registry: Registry,
        wants: Callable[[Worker], Hears | None],
        now: Callable[[], float] = time.time,
    ) -> None:
        """`wants` returns what is to be told of a worker's events; None if nobody wants to know."""
        self._registry = registry
        self._wants = wants
        self._now = now
        self._feeds: dict[str, _Followed] = {}
        self._silent: set[str] = set()  # whose events are wanted, and that announce none
        registry.news.changed.add(self.settle)

    def figures(self, name: str) -> CacheFigures:
        found = self._feeds.get(name)
        if found is not None:
            return found.feed.sequence.figures()
        return CacheFigures(approximate=1) if name in self._silent else NO_FIGURES

    def settle(self) -> None:
        """Subscribe to those that are to be heard now, and to no others."""
        wanted = {worker.name: worker for worker in self._registry.workers if self._wants(worker) is not None}
        for name in [name for name in self._feeds if name not in wanted]:
            self._drop(name)
        self._silent = set()
        for worker in wanted.values():
            self._settle_one(worker)

    def _settle_one(self, worker: Worker) -> None:
        announced = worker.introduction.info
        info = None if announced is None else announced.kv_events
        hears = self._wants(worker)
        if info is None or hears is None:
            self._drop(worker.name)
            if worker.state in IN_SERVICE:
                self._silent.add(worker.name)
            return
        found = self._feeds.get(worker.name)
        if found is None or found.info != info or found.hears != hears:
            self._drop(worker.name)
            self._feeds[worker.name] = self._made(worker, info, hears)

    def _made(self, worker: Worker, info: KvEventsInfo, hears: Hears) -> _Followed:
        sequence = Numbered(partial(hears, worker.name), self._now, lambda: worker.kv_tokens or 0)
        feed = KvEventFeed(worker.name, info, urlsplit(worker.address.url).hostname or "", sequence)
        return _Followed(info, hears, feed, asyncio.create_task(feed.run()))

    def _drop(self, name: str) -> None:
        found = self._feeds.pop(name, None)
        if found is not None:
            found.task.cancel()

    async def aclose(self) -> None:
        """Hear nothing any more."""
        self._wants = lambda worker: None
        tasks = [followed.task for followed in self._feeds.values()]
        self.settle()
        await asyncio.gather(*tasks, return_exceptions=True)
