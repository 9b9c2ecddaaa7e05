"""The docs say what each error looks like, and what SDKs make of it: they are asked, with Baton's bytes."""

from __future__ import annotations

import json
from functools import cache

import pytest

from bench.clients.errors import ANSWERS, EXCEPTIONS, IN_STREAMS, STREAM, UNTOLD, codes, serving, table, told
from bench.clients.raising import raised
from orchestrator.api.messages import error_body
from orchestrator.errors import BatonError, ClientError, DeadlineExceeded, Unavailable

TOLD = told()
NAMES = [*TOLD, *(code + STREAM for code in IN_STREAMS)]
# The others are asked by `make clients`, which installs them.
SDKS = ("openai", "anthropic")
OWN = "the worker's own"


def test_all_errors_are_told() -> None:
    assert set(TOLD) >= codes() - UNTOLD


def test_the_docs_have_all_errors() -> None:
    assert set(table(ANSWERS)) == set(TOLD)
    assert set(table(EXCEPTIONS)) == set(NAMES)


def fault(error: BatonError) -> str:
    if isinstance(error, ClientError):
        return "the client's"
    if isinstance(error, (Unavailable, DeadlineExceeded)):
        return "nobody's"
    return "Baton's" if type(error) is BatonError else "a worker's"


@pytest.mark.parametrize("name", TOLD)
def test_the_docs_say_what_an_error_looks_like(name: str) -> None:
    error = TOLD[name]
    told, headers = json.loads(error.body())["error"], dict(error.headers())
    assert table(ANSWERS)[name] == {
        "error": table(ANSWERS)[name]["error"],
        "status": str(error.status),
        "type": "its own" if name.startswith(OWN) else told["type"],
        "Anthropic's type": json.loads(error_body(error))["error"]["type"],
        "retry-after": "yes" if b"retry-after" in headers else "",
        "x-should-retry": headers.get(b"x-should-retry", b"").decode(),
        "fault": fault(error),
    }
    assert name.startswith(OWN) or told["code"] == name.split(",")[0]


# --- the SDKs -----------------------------------------------------------------------------------


@cache
def found(sdk: str) -> dict[str, str]:
    """What the SDK raises, and after how many tries, as the docs write it."""
    with serving() as stub:
        names = raised(sdk, [(case.url, case.in_stream) for case in stub.cases])
        return {
            case.name: f"{name} {stub.tries[case.name]}" for case, name in zip(stub.cases, names, strict=True)
        }


@pytest.mark.processes  # by which openai finds out what system this is
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sdk", SDKS)
def test_what_an_sdk_raises(sdk: str, name: str) -> None:
    assert found(sdk)[name] == table(EXCEPTIONS)[name][sdk]


@pytest.mark.processes
@pytest.mark.parametrize("sdk", SDKS)
def test_no_sdk_repeats_a_request_that_has_had_its_deadline(sdk: str) -> None:
    assert found(sdk)["deadline_exceeded"].endswith(" 1")
