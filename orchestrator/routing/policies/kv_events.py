"""This policy is `prefix`, with what it remembers of workers corrected by their KV events.

Events name blocks by the engine's own hashes, the index knows steps of prompts. What both have in common is
the tokens, which events carry and which an answer has once its prompt is tokenised: blocks and steps get a
name each that follows from all tokens up to their end. What events tell of blocks that no known prompt has is
of use as soon as one is answered that has them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from orchestrator.routing.policies.base import (
    CacheEvent,
    Choice,
    Cleared,
    Context,
    End,
    Followed,
    Outcome,
    PolicySpec,
    Removed,
    Request,
    Stored,
)
from orchestrator.routing.policies.prefix import ARGUMENTS, Prefix
from orchestrator.routing.policies.prefix_index import WIDTH, bytes_of
from orchestrator.routing.policies.prefix_legs import BYTES_PER_TOKEN, Load, PrefixChoice
from orchestrator.routing.policies.prefix_notes import HEAD, HEAD_BYTES, MOST_SHARED

ID_BYTES: Final = 4  # of a token id
MOST_BLOCKS: Final = 8192  # of a prompt are named: 131,072 tokens in blocks of 16
MOST_GONE: Final = 4096  # blocks of a worker that were removed before any answer had named them

# Bytes of memory, measured: of a block of a worker; of a step that a prompt's tokens are known of.
BLOCK_BYTES: Final = 170
STEP_BYTES: Final = 230
AT_ONCE: Final = 16  # such a part of what may be known is forgotten at once
LEAST_BLOCKS: Final = 1024  # of a worker are known, whatever the memory

# How much more than fits into a cache is remembered of it while all of its events are known: they take away
# what is not there any more, except for prompts whose tokens nobody has told.
SLACK: Final = 2
UNBOUNDED: Final = 1 << 60
_ANSWERED: Final = End.ANSWERED  # a look-up by member is a call in Python


class Place:
    """A block is in this place of a prompt."""

    __slots__ = ("has", "hashes", "keeps")

    def __init__(self, hashes: bytes, keeps: int, has: int) -> None:
        """`hashes` are those of the prompt's steps. Who has the block has `has` of them, who does not has
        `keeps` at most.
        """
        self.hashes = hashes
        self.keeps = keeps
        self.has = has


class Engine:
    """A worker's cache as its events tell it."""

    __slots__ = ("block_size", "gone", "is_cut", "is_exact", "is_full", "names")

    def __init__(self) -> None:
        self.block_size = 0  # tokens; 0 if no block was stored yet
        self.names: dict[Any, int] = {}  # of the blocks that are there, by the engine's hashes; oldest first
        self.gone: dict[int, None] = {}  # names of blocks that were removed and that no prompt had
        self.is_cut = False  # there are more blocks than may be known
        self.is_exact = False
        self.is_full = False  # something was removed from it


