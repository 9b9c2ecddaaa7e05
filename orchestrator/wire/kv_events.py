"""vLLM's KV events, as it publishes them over ZeroMQ: a batch is msgpack, behind a topic and a number.

    frames: topic, number of the batch (8 bytes, big-endian, from 0 on), batch

Older engines, and others that took the format over, write events as arrays.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Raw

BlockHash = int | bytes
SEQUENCE_BYTES: Final = 8
END_OF_REPLAY: Final = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)
DEVICE: Final = "GPU"  # the medium of blocks that the engine computes with, whatever the device is


class BlockStored(msgspec.Struct, tag="BlockStored", omit_defaults=True):
    """Blocks that follow each other are in the cache; `token_ids` are those of all of them."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: Any = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None  # for each block, what else goes into its hash
    group_idx: int | None = None  # of layers that share a cache


class BlockRemoved(msgspec.Struct, tag="BlockRemoved", omit_defaults=True):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", omit_defaults=True):
    pass


class _StoredArray(BlockStored, tag="BlockStored", array_like=True):
    pass


class _RemovedArray(BlockRemoved, tag="BlockRemoved", array_like=True):
    pass


class _ClearedArray(AllBlocksCleared, tag="AllBlocksCleared", array_like=True):
    pass


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    """A batch holds what happened in one step of the engine."""

    ts: float  # `time.time()` there
    events: list[Any]
    data_parallel_rank: int | None = None


class _RawBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Raw]


_BATCH: Final = msgspec.msgpack.Decoder(_RawBatch)
_MAP: Final = msgspec.msgpack.Decoder(Event)
_ARRAY: Final = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_encoder: Final = msgspec.msgpack.Encoder()


def encoded(batch: Batch) -> bytes:
    return _encoder.encode(batch)


def decoded(payload: bytes) -> tuple[float, list[Event]]:
    """Return when a batch was made, and its events. Raises `msgspec.MsgspecError`."""
    batch = _BATCH.decode(payload)
    return batch.ts, [_event(raw) for raw in batch.events]


def _event(raw: Raw) -> Event:
    first = bytes(memoryview(raw)[:1])
    is_map = first[0] >> 4 == 0x8 or first[0] in (0xDE, 0xDF)
    event: Event = (_MAP if is_map else _ARRAY).decode(raw)
    return event
