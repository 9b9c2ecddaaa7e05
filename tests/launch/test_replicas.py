"""Several orchestrators are asked as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import pytest

from launch.events import parsed
from launch.remote import Admin, Failed, Refused
from launch.replicas import Admins
from tests.launch.runs import AdminListener, admin_listener


@contextmanager
def listening(*documents: dict[str, Any]) -> Iterator[tuple[Admins, list[AdminListener]]]:
    """Have a listener for each of these, which answers by path."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(admin_listener(each)) for each in documents]
        yield stack.enter_context(Admins([Admin(each.url, None) for each in listeners])), listeners


@contextmanager
def one_away(documents: dict[str, Any]) -> Iterator[tuple[Admins, AdminListener]]:
    """Have two listeners, of which the first is away."""
    with admin_listener({}) as away:
        url = away.url
    with admin_listener(documents) as there, Admins([Admin(url, None), Admin(there.url, None)]) as admins:
        yield admins, there


def row(**more: Any) -> dict[str, Any]:
    found = {"address": {"name": "m/decode/0", "url": "http://w"}, "state": "ready", "in_flight": 1}
    return (
        found | {"rate": 2.0, "served": 3, "errors": 0, "inter_token_p99": None, "is_drained": False} | more
    )


def test_the_figures_of_a_worker_are_put_together() -> None:
    one = [row()]
    two = [row(state="draining", in_flight=4, inter_token_p99=0.2, is_drained=True)]
    with listening({"/admin/workers": one}, {"/admin/workers": two}) as (admins, _):
        (found,) = admins.get("/admin/workers")
    assert found == row(
        state="draining", in_flight=5, rate=4.0, served=6, inter_token_p99=0.2, is_drained=True
    )


def test_a_worker_that_one_alone_knows_is_there() -> None:
    other = row(address={"name": "m/decode/1", "url": "http://v"})
    with listening({"/admin/workers": [row()]}, {"/admin/workers": [row(), other]}) as (admins, _):
        found = admins.get("/admin/workers")
    assert [each["in_flight"] for each in found] == [2, 1]


DRAIN = "/admin/workers/m/decode/0/drain"


def test_a_change_is_made_everywhere() -> None:
    with listening({DRAIN: {"a": 1}}, {DRAIN: {"a": 2}}) as (admins, listeners):
        assert admins.post(DRAIN) == {"a": 1}
        assert admins.delete(DRAIN) == {"a": 1}
        assert [each.paths("POST") for each in listeners] == [[DRAIN], [DRAIN]]
        assert [each.paths("DELETE") for each in listeners] == [[DRAIN], [DRAIN]]


def test_a_change_that_one_has_not_made_is_an_error_which_names_it() -> None:
    with one_away({DRAIN: {}}) as (admins, there):
        with pytest.raises(Failed, match=r"does not answer(.|\n)*1 of 2 orchestrators have done it"):
            admins.post(DRAIN)
        assert there.paths("POST") == [DRAIN]


def test_who_does_not_answer_is_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    with one_away({"/admin/workers": [row()]}) as (admins, _):
        for _ in range(2):
            assert admins.get("/admin/workers") == [row()]
        told = capsys.readouterr().err
    assert told.startswith("note: the admin listener http://127.0.0.1:")
    assert told.count("\n") == 1


def test_nobody_answers() -> None:
    with admin_listener({}) as one, admin_listener({}) as two:
        urls = [one.url, two.url]
    with Admins([Admin(url, None) for url in urls]) as admins, pytest.raises(Failed, match=urls[0]):
        admins.get("/admin/workers")


def test_a_request_is_found_wherever_it_was_served(capsys: pytest.CaptureFixture[str]) -> None:
    with listening({}, {"/admin/requests/r": {"id": "r"}}) as (admins, _):
        assert admins.get("/admin/requests/r") == {"id": "r", "others_with_this_id": 0, "orchestrator": 1}
        with pytest.raises(Refused, match="no such path"):
            admins.get("/admin/requests/other")
    assert capsys.readouterr().err == ""


