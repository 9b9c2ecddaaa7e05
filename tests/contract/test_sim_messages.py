"""The simulated engine keeps the contract of Messages."""

from __future__ import annotations

from tests.contract.cases import unique
from tests.contract.engines import Engine
from tests.contract.messages_cases import *  # noqa: F403  # the tests themselves
from tests.contract.messages_cases import handoff, message, post


def test_thinking_may_have_more_than_the_prefill_legs_token(engine: Engine) -> None:
    """As vLLM has it with a reasoning parser. The decode leg is held to the budget all the same."""
    document = message(engine, unique(), thinking={"type": "enabled", "budget_tokens": 1024})
    params = handoff(engine, document)
    refused = post(engine.decode_url, document | {"kv_transfer_params": params})
    assert refused.status_code == 400
    release = {name: value for name, value in document.items() if name != "thinking"}
    assert post(engine.decode_url, release | {"kv_transfer_params": params}).status_code == 200
