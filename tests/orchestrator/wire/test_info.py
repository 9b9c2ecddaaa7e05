from __future__ import annotations

import pytest

from orchestrator.wire.info import DEFAULT_STREAMS, streams_from_env


def test_streams_are_what_the_environment_says() -> None:
    assert streams_from_env({}) == streams_from_env({"BATON_STREAMS": ""}) == DEFAULT_STREAMS
    assert [streams_from_env({"BATON_STREAMS": given}) for given in ("http", "mux")] == ["http", "mux"]
    with pytest.raises(ValueError, match="BATON_STREAMS must be one of http, mux, not 'MUX'"):
        streams_from_env({"BATON_STREAMS": "MUX"})