class KvEvents(Prefix):
    def __init__(
        self,
        context: Context,
        fan_out: float,
        eviction: float,
        eviction_age_s: float,
        kept: float,
        kv_tokens: int,
        memory_mb: int,
        drift: float,
        drift_s: float,
    ) -> None:
        super().__init__(
            context, fan_out, eviction, eviction_age_s, kept, kv_tokens, memory_mb, drift, drift_s
        )
        memory = memory_mb * 1_000_000 // 4  # the index has half
        self._most_blocks = memory // BLOCK_BYTES  # of all workers
        self._most_places = memory // STEP_BYTES
        self._engines: dict[str, Engine] = {}
        self._places: dict[int, Place] = {}  # by the names of blocks, oldest first

    def _index_bytes(self, memory: int) -> int:
        return memory // 2

    # --- what is asked for ----------------------------------------------------------------------

    def _salt(self, request: Request) -> bytes:
        return _salt_of(request, self._model)

    def ended(self, choice: Choice[Any], outcome: Outcome) -> None:
        super().ended(choice, outcome)
        if not isinstance(choice, PrefixChoice) or not choice.hashes:
            return
        engine = self._engines.get(choice.load.name)
        if engine is None or not engine.block_size or outcome.end is not _ANSWERED:
            return
        ids = outcome.prompt_ids()
        if ids:
            self._learn_places(choice, engine, ids)

    def _learn_places(self, choice: PrefixChoice, engine: Engine, ids: Sequence[int]) -> None:
        """Note which blocks a prompt has; a step's is the last one that it needs, which is evicted first."""
        size = engine.block_size
        names = _named(ids, size, choice.salt)
        per_byte = choice.per_byte * len(ids) / choice.tokens if choice.tokens > 0.0 else 0.0
        hashes = choice.hashes
        places = array("Q")
        steps = len(hashes) // WIDTH
        step = 1
        while step <= steps:
            block = _block_of(step, per_byte, size)
            if block > len(names):
                break
            keeps = step - 1
            while step < steps and _block_of(step + 1, per_byte, size) == block:
                step += 1
            places.extend([names[block - 1], keeps, step])
            step += 1
        self._enter_places(hashes, places)
        self._take_gone(choice.load, engine, hashes, places)
        if self._share is not None and len(hashes) <= MOST_SHARED:
            self._share(HEAD.pack(PLACES, len(places), 0) + places.tobytes() + hashes)

    def _enter_places(self, hashes: bytes, places: array[int]) -> None:
        known = self._places
        for at in range(0, len(places), 3):
            name = places[at]
            known.pop(name, None)  # to the end of the order
            known[name] = Place(hashes, places[at + 1], places[at + 2])
        _forget_oldest(known, self._most_places)

    def _take_gone(self, load: Load, engine: Engine, hashes: bytes, places: array[int]) -> None:
        """Take from a worker what was removed before this answer came."""
        for at in range(0, len(places), 3):
            if places[at] in engine.gone:
                self._index.keep(load.holder, hashes, places[at + 1])
                return

    def hear(self, note: bytes) -> None:
        """Hear what another process has chosen, or which blocks a prompt has."""
        if len(note) < HEAD_BYTES:
            return
        what, count, _ = HEAD.unpack_from(note)
        end = HEAD_BYTES + count * WIDTH
        if what != PLACES:
            super().hear(note)
        elif count % 3 == 0 and end <= len(note) and (len(note) - end) % WIDTH == 0:
            self._enter_places(note[end:], array("Q", note[HEAD_BYTES:end]))

    # --- what workers tell ----------------------------------------------------------------------

    def note_cache(self, worker: str, event: CacheEvent) -> None:
        engine = self._engines.get(worker)
        if engine is None:
            engine = self._engines[worker] = Engine()
        load = self._loads.get(worker)  # None until it is a candidate: nothing was sent to it
        if isinstance(event, Stored):
            self._note_stored(engine, load, event)
        elif isinstance(event, Removed):
            self._note_removed(engine, load, event)
        elif isinstance(event, Cleared):
            self._note_cleared(engine, load)
        elif isinstance(event, Followed):
            engine.is_exact = event.is_exact
        if load is not None:
            self._set_capacity(load)

    def _note_stored(self, engine: Engine, load: Load | None, event: Stored) -> None:
        names, width = engine.names, event.block_size * ID_BYTES
        name: int | None = 0 if event.parent is None else names.get(event.parent)
        if name is None or width <= 0 or len(event.ids) < width * len(event.hashes):
            return  # what it follows is not known
        engine.block_size = event.block_size
        back: Place | None = None
        for at in range(len(event.hashes)):
            block = event.hashes[at]
            known = names.get(block)
            if known is not None:
                name = known
                continue
            salt = b"" if event.salts is None else event.salts[at].encode()
            name = _name(event.ids[at * width : (at + 1) * width], name, salt)
            names[block] = name
            engine.gone.pop(name, None)
            place = self._places.get(name)
            if place is not None:
                back = place
        if back is not None and load is not None:
            self._index.restore(load.holder, back.hashes[: back.has * WIDTH], self._time())
        most = max(self._most_blocks // len(self._engines), LEAST_BLOCKS)
        if _forget_oldest(names, most):
            engine.is_cut = True

    def _note_removed(self, engine: Engine, load: Load | None, event: Removed) -> None:
        engine.is_full = True
        kept: dict[bytes, int] = {}  # of each prompt that lost something, so many steps
        for block in event.hashes:
            name = engine.names.pop(block, None)
            if name is None:
                continue
            place = self._places.get(name)
            if place is None:
                engine.gone[name] = None
            elif place.keeps < kept.get(place.hashes, UNBOUNDED):
                kept[place.hashes] = place.keeps
        _forget_oldest(engine.gone, MOST_GONE)
        if load is not None:
            for hashes, steps in kept.items():
                self._index.keep(load.holder, hashes, steps)

    def _note_cleared(self, engine: Engine, load: Load | None) -> None:
        engine.names = {}
        engine.gone = {}
        engine.is_cut = engine.is_full = False
        if load is not None:
            self._index.clear(load.holder)

    # --- workers --------------------------------------------------------------------------------

    def _note_candidates(self, candidates: Sequence[Any]) -> bool:
        has_forgotten = super()._note_candidates(candidates)
        for load in self._workers.present:
            self._set_capacity(load)
        if has_forgotten:
            self._engines = {name: engine for name, engine in self._engines.items() if name in self._loads}
        return has_forgotten

    def _set_capacity(self, load: Load) -> None:
        """Have as much remembered as fits by what the worker says, or by its events while they are all known:
        nothing is evicted before the first block is.
        """
        holder = load.holder
        holder.capacity = holder.full_at = load.announced
        engine = self._engines.get(load.name)
        if engine is not None and engine.is_exact and engine.block_size and not engine.is_cut:
            fits = len(engine.names) * engine.block_size * BYTES_PER_TOKEN
            holder.capacity = SLACK * fits if engine.is_full else UNBOUNDED
            holder.full_at = 0 if engine.is_full else UNBOUNDED


# What other processes are told of a prompt's blocks has this in place of an epoch: then how many numbers
# follow, three for each block as `Place` has them; then those, and the hashes of the prompt's steps.
PLACES: Final = (1 << 64) - 1


def _forget_oldest(known: dict[Any, Any], most: int) -> bool:
    """Forget what was entered first if there is more than `most`, and return whether there is.

    More than is too much goes at once: to find the first entry of a dict takes as long as many were taken out
    before it.
    """
    too_many = len(known) - most
    if too_many <= 0:
        return False
    for key in list(islice(known, too_many + most // AT_ONCE)):
        del known[key]
    return True


def _name(ids: bytes, before: int, salt: bytes) -> int:
    """Return the name of a block behind the one with the name `before`; 0 begins a prompt."""
    if salt:
        before = xxh3_64_intdigest(salt, before)
    return xxh3_64_intdigest(ids, before)


def _named(ids: Sequence[int], size: int, salt: bytes) -> list[int]:
    """Return the names of a prompt's whole blocks of `size` tokens. `salt` is that of the first one, behind
    that of all of them.
    """
    data = (ids if isinstance(ids, array) else array("i", ids)).tobytes()
    width = size * ID_BYTES
    common, _, first = salt.partition(b"\x01")
    names: list[int] = []
    name = 0
    for end in range(width, min(len(data), MOST_BLOCKS * width) + 1, width):
        extra = common
        if first and not names:
            extra = common + b"\0" + first if common else first
        name = _name(data[end - width : end], name, extra)
        names.append(name)
    return names


def _block_of(step: int, per_byte: float, size: int) -> int:
    """Return the number of the last block, from 1, that a step needs."""
    return max(1, -(int(-bytes_of(step) * per_byte) // size))


def _salt_of(request: Request, model: str) -> bytes:
    """Return what tells the blocks of a request from others with the same tokens: an adapter, in all of its
    blocks, and a salt, in the first.
    """
    adapter = b"" if request.model == model else request.model.encode()
    salt = request.field("cache_salt")
    if salt is None:
        return adapter
    return adapter + b"\x01" + bytes(salt).strip(b'"')


SPEC: Final = PolicySpec(
    "kv_events",
    KvEvents,
    "As `prefix`, corrected by what vLLM tells of its KV cache (its KV events); as `prefix` alone where a "
    "worker tells nothing, or some of it was missed.",
    ARGUMENTS,
    hears_caches=True,
)
