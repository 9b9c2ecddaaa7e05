"""A model has a revision: the hub's, or, of a directory, a fingerprint of what is in its weights.

Two directories with the same fingerprint hold the same model, wherever they lie. To read all weights would
take minutes, so of each file its size, its beginning and its end count: a checkpoint that was trained further
differs there, as it does everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_CONFIG = "config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
_PIECE = 64 * 1024  # bytes of each end of a file
_DIGITS = 16


def revision_of(path: str, hub_revision: str | None) -> str | None:
    """Return the revision of the model at `path`, a path or a name of the hub; None without one."""
    try:
        files = _files(Path(path))
        return f"files:{_fingerprint(files)}" if files else hub_revision
    except OSError:
        return hub_revision


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    weights = [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    config = path / _CONFIG
    return sorted([*weights, *([config] if config.is_file() else [])], key=lambda file: file.name)


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(_ends(file))
    return digest.hexdigest()[:_DIGITS]


def _ends(file: Path) -> bytes:
    with file.open("rb") as opened:
        first = opened.read(_PIECE)
        opened.seek(max(opened.tell(), file.stat().st_size - _PIECE))
        return first + opened.read(_PIECE)