def test_requests_and_events_come_in_the_order_of_their_time() -> None:
    def documents(*times: float) -> dict[str, Any]:
        return {
            "/admin/requests": {"requests": [{"received": time} for time in times], "unanswered": []},
            "/admin/events": [{"time": time} for time in times],
            "/admin/processes": [{"index": 0}],
        }

    with listening(documents(1, 4), documents(2, 3)) as (admins, _):
        requests = admins.get("/admin/requests")["requests"]
        events = admins.get("/admin/events")
        processes = admins.get("/admin/processes")
    assert [request["received"] for request in requests] == [4, 3, 2, 1]
    assert [(event["time"], event["orchestrator"]) for event in events] == [(1, 0), (2, 1), (3, 1), (4, 0)]
    assert processes == [{"index": 0, "orchestrator": 0}, {"index": 0, "orchestrator": 1}]


def test_processes_that_do_not_answer_are_named_with_their_orchestrator() -> None:
    def silent(*processes: int) -> dict[str, Any]:
        return {"/admin/requests": {"requests": [], "unanswered": [*processes]}}

    with listening(silent(1), silent(0, 1)) as (admins, _):
        assert admins.get("/admin/requests")["unanswered"] == ["0.1", "1.0", "1.1"]


def test_an_orchestrator_keeps_its_number_while_another_one_is_away() -> None:
    with listening({}, {"/admin/processes": [{"index": 0}]}) as (admins, _):
        assert admins.get("/admin/processes") == [{"index": 0, "orchestrator": 1}]


def test_texts_follow_each_other() -> None:
    with listening({"/metrics": "a 1\n"}, {"/metrics": "a 2\n"}) as (admins, _):
        assert admins.text("/metrics") == "a 1\na 2\n"


def test_all_streams_are_followed_and_taken_up_where_they_were() -> None:
    path = "/admin/events?kind=worker&follow=1"

    def stream(first: int, second: int) -> Callable[[], str]:
        """Two events, of which the stream is cut after the first."""
        left = iter([f"id: {first}\ndata: {first}\n\n", f"id: {second}\ndata: {second}\n\n"])
        return lambda: next(left, "")

    with listening({"/admin/events": stream(1, 2)}, {"/admin/events": stream(8, 9)}) as (admins, listeners):
        with admins.lines(path) as lines:
            events = [event for _, event in islice(parsed(lines), 4)]
        assert sorted(events) == [1, 2, 8, 9]
        assert listeners[0].paths("GET")[:2] == [path, f"{path}&after=1"]
        assert listeners[1].paths("GET")[:2] == [path, f"{path}&after=8"]


def test_events_that_are_followed_say_whose_they_are() -> None:
    event = 'id: 1\ndata: {"kind": "a"}\n\n'
    with (
        listening({"/admin/events": event}, {"/admin/events": event}) as (admins, _),
        admins.lines("/admin/events") as lines,
    ):
        events = [event for _, event in islice(parsed(lines), 2)]
    assert {event["orchestrator"] for event in events} <= {0, 1}


def test_a_request_whose_id_several_know_is_the_newest() -> None:
    one = {"/admin/requests/r": {"id": "r", "received": 1.0, "others_with_this_id": 2}}
    two = {"/admin/requests/r": {"id": "r", "received": 2.0, "others_with_this_id": 0}}
    with listening(one, two) as (admins, _):
        found = admins.get("/admin/requests/r")
    assert found == {"id": "r", "received": 2.0, "others_with_this_id": 3, "orchestrator": 1}


def test_who_was_away_is_not_asked_again_at_once() -> None:
    with one_away({"/admin/workers": []}) as (admins, _):
        assert admins.get("/admin/workers") == []
        asked: list[str] = []

        def ask(member: Admin) -> str:
            asked.append(member.url)
            return member.url

        assert admins._answers(ask) == asked
        assert len(asked) == 1
