"""API keys say who may ask, and for what. Only their digests are known, and a comparison tells nothing by its
time.

A key has scopes: `infer` is for requests to models, `metrics` for `/metrics`, `admin` for everything of the
admin listener. A line of the file that names none is a client's: `infer`. It may also have limits of its own,
and a weight beside other keys; what its line leaves out is as `orchestrator.tenants` has it.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal, Self, get_args

from orchestrator.config.files import is_world_writable, read_file
from orchestrator.config.options import MAX_RATE, MAX_WEIGHT, MIN_WEIGHT, OrchestratorConfig
from orchestrator.errors import MissingScope, SettingError, StartError, Unauthorized
from orchestrator.wire.info import WORKER_KEY_ENV

Scope = Literal["infer", "metrics", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
REST: Final = "other"  # the label of keys that have no place of their own in the metrics
INFER: Final[frozenset[Scope]] = frozenset({"infer"})
_IMPLIED: Final[dict[Scope, frozenset[Scope]]] = {"admin": frozenset({"metrics"})}

# Longer tokens are refused unhashed; OpenAI's own keys have about 170 characters.
MAX_TOKEN_BYTES = 1024

_log = logging.getLogger("baton.config")
_name = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch  # names go to logs
_digest = re.compile(r"[0-9A-Fa-f]{64}").fullmatch
_count = re.compile(r"[0-9]{1,13}").fullmatch
_number = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?").fullmatch

_LINE: Final = "NAME SHA256HEX [SCOPE,...] [LIMIT=N ...]"


class KeyFileError(ValueError):
    """The key file cannot be used; `problems` are lines `FILE:LINE: message` that repeat none of its text."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """A key has these limits of its own, as `TenantsConfig` describes them; None where it has none."""

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    weight: float | None = None


LIMITS: Final = tuple(field.name for field in fields(KeyLimits))


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    digest: bytes  # SHA-256 of the key
    scopes: frozenset[Scope] = INFER  # with what they imply
    limits: KeyLimits = KeyLimits()


# In which header fields keys are sent.
BEARER: Final = "Authorization: Bearer KEY"
ANTHROPICS: Final = f"x-api-key: KEY, or {BEARER}"


class KeyRing:
    """A ring holds all valid keys; whoever holds the ring sees new ones as soon as they are exchanged."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read lines `NAME SHA256HEX [SCOPE,...] [LIMIT=N ...]`; empty lines and lines that start with # do
        not count.

        Raises `KeyFileError` with all problems at once, `OSError` if the file cannot be read.
        """
        keys = keys_in(path)
        if not keys:
            raise KeyFileError([f"{path}:1: no keys: every request would be refused"])
        return cls(keys)

    def exchange(self, keys: Iterable[Key]) -> None:
        """Let these keys be valid from now on, and no others."""
        self._keys = tuple(keys)

    def check(self, authorization: bytes | None, wanted: str = BEARER, *, scope: Scope = "infer") -> str:
        """Return the name of the key that an `Authorization` value carries. Raises `Unauthorized` if it is
        none of ours, which tells the client to send what is `wanted`, `MissingScope` if it is not for this.

        The presented token is hashed, and its digest is compared with every key's, whether or not one fits.
        """
        presented = sha256(_token(authorization, wanted)).digest()
        found: Key | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, presented):
                found = key
        if found is None:
            raise Unauthorized("the API key is not valid")
        if scope not in found.scopes:
            raise MissingScope(f"this API key lacks the scope {scope}; it has {_listed(found.scopes)}")
        return found.name

    def lacking(self) -> tuple[Scope, ...]:
        """Return the scopes that no key has."""
        return tuple(scope for scope in SCOPES if all(scope not in key.scopes for key in self._keys))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(key.name for key in self._keys)})"


def keys_in(path: str | Path) -> list[Key]:
    """Return the keys in a file, which may have none; see `KeyRing.load`."""
    try:
        text = read_file(path).decode("utf-8-sig")  # some editors begin a file with a BOM
    except UnicodeDecodeError:
        raise KeyFileError([f"{path}: not UTF-8 text"]) from None
    keys, problems = _parse(text)
    if problems:
        raise KeyFileError([f"{path}:{problem}" for problem in problems])
    return keys


def load_keys(options: OrchestratorConfig) -> KeyRing | None:
    """Return the keys of the config's file, None if everybody may ask. Raises `StartError`."""
    if options.api_keys_file is None:
        return None
    try:
        ring = read_keys(options.api_keys_file)
    except (OSError, KeyFileError) as error:
        raise StartError(f"api_keys_file: {error}") from error
    warn_of_missing_scopes(ring, options)
    return ring


def read_keys(path: str) -> KeyRing:
    """Return the keys in a file, and warn if everybody on the machine may write it; see `KeyRing.load`."""
    ring = KeyRing.load(path)
    if is_world_writable(path):
        _log.warning("%s can be written by everybody on this machine: chmod o-w", path)
    return ring


def missing_scopes(keys: KeyRing, options: OrchestratorConfig) -> Iterator[str]:
    """Say what nobody can do with these keys."""
    lacking, file = keys.lacking(), options.api_keys_file
    if "infer" in lacking:
        yield f"no key in {file} has the scope infer: every request is refused"
    if "admin" in lacking and options.admin is not None:
        yield (
            f"no key in {file} has the scope admin: the admin API at {options.admin} is closed; a line "
            "`NAME SHA256HEX SCOPE,...` without scopes is for infer only (baton key new NAME --scope admin)"
        )


