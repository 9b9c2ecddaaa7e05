from __future__ import annotations

import pytest

from orchestrator.wire.trace import TRACEPARENT, TRACESTATE, without_broken_trace

ID, SPAN = b"0af7651916cd43dd8448eb211c80319c", b"b7ad6b7169203331"
RIGHT = b"00-%b-%b-01" % (ID, SPAN)
STATE = (TRACESTATE, b"a=1")


@pytest.mark.parametrize("parent", [RIGHT, b"cc-%b-%b-00" % (ID, SPAN), b"01-%b-%b-01-more" % (ID, SPAN)])
def test_a_trace_is_relayed_with_its_state(parent: bytes) -> None:
    fields = [(b"accept", b"*/*"), (TRACEPARENT, parent), STATE, STATE]
    assert without_broken_trace(fields) == fields


@pytest.mark.parametrize(
    "parent",
    [
        b"",
        b"00-1-2-01",
        RIGHT.upper(),
        RIGHT + b"-more",
        RIGHT + b"x",
        b"ff" + RIGHT[2:],
        b"00-%b-%b-01" % (b"0" * 32, SPAN),
        b"00-%b-%b-01" % (ID, b"0" * 16),
        b"01-%b-%b-01-%b" % (ID, SPAN, b"a" * 1000),
        RIGHT.replace(b"-", b"_"),
        b"'; drop table",
    ],
)
def test_a_broken_one_is_not(parent: bytes) -> None:
    assert without_broken_trace([(TRACEPARENT, parent), STATE]) == []


def test_neither_are_several_nor_a_state_alone() -> None:
    assert without_broken_trace([(TRACEPARENT, RIGHT), (TRACEPARENT, RIGHT)]) == []
    assert without_broken_trace([STATE]) == []
