"""What is printed has no secrets, and what comes from outside starts no line and steers no terminal."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, Final

MASK: Final = "***"

# --- one line -----------------------------------------------------------------------------------------

# C0, DEL, C1, the two Unicode line ends, marks of direction, and lone surrogates, which UTF-8 cannot carry.
_unsafe: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """Return the text with everything escaped that ends a line or steers a terminal."""
    return text if text.isprintable() else _unsafe.sub(_escape, text)


def printable(text: str) -> str:
    """Return text of several lines with everything escaped that steers a terminal."""
    return "\n".join(map(one_line, text.split("\n")))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def counted(number: int, noun: str) -> str:
    """Return a number of things, as `1 request` or `2 requests`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shell_word(text: str) -> str:
    """Return the text as one word of a shell's line; `$'...'` where something had to be escaped."""
    if one_line(text) == text:
        return shlex.quote(text)
    return "$'{}'".format(one_line(text.replace("\\", "\\\\").replace("'", "\\'")))


# --- secrets ------------------------------------------------------------------------------------------

_KINDS: Final = "KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|BEARER"
# Words of a name, so that --tokenizer, --max-num-batched-tokens and MONKEY are shown.
_word: Final = re.compile(
    r"\w*(api|auth|access|private|secret|ssh|master)_?keys?|keys?|\w*(token|secret|password|passwd|passphrase)s?"
    r"|pw|pwd|pin|creds?|\w*credentials?|auth|authorization|cookies?|headers?|bearer|dsn",
    re.IGNORECASE,
)
# Tokens of these are counted: --prefill-us-per-token, --long-prefill-token-threshold, VLLM_MAX_TOKENS.
_counted: Final = re.compile(
    r"per|max|min|num|long|batched|prompt|details|budget|threshold|limit|count|ids?|ratio|size|speculative",
    re.IGNORECASE,
)
_tokens: Final = re.compile(r"tokens?", re.IGNORECASE)
_FILES: Final = frozenset({"file", "path", "dir", "env"})  # where a secret is, not what it is

_patterns: Final[Sequence[tuple[re.Pattern[str], str]]] = (
    # a URL with user and password, or secrets in its query
    (re.compile(r"(\w://)(?:[^/?#\s]+|[^/?#\s@:]*:(?!\d+[/?#])[^\s@]*)@"), rf"\1{MASK}@"),
    (
        re.compile(
            r"([?&][\w.-]*(?:key|token|secret|passw|auth|credential|sig)[\w.-]*=)[^&#\s'\"]+", re.IGNORECASE
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{3,}", re.IGNORECASE), rf"\1 {MASK}"),
    # what hubs and vendors mark as a key
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|AKIA|xox[bp]-)[\w-]{8,}"), MASK),
    # NAME=VALUE, and the same as in a mapping of Python or JSON
    (re.compile(rf"\b(\w*(?:{_KINDS})\w*\s*=\s*)[^\s,;&'\"\]}}]+"), rf"\1{MASK}"),
    (
        re.compile(
            r"((?P<quote>['\"]|\b)[\w.-]*(?:api_?key|token|secret|passw\w*|passphrase|credentials?)(?P=quote)"
            r"\s*:\s*\[?)(?:'[^']*'|\"[^\"]*\"|[^\s,'\"\[\]{}]+)",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
)
_inner_option: Final = re.compile(r"(?<!\S)(--[\w.-]+)(=|\s+)(?!--)(\S+)")


def is_secret_variable(name: str) -> bool:
    """Return whether the value of an environment variable must not be shown, judged by its name."""
    return name != "PWD" and _tells_secret(_words_of(name))


def is_secret_option(option: str) -> bool:
    """Return whether the value of an option of a command, or of a key, must not be shown."""
    words = _words_of(option.lstrip("-"))
    return words[-1].lower() not in _FILES and _tells_secret(words)


def _words_of(name: str) -> list[str]:
    return re.split(r"[-_.]", name)


def _tells_secret(words: Sequence[str]) -> bool:
    are_counted = any(map(_counted.fullmatch, words))
    return any(_word.fullmatch(word) and not (are_counted and _tokens.fullmatch(word)) for word in words)


def masked(text: str) -> str:
    """Return the text without the secrets that show themselves: in URLs, as NAME=VALUE, by their form."""
    for pattern, replacement in _patterns:
        text = pattern.sub(replacement, text)
    return text


def masked_value(text: str) -> str:
    """Return the value of a variable or option; it may be JSON, or itself hold options."""
    if text.lstrip().startswith(("{", "[")):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return masked(_inner_option.sub(_masked_option, text))
        without = _without_secrets(document)
        return text if without == document else json.dumps(without, separators=(",", ":"))
    return masked(_inner_option.sub(_masked_option, text))


def masked_words(argv: Sequence[str]) -> Iterator[str]:
    """Return the words of a command, those of secret options masked: `--x VALUE` and `--x=VALUE`."""
    is_secret = False
    for word in argv:
        option, equals, value = word.partition("=")
        if is_secret and not word.startswith("--"):
            yield MASK
        elif option.startswith("-") and equals:
            yield f"{option}={MASK if is_secret_option(option) else masked_value(value)}"
        else:
            yield masked_value(word)
        is_secret = word.startswith("-") and not equals and is_secret_option(option)


def _masked_option(match: re.Match[str]) -> str:
    option, between, value = match.groups()
    return f"{option}{between}{MASK if is_secret_option(option) else value}"


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: MASK if is_secret_option(key) and inner else _without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        words = [word if isinstance(word, str) else "" for word in value]
        shown = masked_words(words)
        return [
            new if isinstance(item, str) else _without_secrets(item)
            for item, new in zip(value, shown, strict=True)
        ]
    return masked(value) if isinstance(value, str) else value
