"""Answers as facts that can be compared: what is random is masked, tokens that came together are merged."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from tests.differential.case import Case

LIMIT_S = 300.0
NEAR = 0.01  # log probabilities of one prompt differ in this, by how its tokens are batched

Facts = dict[str, Any]

# Random, or the time: only their form is compared.
_MASKS = {
    "sequence_number": re.compile(r"\d+"),  # an event that says more has a single one
    "created": re.compile(r"\d{10}(\.\d+)?"),
    "created_at": re.compile(r"\d{10}(\.\d+)?"),
    "completed_at": re.compile(r"\d{10}(\.\d+)?"),
}
_RANDOM_ID = re.compile(r"(req-)?[0-9a-f]{8,44}(-[0-9]+)?")
_TEXTS = ("text", "content", "reasoning", "delta", "arguments", "thinking", "partial_json")
_DELTAS = ("event: content_block_delta", "event: response.output_text.delta")
_LISTS = ("token_ids", "tokens", "token_logprobs", "top_logprobs", "text_offset")


def ask(client: httpx.Client, url: str, case: Case, model: str) -> httpx.Response:
    return client.request(
        case.method,
        url + case.path.replace("@model@", model),
        content=case.content(model),
        headers={name: value.encode("latin-1") for name, value in case.headers.items()},
        timeout=LIMIT_S,
    )


def facts_of(answer: httpx.Response) -> Facts:
    """What an answer says, as dotted names and plain values."""
    facts: Facts = {"status": answer.status_code}
    facts |= {f"header {name}": value for name, value in answer.headers.items()}
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if kind == "text/event-stream":
        return facts | dict(_flat(merged(events_of(answer.text)), "events"))
    if kind == "application/json" and answer.text:
        return facts | dict(_flat(answer.json(), "$"))
    return facts | {"$": answer.text}


def differences(ours: Facts, theirs: Facts) -> dict[str, tuple[Any, Any]]:
    """The facts that are not the same: ours and theirs; `...` is one that is missing."""
    pairs = {name: (ours.get(name, ...), theirs.get(name, ...)) for name in ours.keys() | theirs.keys()}
    return {name: pair for name, pair in sorted(pairs.items()) if not _are_alike(*pair)}


def _are_alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= NEAR
    return type(one) is type(other) and bool(one == other)


# --- streams ------------------------------------------------------------------------------------


def events_of(text: str) -> list[Any]:
    """The events in their order: documents, comments and `[DONE]`."""
    assert text.endswith("\n\n"), text[-200:]
    return [_event(frame) for frame in text.split("\n\n")[:-1]]


def _event(frame: str) -> Any:
    name, _, data = frame.rpartition("data: ")
    if name.startswith(":") or data == "[DONE]":
        return frame
    document = json.loads(data)
    return {"event": name.strip(), **document} if name else document


def merged(events: list[Any]) -> list[Any]:
    """Make one event of neighbours that say more of the same choice: a worker that has several tokens when it
    writes puts them into one. Choices take turns in any order; each keeps its own.
    """
    found: list[Any] = []
    for event in _by_choice(events):
        if not (found and _continues(found[-1], event)):
            found.append(event)
        else:
            found[-1] = _joined(found[-1], event)
    return found


def _by_choice(events: list[Any]) -> Iterator[Any]:
    """The events; of neighbours that are about choices those of the first one come first."""
    for has_choice, run in itertools.groupby(events, lambda event: _only_choice(event) is not None):
        neighbours = list(run)
        yield from sorted(neighbours, key=_index_of) if has_choice else neighbours


def _index_of(event: Any) -> int:
    return int(event["choices"][0]["index"])


def _continues(before: Any, event: Any) -> bool:
    if isinstance(before, dict) and isinstance(event, dict) and "event" in event:
        return bool(event["event"] in _DELTAS and event["event"] == before.get("event"))
    one, other = _only_choice(before), _only_choice(event)
    if one is None or other is None or one["index"] != other["index"]:
        return False
    return not one.get("finish_reason") and not _opens(one) and not _opens(other)


def _only_choice(event: Any) -> dict[str, Any] | None:
    choices = event.get("choices") if isinstance(event, dict) else None
    return choices[0] if choices and len(choices) == 1 else None


def _opens(choice: Mapping[str, Any]) -> bool:
    return "role" in choice.get("delta", {})


def _joined(before: Any, event: Any) -> Any:
    """The two as one: texts and lists are joined, all else is the later's, as with several tokens."""
    if isinstance(before, dict) and isinstance(event, dict):
        return before | {
            name: _joined_field(name, before[name], value) if name in before else value
            for name, value in event.items()
        }
    if isinstance(before, list) and isinstance(event, list) and len(before) == len(event):
        return [_joined(one, other) for one, other in zip(before, event, strict=True)]
    return event


def _joined_field(name: str, before: Any, value: Any) -> Any:
    if isinstance(before, list) and isinstance(value, list) and (name in _LISTS or name == "content"):
        return before + value
    if isinstance(before, str) and isinstance(value, str) and name in _TEXTS:
        return before + value
    if value is None and name in ("token_ids", "prompt_token_ids", "logprobs"):
        return before
    return _joined(before, value)


# --- facts --------------------------------------------------------------------------------------


def _flat(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    match value:
        case dict() if value:
            for name, inner in value.items():
                yield from _flat(_masked(name, inner), f"{place}.{name}")
        case list() if value:
            for index, inner in enumerate(value):
                yield from _flat(inner, f"{place}.{index}")
        case _:
            yield place, value


def _masked(name: str, value: Any) -> Any:
    if name in _MASKS and _MASKS[name].fullmatch(str(value)):
        return "<number>"
    if isinstance(value, str) and (name == "id" or name.endswith("_id")):
        return _RANDOM_ID.sub("<id>", value)
    return value
