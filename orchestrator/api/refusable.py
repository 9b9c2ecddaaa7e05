"""Some requests are refused by the worker that decodes, though the prefill leg of them would be served: what
is wrong is in fields that a prefill leg leaves out, as they are about the answer (`OWN` in `api/view.py`).

Such a request goes to a decode worker as a whole, without a prefill leg before it. That worker refuses it in
its own words, and nobody has prefilled it, or has to free its blocks. One that is taken for refusable and is
not is served all the same. So this only has to be right for requests that are meant well: those it must let
pass.

The rules are vLLM's (0.32): its request classes and `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from msgspec import Raw

from orchestrator.wire.lax import bool_of, int_of
from orchestrator.wire.shapes import AnswerFields

# Fields that are judged here where they are there. Most requests have none of them.
JUDGED: Final = frozenset({"n", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "return_token_ids"})

_DEFAULT_COMPLETION_TOKENS: Final = 16
_MOST_CHOICES: Final = 16384
_MOST_STOPS: Final = 4
_GREEDY_BELOW: Final = 1e-5
_fields: Final = msgspec.json.Decoder(AnswerFields)


def is_refusable(own_json: bytes, shared: Mapping[str, Raw]) -> bool:
    """Tell whether a worker that decodes is likely to refuse these fields. `own_json` are those in which a
    request's legs differ.
    """
    try:
        fields = _decoded(own_json)
        return (
            _has_wrong_choices(fields.n, shared)
            or _has_wrong_stops(fields.stop)
            or _has_wrong_least(fields, is_completion="prompt" in shared)
        )
    except (ValueError, TypeError, OverflowError, msgspec.DecodeError):
        return True  # of a wrong type


def _decoded(own_json: bytes) -> AnswerFields:
    """Return the fields, however they are spelt. Raises `ValueError` or `DecodeError` for a wrong type."""
    try:
        return _fields.decode(own_json)
    except msgspec.DecodeError:
        given = msgspec.json.decode(own_json)
        spelt = {name: value for name, value in given.items() if name in _READERS and value is not None}
        read = {name: _READERS[name](value) for name, value in spelt.items()}
        return msgspec.convert({**given, **read}, AnswerFields)


def _int_list(value: object) -> object:
    return [int_of(each) for each in value] if isinstance(value, list) else value


# Numbers and switches are taken in all the spellings that vLLM takes.
_READERS: Final[dict[str, Callable[[object], object]]] = {
    "n": int_of,
    "min_tokens": int_of,
    "max_tokens": int_of,
    "max_completion_tokens": int_of,
    "ignore_eos": bool_of,
    "return_token_ids": bool_of,
    "stop_token_ids": _int_list,
}


def _has_wrong_choices(n: int | None, shared: Mapping[str, Raw]) -> bool:
    if n is None or n == 1:
        return False
    temperature = msgspec.json.decode(shared["temperature"]) if "temperature" in shared else None
    is_greedy = temperature is not None and float(temperature) < _GREEDY_BELOW
    return not 1 <= n <= _MOST_CHOICES or is_greedy


def _has_wrong_stops(stop: str | list[str] | None) -> bool:
    if stop is None or isinstance(stop, str):
        return False
    return len(stop) > _MOST_STOPS or "" in stop


def _has_wrong_least(fields: AnswerFields, *, is_completion: bool) -> bool:
    """Tell whether more tokens are wanted at least than at most."""
    most = fields.max_completion_tokens or fields.max_tokens
    if most is None and is_completion:
        most = _DEFAULT_COMPLETION_TOKENS
    return fields.min_tokens < 0 or (most is not None and fields.min_tokens > most)
