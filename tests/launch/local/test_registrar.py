"""The registrar asks the admin listeners of all orchestrators of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from launch.local.control import CommandFailed
from launch.local.registrar import Refused, Registrar, Wanted


def row(state: str = "ready", in_flight: int = 0, *, is_drained: bool = False) -> dict[str, Any]:
    address = {"name": "m/decode/0", "model": "m", "role": "decode", "url": "http://w", "is_managed": True}
    return {
        "address": address,
        "state": state,
        "in_flight": in_flight,
        "is_drained": is_drained,
        "last_error": None,
    }


def asking(do: Callable[[Registrar], Awaitable[Any]], *answers: Callable[[], httpx.Response]) -> Any:
    """What `do` returns, with orchestrators of which each answers so."""
    hosts = [f"h{index}" for index in range(len(answers))]

    def answered(request: httpx.Request) -> httpx.Response:
        return answers[hosts.index(request.url.host)]()

    async def main() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answered)) as client:
            return await do(Registrar(client, [f"http://{host}" for host in hosts], "key"))

    return asyncio.run(main())


def listing(*rows: dict[str, Any]) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(200, json=list(rows))


def refusing(status: int) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(status, json={"error": {"message": "no"}})


@pytest.mark.parametrize(
    ("rows", "merged"),
    [
        ([row("ready", 1), row("ready", 2)], ("ready", 3, False)),
        ([row("ready"), row("starting")], ("starting", 0, False)),
        ([row("gone"), row("draining", 4)], ("draining", 4, False)),
        ([row("draining", is_drained=True), row("ready")], ("draining", 0, False)),
        ([row("draining", is_drained=True)] * 2, ("draining", 0, True)),
    ],
)
def test_a_worker_is_what_it_is_to_all(rows: list[dict[str, Any]], merged: tuple[str, int, bool]) -> None:
    (found,) = asking(Registrar.rows, *(listing(each) for each in rows))
    assert (found.state, found.in_flight, found.is_drained) == merged


def test_one_that_does_not_answer_is_named() -> None:
    def away() -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(CommandFailed, match="does not answer at http://h1: refused"):
        asking(Registrar.rows, listing(row()), away)


def test_one_that_refuses_is_named_with_its_reason() -> None:
    with pytest.raises(Refused, match=r"the orchestrator at http://h1 refuses POST .*: no") as caught:
        asking(lambda registrar: registrar.drain("m/decode/0"), listing(), refusing(409))
    assert caught.value.status == 409


def test_without_a_listener_nothing_can_be_changed() -> None:
    with pytest.raises(CommandFailed, match=r"set orchestrator\.admin"):
        asking(Registrar.rows)


def test_an_orchestrator_serves_once_it_is_ready() -> None:
    assert asking(lambda registrar: registrar.is_serving("http://h0"), lambda: httpx.Response(200))
    assert not asking(lambda registrar: registrar.is_serving("http://h0"), lambda: httpx.Response(503))


def wish(wanted: Any, role: str = "decode", why: str = "so it is") -> dict[str, Any]:
    return {"model": "m", "role": role, "wanted": wanted, "why": why}


def test_of_each_pool_as_many_are_wanted_as_whoever_wants_most() -> None:
    found = asking(
        Registrar.wanted,
        listing(wish(2), wish(4, "prefill")),
        listing(wish(3, why="more come here"), wish(4, "prefill", why="here too")),
        listing(),
    )
    assert found == [Wanted("m", "decode", 3, "more come here"), Wanted("m", "prefill", 4, "so it is")]


@pytest.mark.parametrize("do", [Registrar.wanted, Registrar.rows])
@pytest.mark.parametrize("answer", [[{"model": "m"}], [[]], 3, [wish("many")]])
def test_what_nobody_understands_is_a_failure(do: Callable[[Registrar], Awaitable[Any]], answer: Any) -> None:
    with pytest.raises(CommandFailed, match="answers as none of this version does"):
        asking(do, lambda: httpx.Response(200, json=answer))
    with pytest.raises(CommandFailed, match="answers as none of this version does"):
        asking(do, lambda: httpx.Response(500, json=answer))
