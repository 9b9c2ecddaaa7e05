"""A member is one running worker as those tell of it who place workers: a launcher, or a list that is kept.

A folder of members has one file per member, which is written as a whole, so that a reader never finds half of
one. A single file, JSON or YAML, has a list of members. `docs/discovery.md` shows both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args
from urllib.parse import quote, unquote

import msgspec

from orchestrator.wire.info import MAX_LABEL, Label, Role
from orchestrator.wire.regular import NoFile, read_regular

MAX_FILE_BYTES = 1024 * 1024  # of a file with members: a thousand of them are a fifth of that
MAX_MEMBERS = 4096
_SUFFIX = ".json"
_MOST_CHARACTERS = 240  # of a file's name: file systems take 255 bytes
_NAMES = "letters, digits and . _ : - [ ] only, and begins with a letter, a digit or ["
_PLACE = re.compile(r" - at `\$\.(\w+)`\Z")

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
    hides_member: bool = True  # False: if its key is not known, it is nobody's


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
    unread: OSError | None = None
    for path in _member_files(folder):
        try:
            if _read_member(path).uid == uid:
                path.unlink(missing_ok=True)
                return
        except (FileNotFoundError, NoFile, ValueError):
            continue
        except OSError as error:  # perhaps it is somebody else's
            unread = error
    if unread is not None:
        raise unread


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
        except (OSError, ValueError) as error:
            problems += _problem_of(path, error)
    return _made(members, problems, folder, len(files))


def _problem_of(path: Path, error: OSError | ValueError) -> Iterator[Problem]:
    """Yield what is wrong with a file, if anything is: one that was removed just now is none."""
    key = _key_of(path)
    if isinstance(error, NoFile):
        yield Problem(path.name, f"it is passed over: {error.strerror}", key, hides_member=False)
    elif not isinstance(error, FileNotFoundError):
        yield Problem(path.name, _said(error), key)
    elif path.is_symlink():
        yield Problem(path.name, "it is a link to a file that is not there", key)


def _said(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"it cannot be read: {error.strerror or error}"
    return str(error)


def _read_member(path: Path) -> Member:
    """Raises `OSError`, and `ValueError` that says in plain words what is wrong."""
    content = _bounded(path)
    if not content.strip():
        raise ValueError("it is empty")
    try:
        return msgspec.json.decode(content, type=Member)
    except (ValueError, RecursionError) as error:
        raise ValueError(_plain(error)) from error


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
            problems.append(Problem(f"entry {index}", _plain(error), _key_in(entry)))
    return _made(members, problems, path, len(entries))


def _entries(path: Path) -> list[Any]:
    """Raises `OSError`, and `ValueError` for what is no list."""
    content = _bounded(path)
    if not content.strip():
        raise ValueError("it is empty; a list without members is []")
    found = _parsed_json(content) if path.suffix == _SUFFIX else _parsed_yaml(content)
    if not isinstance(found, list):
        raise ValueError("there is no list of members in it")
    return found


def _parsed_json(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(_plain(error)) from error


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
    """Raises `OSError`, `NoFile` if it is none, and `ValueError` if it is too large."""
    content = read_regular(path, MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    return content


def _made(members: list[Member], problems: list[Problem], path: Path, count: int) -> MemberSet:
    if count > MAX_MEMBERS:
        problems.append(Problem(path.name, f"only the first {MAX_MEMBERS} of {count} members are used"))
    return MemberSet(tuple(members), tuple(problems), all(map(_is_known, problems)))


def _is_known(problem: Problem) -> bool:
    """Whether it is known who the problem is about, or that it is about nobody."""
    return problem.key is not None or not problem.hides_member


# --- what is wrong, in plain words --------------------------------------------------------------


def _plain(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeError):
        return "it is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON: {error}"
    if isinstance(error, msgspec.ValidationError):
        return _plain_value(str(error))
    return str(error).replace("Input data was truncated", "JSON is malformed: it ends too early")


def _plain_value(text: str) -> str:
    """Say which field is wrong, and what it should be."""
    if text.startswith("Expected `object`"):
        return "it has not the fields of a member"
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", text):
        return f"{missing[1]} is missing"
    if (place := _PLACE.search(text)) is None:
        return text
    return f"{place[1]} is wrong: {_plain_rule(text[: place.start()])}"


def _plain_rule(text: str) -> str:
    if "matching regex" in text:
        return f"it has {_NAMES}"
    if text.endswith("of length >= 1"):
        return "it is empty"
    if length := re.fullmatch(r"Expected `str` of length <= (\d+)", text):
        return f"it has more than {length[1]} characters"
    if text.startswith("Invalid enum value"):
        return f"{text.removeprefix('Invalid enum value ')} is none of {', '.join(get_args(Role))}"
    return text[0].lower() + text[1:]