def warn_of_missing_scopes(keys: KeyRing, options: OrchestratorConfig) -> None:
    """Say in the log what nobody can do with these keys."""
    for told in missing_scopes(keys, options):
        _log.warning("%s", told)


def worker_key(environ: Mapping[str, str]) -> str | None:
    """Return what workers want as bearer token; None if nothing. Raises `SettingError` if it can be none."""
    key = environ.get(WORKER_KEY_ENV, "").strip()  # secrets out of files often end with a line break
    if not all("!" <= character <= "~" for character in key):
        raise SettingError(f"{WORKER_KEY_ENV} holds a blank, or another character that no key has")
    return key or None


def _token(authorization: bytes | None, wanted: str) -> bytes:
    if authorization is None:
        raise Unauthorized(f"an API key is needed: send {wanted}")
    scheme, _, token = authorization.strip().partition(b" ")
    token = token.strip()
    if scheme.lower() != b"bearer" or not token:
        raise Unauthorized(f"expected {wanted}")
    if len(token) > MAX_TOKEN_BYTES or not token.isascii():
        raise Unauthorized("the API key is not valid")
    return token


def _parse(text: str) -> tuple[list[Key], list[str]]:
    keys: list[Key] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if problem := _problem(words, keys):
            problems.append(f"{number}: {problem}")
        else:
            keys.append(_key(words))
    return keys, problems


def _key(words: list[str]) -> Key:
    """Return the key of a line in which nothing is wrong."""
    scopes, limits = _parted(words[2:])
    return Key(words[0], bytes.fromhex(words[1]), scopes_in(scopes) if scopes else INFER, limits_in(limits))


def _parted(words: list[str]) -> tuple[str, list[str]]:
    """Return the word of the scopes, if there is one, and those of the limits."""
    has_scopes = bool(words) and "=" not in words[0]
    return (words[0], words[1:]) if has_scopes else ("", words)


def line_of(key: Key) -> str:
    """Return the line of a key in a file."""
    scopes = ",".join(scope for scope in SCOPES if scope in key.scopes)
    return " ".join([key.name, key.digest.hex(), scopes, *_limit_words(key.limits)])


def _limit_words(limits: KeyLimits) -> Iterator[str]:
    for name in LIMITS:
        value = getattr(limits, name)
        if value is not None:
            yield f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def name_problem(name: str) -> str | None:
    """Return why a key cannot have this name; None if it can."""
    if name == REST:
        return (
            f"{REST} is no name of a key: metrics count those that are beyond their number together as {REST}"
        )
    return None if _name(name) else "a name is 1 to 64 letters, digits and . _ -"


def scopes_problem(word: str) -> str | None:
    """Return why a word does not name scopes; None if it does."""
    is_right = set(word.split(",")) <= set(SCOPES)
    return None if is_right else f"scopes are {', '.join(SCOPES)}, with commas between them"


def scopes_in(word: str) -> frozenset[Scope]:
    """Return the scopes that a word names, with what they imply."""
    named = frozenset(scope for scope in SCOPES if scope in word.split(","))
    return named.union(*(_IMPLIED.get(scope, ()) for scope in named))


def limits_problem(words: Sequence[str]) -> str | None:
    """Return why words `NAME=VALUE` are no limits of a key, without their text; None if they are."""
    names = [word.partition("=")[0] for word in words]
    for word, name in zip(words, names, strict=True):
        if name not in LIMITS or "=" not in word:
            return f"limits are {', '.join(f'{limit}=N' for limit in LIMITS)}, with blanks between them"
        if names.count(name) > 1:
            return f"{name} is given twice"
        if not _is_limit(name, word.partition("=")[2]):
            return _WANTED[name]
    return None


def limits_in(words: Sequence[str]) -> KeyLimits:
    """Return what words `NAME=VALUE` say, in which nothing is wrong."""
    given = dict(word.split("=", 1) for word in words)
    counts = {name: int(value) for name, value in given.items() if name != "weight"}
    weight = float(given["weight"]) if "weight" in given else None
    return KeyLimits(**counts, weight=weight)


_COUNT: Final = f"is a whole number up to {MAX_RATE}, 0 for no limit"
_WANTED: Final = {
    "rpm": f"rpm (requests per minute) {_COUNT}",
    "tpm": f"tpm (tokens per minute) {_COUNT}",
    "concurrency": f"concurrency (requests at a time) {_COUNT}",
    "weight": f"weight is a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}",
}


def _is_limit(name: str, value: str) -> bool:
    if name == "weight":
        return bool(_number(value)) and MIN_WEIGHT <= float(value) <= MAX_WEIGHT
    return bool(_count(value)) and int(value) <= MAX_RATE


def _listed(scopes: Iterable[Scope]) -> str:
    return " and ".join(scope for scope in SCOPES if scope in scopes)


def _problem(words: list[str], keys: list[Key]) -> str | None:
    """Return what is wrong with a line, without its words: it may hold a key instead of the key's hash."""
    if len(words) < 2:
        return f"expected {_LINE}, got 1 word"
    if problem := name_problem(words[0]):
        return problem
    if not _digest(words[1]):
        return "expected the SHA-256 of the key as 64 hexadecimal digits (printf %s KEY | sha256sum)"
    scopes, limits = _parted(words[2:])
    if problem := (scopes_problem(scopes) if scopes else None) or limits_problem(limits):
        return problem
    if any(key.name == words[0] for key in keys):
        return "this name is already taken by an earlier line"
    if any(key.digest == bytes.fromhex(words[1]) for key in keys):
        return "this key is already in an earlier line"
    return None
