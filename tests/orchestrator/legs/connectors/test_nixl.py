from __future__ import annotations

import json
from typing import Any

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
