"""A member is one running worker as those tell of it who place workers: a launcher, or a list that is kept.

A folder of members has one file per member, which is written as a whole, so that a reader never finds half of
one. A single file, JSON or YAML, has a list of members. `docs/discovery.md` shows both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote

import msgspec

from orchestrator.wire.info import MAX_LABEL, Label, Role

MAX_FILE_BYTES = 1024 * 1024  # of a file with members: a thousand of them are a fifth of that
MAX_MEMBERS = 4096
_SUFFIX = ".json"
_MOST_CHARACTERS = 240  # of a file's name: file systems take 255 bytes

# Names stand in logs, labels of metrics and paths of the admin API.
Name = Annotated[
    str, msgspec.Meta(min_length=1, max_length=MAX_LABEL, pattern=r"\A[A-Za-z0-9\[][A-Za-z0-9._:\[\]-]*\Z")
]
Uid = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_LABEL)]


class Member(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A member is one start of one worker. Unknown fields are ignored, so newer writers can say more."""

    uid: Uid  # tells this start of a worker from every other
    name: Name  # the same wherever the member is seen; the worker's name is MODEL/ROLE/NAME
    model: Label
    role: Role
    url: Label  # http(s)://HOST:PORT
    revision: Label | None = None
    zone: Label | None = None
    is_draining: bool = False  # gets no new legs, while legs under way go on
    is_ready: bool = True  # False: it is there, and does not serve yet, or not for the moment


class Problem(msgspec.Struct, frozen=True):
    """A problem is an entry of a source that cannot be used, or not as it is."""

    place: str  # the file, or the entry of a list
    reason: str
    key: tuple[str, str, str] | None = None  # model, role and name of the member, where they are known


class MemberSet(msgspec.Struct, frozen=True):
    """A set has all members that a source lists at one moment, and what is wrong with its other entries."""

    members: tuple[Member, ...] = ()
    problems: tuple[Problem, ...] = ()
    is_whole: bool = True  # False: there are others, of which nobody can say who they are


def write_member(folder: Path, member: Member) -> None:
    """Write the file of a member, in place of an earlier one of the same model, role and name.

    The folder is made if it is not there. Raises `OSError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(member.model, member.role, member.name)
    draft = folder / f".{os.getpid()}.{os.urandom(4).hex()}.draft"
    try:
        draft.write_bytes(msgspec.json.encode(member) + b"\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def remove_member(folder: Path, uid: str) -> None:
    """Remove the file of the member with this `uid`, if there is one. Raises `OSError`.

    The file of a later start of the same worker, which has another `uid`, stays.
    """
    for path in _member_files(folder):
        with contextlib.suppress(FileNotFoundError, ValueError):
            if _read_member(path).uid == uid:
                path.unlink(missing_ok=True)


def read_members(path: Path) -> MemberSet:
    """Return the members in a folder, or in one file that lists them.

    What cannot be understood is among the problems. Raises `OSError` if there is no such path, and
    `ValueError` for a file that is no list at all.
    """
    return _read_folder(path) if path.is_dir() else _read_list(path)


def file_name(model: str, role: str, name: str) -> str:
    """Return the name of a member's file in a folder of members: a hash where it would be too long."""
    quoted = quote(f"{model}/{role}/{name}", safe="")
    if len(quoted) > _MOST_CHARACTERS:
        quoted = hashlib.sha256(quoted.encode()).hexdigest()
    return quoted + _SUFFIX


# --- a folder -----------------------------------------------------------------------------------


def _member_files(folder: Path) -> list[Path]:
    """Return the files of members, sorted; drafts begin with a dot. Raises `OSError`."""
    found = (path for path in folder.iterdir() if path.suffix == _SUFFIX)
    return sorted(path for path in found if not path.name.startswith("."))


def _read_folder(folder: Path) -> MemberSet:
    members: list[Member] = []
    problems: list[Problem] = []
    files = _member_files(folder)
    for path in files[:MAX_MEMBERS]:
        try:
            members.append(_read_member(path))
        except FileNotFoundError:  # it was removed just now
            continue
        except (OSError, ValueError) as error:
            problems.append(Problem(path.name, str(error), _key_of(path)))
    return _made(members, problems, folder, len(files))


def _read_member(path: Path) -> Member:
    """Raises `OSError` and `ValueError`."""
    try:
        return msgspec.json.decode(_bounded(path), type=Member)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _key_of(path: Path) -> tuple[str, str, str] | None:
    """Return whose file this is, by its name alone."""
    parts = unquote(path.name.removesuffix(_SUFFIX)).rsplit("/", 2)
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None


# --- a list -------------------------------------------------------------------------------------


def _read_list(path: Path) -> MemberSet:
    entries = _entries(path)
    members: list[Member] = []
    problems: list[Problem] = []
    for index, entry in enumerate(entries[:MAX_MEMBERS]):
        try:
            members.append(msgspec.convert(entry, Member, strict=False))
        except ValueError as error:
            problems.append(Problem(f"entry {index}", str(error), _key_in(entry)))
    return _made(members, problems, path, len(entries))


def _entries(path: Path) -> list[Any]:
    """Raises `OSError`, and `ValueError` for what is no list."""
    content = _bounded(path)
    found = _parsed_json(content) if path.suffix == _SUFFIX else _parsed_yaml(content)
    if not isinstance(found, list):
        raise ValueError("there is no list of members in it")
    return found


def _parsed_json(content: bytes) -> object:
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _parsed_yaml(content: bytes) -> object:
    """Parse YAML with all scalars as they are written, so that a name `0` or `no` is a string. Raises
    `ValueError`.
    """
    import yaml

    try:  # not with libyaml, which has no bound of its own for how deep a document may be nested
        return yaml.load(content, yaml.BaseLoader)  # noqa: S506  # it makes strings, lists and mappings only
    except (yaml.YAMLError, RecursionError, UnicodeError) as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())}") from error


def _key_in(entry: object) -> tuple[str, str, str] | None:
    parts = [entry.get(field) for field in ("model", "role", "name")] if isinstance(entry, dict) else []
    texts = [part for part in parts if isinstance(part, str)]
    return (texts[0], texts[1], texts[2]) if len(texts) == 3 else None


# --- both ---------------------------------------------------------------------------------------


def _bounded(path: Path) -> bytes:
    """Raises `OSError`, and `ValueError` if the file is too large."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    return content


def _made(members: list[Member], problems: list[Problem], path: Path, count: int) -> MemberSet:
    if count > MAX_MEMBERS:
        problems.append(Problem(path.name, f"only the first {MAX_MEMBERS} of {count} members are used"))
    return MemberSet(tuple(members), tuple(problems), all(problem.key is not None for problem in problems))
