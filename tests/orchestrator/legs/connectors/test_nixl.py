from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from orchestrator.legs.connectors.base import InvalidHandoff
from orchestrator.legs.connectors.nixl import handoff_from

PARAMS = {
    "do_remote_prefill": True,
    "remote_engine_id": "e",
    "remote_block_ids": [[1]],
    "remote_request_id": "r",
    "remote_host": "h",
    "remote_port": 1,
}


def answer(params: Any) -> bytes:
    return json.dumps({"id": "x", "choices": [], "kv_transfer_params": params}).encode()


def test_params_are_kept_but_for_the_cached_tokens() -> None:
    handoff = handoff_from(answer(PARAMS | {"remote_prefill_cached_tokens": 48, "tp_size": 2}))
    assert json.loads(handoff.params) == PARAMS | {"tp_size": 2}
    assert handoff.prefill_cached_tokens == 48


def test_the_cached_tokens_may_be_missing() -> None:
    assert handoff_from(answer(PARAMS)).prefill_cached_tokens is None
    assert handoff_from(answer(PARAMS | {"remote_prefill_cached_tokens": None})).prefill_cached_tokens is None


def compact(params: Any) -> bytes:
    return json.dumps({"kv_transfer_params": params}, separators=(",", ":")).encode()


def test_params_without_spaces_keep_their_bytes() -> None:
    handoff = handoff_from(compact(PARAMS | {"remote_prefill_cached_tokens": 48, "tp_size": 2}))
    assert handoff.params == json.dumps(PARAMS | {"tp_size": 2}, separators=(",", ":")).encode()
    assert handoff.prefill_cached_tokens == 48


CACHED = "remote_prefill_cached_tokens"


@pytest.mark.parametrize("write", [answer, compact])
@pytest.mark.parametrize(
    "written", ["48", " 48 ", "4.8e1", "48.0", "0", "-0", "null", "18446744073709551616"]
)
@pytest.mark.parametrize(
    "more",
    [
        {"tp_size": 2},
        {"tp_size": None},
        {"path": "a\\b"},
        {"nested": {"a": 1, CACHED: 48}},
        {"text": f',"{CACHED}":48,'},
        {"": ["remote_host", {}]},
    ],
    ids=["as vLLM has it", "a null", "an escape", "a twin inside", "a quotation", "another nameless field"],
)
def test_the_cached_tokens_are_left_out_however_they_are_written(
    write: Any, written: str, more: dict[str, Any]
) -> None:
    for params in (
        PARAMS | {CACHED: "@"} | more,
        {CACHED: "@"} | PARAMS | more,
        PARAMS | more | {CACHED: "@"},
    ):
        content = write(params).replace(b'"@"', written.encode())
        try:
            expected = msgspec.json.decode(written, type=int | None)
        except msgspec.ValidationError:
            with pytest.raises(InvalidHandoff):
                handoff_from(content)
            continue
        handoff = handoff_from(content)
        assert json.loads(handoff.params) == PARAMS | more
        assert handoff.prefill_cached_tokens == expected


def test_the_last_of_two_counts_of_cached_tokens_is_taken() -> None:
    content = compact(PARAMS | {CACHED: 48})[:-2] + b',"%b":16}}' % CACHED.encode()
    handoff = handoff_from(content)
    assert (json.loads(handoff.params), handoff.prefill_cached_tokens) == (PARAMS, 16)


def test_an_escaped_key_is_left_out_too() -> None:
    content = compact(PARAMS | {CACHED: 48}).replace(b"_cached_", rb"_c\u0061ched_")
    handoff = handoff_from(content)
    assert (json.loads(handoff.params), handoff.prefill_cached_tokens) == (PARAMS, 48)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"oops",
        b"[]",
        b"{}",
        b'{"kv_transfer_params":"\xff"}',
        answer(None),
        answer({}),
        answer(PARAMS | {"do_remote_prefill": False}),
        answer(PARAMS | {"remote_prefill_cached_tokens": "many"}),
        *(answer({key: value for key, value in PARAMS.items() if key != name}) for name in PARAMS),
        *(answer(PARAMS | {name: None}) for name in PARAMS),
        b'{"kv_transfer_params":' + b"[" * 100_000 + b"}",
    ],
)
def test_what_is_no_handoff_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidHandoff):
        handoff_from(content)
