import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.http.ids import IdSource, request_id_from, valid_request_id


def source(seed: int = 1) -> IdSource:
    return IdSource(Random(seed))


def test_fresh_ids_are_different_and_valid() -> None:
    ids = source()
    made = [ids.fresh() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(re.fullmatch("req-[0-9a-f]{16}", one) and valid_request_id(one.encode()) for one in made)


def test_two_processes_make_different_ids() -> None:
    assert source().fresh() != source(2).fresh()


@pytest.mark.parametrize("value", [b"a", b"A.b_c:d-9", b"x" * 128, b"...", b".a", b"..a"])
def test_a_valid_id_of_the_client_is_kept(value: bytes) -> None:
    assert request_id_from([(b"host", b"h"), (b"x-request-id", value)], source()) == value.decode()


@pytest.mark.parametrize(
    "value", [b"", b"x" * 129, b"a b", b"a\n", b"\xff", b"a,b", "é".encode(), b".", b".."]
)
def test_any_other_is_replaced(value: bytes) -> None:
    assert request_id_from([(b"x-request-id", value)], source()).startswith("req-")


def test_without_a_header_the_id_is_fresh() -> None:
    assert request_id_from([(b"host", b"h")], source()).startswith("req-")


@given(st.binary(max_size=200))
def test_what_is_valid_is_printable_ascii(value: bytes) -> None:
    found = valid_request_id(value)
    assert found is None or (found.encode() == value and found.isascii() and found.isprintable())
