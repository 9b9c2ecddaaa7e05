from __future__ import annotations

import pytest

from bench.flame import LOOP, shares, stage_of

SERVER = "run (orchestrator/http/http_exchange.py:136)"
FLOW = "serve (orchestrator/relay/flow.py:116)"
SEND = "send (orchestrator/transport/pool.py:75)"


@pytest.mark.parametrize(
    ("stack", "stage"),
    [
        (f"<module> (cli.py:1);{SERVER};{FLOW};{SEND}", "HTTP client"),
        (f"{SERVER};{FLOW}", "flow and relay"),
        (f"{SERVER};{FLOW};iterencode (json/encoder.py:1)", "flow and relay"),
        ("<module> (cli.py:1);run (orchestrator/app.py:9)", LOOP),
        ("<module> (cli.py:1);run (asyncio/runners.py:118)", LOOP),
    ],
)
def test_a_sample_counts_for_its_innermost_stage(stack: str, stage: str) -> None:
    assert stage_of(stack) == stage


def test_shares_add_up_and_start_with_the_largest() -> None:
    found = shares([f"{SERVER} 1", f"{SERVER};{FLOW} 3\n", f"{FLOW} 4"])
    assert found == {"flow and relay": 7 / 8, "HTTP server": 1 / 8}
    assert list(found) == ["flow and relay", "HTTP server"]
