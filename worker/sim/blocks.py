"""The prefix cache has KV blocks: this says which ones a prompt gets, and how many hold its beginning."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def hash_blocks(tokens: Sequence[int], block_size: int, salt: str = "") -> list[bytes]:
    """Return a hash per full block, each over all tokens up to the block's end."""
    packed = memoryview(struct.pack(f"<{len(tokens)}I", *tokens))
    width = 4 * block_size
    hashes: list[bytes] = []
    parent = salt.encode()
    for end in range(width, len(packed) + 1, width):
        parent = hashlib.blake2b(parent + packed[end - width : end], digest_size=16).digest()
        hashes.append(parent)
    return hashes


@dataclass(frozen=True, slots=True)
class Allocation:
    block_ids: list[int]
    cached_blocks: int  # the first so many were in the prefix cache


class BlockPool:
    """The pool has blocks 1 to `num_blocks`. A block is owned (by one or more requests), idle, or was never
    used.

    Idle blocks keep their content until they are needed for something else, the longest idle first.
    """

    def __init__(
        self, num_blocks: int, block_size: int, on_evicted: Callable[[bytes], None] = lambda block_hash: None
    ) -> None:
        """`on_evicted` is called with the hash of a block whose content is lost."""
        self._on_evicted = on_evicted
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._owners: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._next_unused = 1
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def used(self) -> int:
        return len(self._owners)

    @property
    def usage(self) -> float:
        """This share of the blocks is owned, 0 to 1."""
        return len(self._owners) / self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def allocate(self, tokens: int, hashes: Sequence[bytes]) -> Allocation | None:
        """Return blocks for a prompt with these block hashes; None if there are not enough now.

        The last token is never taken from the cache: its output is what the answer begins with.
        """
        hits = self._cached(hashes[: (tokens - 1) // self.block_size])
        missing = self.blocks_for(tokens) - len(hits)
        if missing > self._available() - sum(block in self._idle for block in hits):
            return None
        block_ids = [self._own(block) for block in hits]
        block_ids += [self._own(self._take()) for _ in range(missing)]
        return Allocation(block_ids, len(hits))

    def commit(self, allocation: Allocation, hashes: Sequence[bytes]) -> int:
        """Note that the blocks now hold what the hashes say: later prompts may use them. Return how many of
        them were there before any that is new.
        """
        known = next((place for place, h in enumerate(hashes) if h not in self._by_hash), len(hashes))
        for block, block_hash in zip(allocation.block_ids, hashes, strict=False):
            if block_hash not in self._by_hash:
                self._by_hash[block_hash] = block
                self._hash_of[block] = block_hash
        return known

    def forget_all(self) -> bool:
        """Empty the cache; False, and nothing happens, if a block is owned."""
        if self._owners:
            return False
        self._by_hash.clear()
        self._hash_of.clear()
        return True

    def free(self, block_ids: Sequence[int]) -> None:
        """Give up one ownership of each. The end of a prompt becomes idle first: it is the least reusable."""
        for block in reversed(block_ids):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                del self._owners[block]
                self._idle[block] = None

    def _cached(self, hashes: Sequence[bytes]) -> list[int]:
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _available(self) -> int:
        return self.num_blocks - len(self._owners)

    def _own(self, block: int) -> int:
        self._idle.pop(block, None)
        self._owners[block] = self._owners.get(block, 0) + 1
        return block

    def _take(self) -> int:
        if self._next_unused <= self.num_blocks:
            self._next_unused += 1
            return self._next_unused - 1
        block, _ = self._idle.popitem(last=False)
        if block_hash := self._hash_of.pop(block, None):
            del self._by_hash[block_hash]
            self._on_evicted(block_hash)
        return block
