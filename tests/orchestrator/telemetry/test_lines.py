import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.printing import one_line
from orchestrator.telemetry.lines import json_line, milliseconds, timestamp


@pytest.mark.parametrize(("epoch_s", "text"), [(0.0, "1970-01-01T00:00:00.000Z"), (1e9 + 0.9996, ".999Z")])
def test_timestamps_are_utc_with_milliseconds(epoch_s: float, text: str) -> None:
    assert timestamp(epoch_s).endswith(text)


@given(st.text(st.characters()))
def test_one_line_is_one_line_and_keeps_what_can_be_printed(text: str) -> None:
    escaped = one_line(text)
    assert len(escaped.splitlines()) <= 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in escaped)
    if text.isprintable():
        assert escaped == text


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.booleans()))
def test_a_json_line_is_read_back(fields: dict[str, object]) -> None:
    line = json_line(fields)
    assert line.endswith(b"\n")
    assert len(line.decode().splitlines()) == 1
    if all(not isinstance(value, int) or -(2**63) <= value < 2**64 for value in fields.values()):
        assert json.loads(line) == fields


def test_a_json_line_takes_values_that_json_does_not_know() -> None:
    fields = json.loads(json_line({"error": ValueError("x"), "big": 2**70, "broken": "\ud800"}))
    assert fields == {"error": "x", "big": str(2**70), "broken": "\\ud800"}


@given(st.floats(0.0, 1e5))
def test_milliseconds_have_three_decimals(seconds: float) -> None:
    text = milliseconds(seconds)
    assert len(text.partition(".")[2]) == 3
    assert abs(float(text) - seconds * 1e3) < 0.000501 + seconds * 1e-9


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0.000"), (4.4e-7, "0.000"), (0.0123456, "12.346"), (61.0, "61000.000")]
)
def test_milliseconds_are_rounded(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text
