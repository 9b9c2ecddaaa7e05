"""What a process tells others of a choice by the policy `prefix`, in bytes."""

from __future__ import annotations

import struct
from typing import Final

from orchestrator.routing.policies.prefix_legs import Load

MOST_SHARED: Final = 4096  # bytes of hashes that other processes are told of one choice
MOST_NAME: Final = 1000  # bytes of a worker's name there
MOST_MS: Final = (1 << 32) - 1

# What other processes are told of a choice: the worker's epoch, the milliseconds that the leg is expected to
# take at a rate of 1, and how long its name is; then the name, and hashes.
HEAD: Final = struct.Struct("<QIH")
HEAD_BYTES: Final = 14


def note(load: Load, expected_s: float, hashes: bytes) -> bytes:
    name = load.name.encode()[:MOST_NAME]
    expected_ms = min(int(expected_s * 1000), MOST_MS)
    return HEAD.pack(load.epoch, expected_ms, len(name)) + name + hashes[:MOST_SHARED]
