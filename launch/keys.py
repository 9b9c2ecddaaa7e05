"""`baton key new` makes an API key, and the line that stands for it in `orchestrator.api_keys_file`."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from launch.exits import Exit
from orchestrator.config.keys import (
    Key,
    KeyFileError,
    keys_in,
    limits_in,
    limits_problem,
    line_of,
    name_problem,
    scopes_in,
    scopes_problem,
)

KEY_BYTES = 32  # of randomness
_RELOAD = "it takes effect with a reload: kill -HUP of `baton up`, or POST /admin/reload"
_PREFIX = "sk-baton-"  # by which scanners for secrets know a key


class KeyRefused(Exception):
    """No key was made; the message says what to change."""


def new_key(name: str, scopes: str, file: str | None, limits: Sequence[str] = ()) -> int:
    """Print a new key, once and for all; its line goes to `file`, or below it if there is none.

    `scopes` are as in a line of the file, with commas between them, and so are `limits`: `rpm=600`.

    Raises `KeyRefused`.
    """
    problem = name_problem(name) or scopes_problem(scopes) or limits_problem(limits)
    if problem is not None:
        raise KeyRefused(problem)
    key = _PREFIX + secrets.token_urlsafe(KEY_BYTES)
    line = line_of(Key(name, sha256(key.encode()).digest(), scopes_in(scopes), limits_in(limits)))
    if file is not None:
        _append(Path(file), name, line)
    print(key)
    if file is None:
        print(line)
    else:
        print(f"{file}: {name} was added; {_RELOAD}", file=sys.stderr)
    return Exit.OK


def _append(file: Path, name: str, line: str) -> None:
    """Write the line, whole or not at all, into a file that may not be there yet."""
    try:
        if file.exists() and not file.is_file():
            raise KeyRefused(f"{file} is not a regular file")
        before = file.read_bytes() if file.exists() else b""
        if before and any(key.name == name for key in keys_in(file)):
            raise KeyRefused(f"{file} has a key of the name {name} already")
        start = b"" if not before or before.endswith(b"\n") else b"\n"
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _write(descriptor, start + line.encode() + b"\n", len(before))
        finally:
            os.close(descriptor)
    except KeyFileError as error:
        raise KeyRefused("\n".join(error.problems)) from error
    except OSError as error:
        raise KeyRefused(f"cannot write {file}: {error.strerror}") from error


def _write(descriptor: int, data: bytes, size: int) -> None:
    try:
        written = os.write(descriptor, data)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
    if written != len(data):  # a disk that is full takes a part first
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
