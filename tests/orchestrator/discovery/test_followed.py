"""What a set of members does to the workers of a pool."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType

import pytest

from orchestrator.config.options import PoolConfig
from orchestrator.wire.member import Member, Problem
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import seat
from tests.orchestrator.discovery.followed import DECODE, PREFILL, Followed, member


def test_members_join_under_their_names_and_serve_once_probes_find_them_well() -> None:
    followed = Followed(pools=(DECODE, PREFILL))
    followed.lists(member("pod-a", zone="z"), member("p-0", port=2, pool=PREFILL))
    assert followed.names() == ["decode/pod-a", "prefill/p-0"]
    assert followed.serving() == []
    followed.answer()
    assert followed.serving() == ["p-0", "pod-a"]
    address = followed.worker("pod-a").address
    assert (address.url, address.zone, address.is_discovered) == ("http://10.0.0.1:8000", "z", True)
    assert address.gets_credential
    assert not address.is_managed


def test_one_that_is_not_listed_any_more_gets_no_new_leg_ends_its_legs_and_is_forgotten() -> None:
    followed = Followed()
    followed.lists(member("a"), member("b", port=2))
    followed.answer()
    worker = followed.worker("a")
    with seat(worker):
        followed.lists(member("b", port=2))
        assert followed.serving() == ["b"]  # at once
        followed.registry.settle()
        assert worker.state == "draining"
    followed.registry.settle()
    assert followed.names() == ["decode/b"]


def test_a_pool_of_thousands_is_soon_looked_through() -> None:
    """New requests go to a worker that was deleted until the whole set is taken: each member counts."""
    followed = Followed()
    listed = [member(f"w-{index}", port=index) for index in range(500)]
    followed.lists(*listed)
    followed.answer()
    calls = calls_of(lambda: followed.lists(*listed[1:]))
    assert followed.worker("w-0").state == "draining"
    assert calls / len(listed) < 14


def calls_of(function: Callable[[], None]) -> int:
    """Return how many functions of Python are called, or generators gone on with."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def test_one_that_is_listed_again_before_it_was_forgotten_serves_again() -> None:
    followed = Followed()
    followed.lists(member("a"), member("b", port=2))
    followed.answer()
    with seat(followed.worker("a")):
        followed.lists(member("b", port=2))
        followed.lists(member("a"), member("b", port=2))
        followed.answer()
        assert followed.serving() == ["a", "b"]
        followed.registry.settle()
        assert followed.names() == ["decode/a", "decode/b"]


def test_a_source_that_says_that_one_drains_drains_it_and_takes_it_back() -> None:
    followed = Followed()
    followed.lists(member("a", is_draining=True), member("b", port=2))
    assert followed.names() == ["decode/b"]  # nobody needs it
    followed.lists(member("a"), member("b", port=2))
    followed.answer()
    for is_draining, serving in ((True, ["b"]), (False, ["a", "b"])):
        followed.lists(member("a", is_draining=is_draining), member("b", port=2))
        followed.answer()
        assert followed.serving() == serving
        followed.registry.settle()
    assert followed.names() == ["decode/b", "decode/a"]


def test_what_the_operator_has_drained_stays_drained() -> None:
    followed = Followed()
    for is_draining in (False, True, False):
        followed.lists(member("a", is_draining=is_draining), member("b", port=2))
        followed.answer()
        followed.registry.drain(followed.worker("a"))
    followed.lists(member("a"), member("b", port=2))
    followed.answer()
    assert followed.serving() == ["b"]
    followed.registry.undrain(followed.worker("a"))
    followed.answer()
    assert followed.serving() == ["a", "b"]


def test_one_that_does_not_serve_yet_is_not_taken_and_one_that_does_not_any_more_drains() -> None:
    followed = Followed()
    followed.lists(member("a"), member("new", port=2, is_ready=False), member("b", port=3))
    followed.answer()
    assert followed.serving() == ["a", "b"]
    followed.lists(member("a", is_ready=False), member("b", port=3))
    assert followed.serving() == ["b"]


def test_if_none_is_said_to_serve_those_that_answer_probes_go_on() -> None:
    followed = Followed()
    followed.lists(member("a"), member("b", port=2))
    followed.answer()
    followed.lists(member("a", is_ready=False), member("b", port=2, is_ready=False))
    assert followed.serving() == ["a", "b"]


# --- identity -----------------------------------------------------------------------------------


def test_an_old_address_with_a_new_uid_is_another_epoch() -> None:
    """What was seen of the old start is no news, and hand-offs from it are not sent any more."""
    followed = Followed()
    followed.lists(member("a"))
    followed.answer()
    old, epoch = followed.worker("a"), followed.worker("a").epoch
    with seat(old):
        followed.lists(member("a", uid="another"))
        assert old.epoch != epoch  # a lease of the old epoch is void
        assert old.state == "gone"  # its legs are given up when they are silent
        followed.answer()
        new = followed.worker("a")
        assert new is not old
        assert new.epoch > epoch
        assert followed.serving() == ["a"]
        followed.registry.judge.note_lost(new, epoch, "a leg of the old one")
        assert new.state == "ready"


def test_an_address_that_another_name_has_now_is_lost_to_the_old_one() -> None:
    followed = Followed()
    followed.lists(member("a"), member("b", port=2))
    followed.answer()
    old = followed.worker("a")
    with seat(old):
        followed.lists(member("c"), member("b", port=2))
        assert old.state == "gone"
        followed.answer()
        assert followed.serving() == ["b", "c"]


def test_one_that_has_moved_is_found_at_its_new_address() -> None:
    followed = Followed()
    followed.lists(member("a"))
    followed.lists(member("a", uid="later", port=9))
    assert [worker.address.url for worker in followed.registry.workers] == ["http://10.0.0.9:8000"]


def test_a_data_parallel_worker_is_as_many_as_it_has_engines() -> None:
    options = PoolConfig.model_validate({"discover": {"dns": "h:1"}, "data_parallel_size": 2})
    followed = Followed(options=options)
    followed.lists(member("a"))
    assert followed.names() == ["decode/a.dp0", "decode/a.dp1"]
    followed.lists(member("a", uid="later"))
    assert followed.names() == ["decode/a.dp0", "decode/a.dp1"]
    followed.lists(member("b", port=2))
    followed.registry.settle()
    assert followed.names() == ["decode/b.dp0", "decode/b.dp1"]


# --- lists that lie -----------------------------------------------------------------------------


def test_an_empty_list_keeps_those_that_answer_probes_and_drops_the_others_as_they_end() -> None:
    followed = Followed()
    followed.lists(member("a"), member("b", port=2), member("never", port=3))
    followed.answer("a", "b")
    followed.lists()
    followed.registry.settle()
    assert followed.serving() == ["a", "b"]
    assert followed.names() == ["decode/a", "decode/b"]
    assert "stay while they answer probes" in followed.told("discovery.problem")[0]
    followed.registry.judge.mark_gone(followed.worker("a"), "refused")
    followed.feed.look_again()
    followed.registry.settle()
    assert followed.names() == ["decode/b"]
    followed.lists(member("b", port=2))
    assert followed.serving() == ["b"]


def test_one_that_drained_before_the_list_became_empty_is_not_kept() -> None:
    followed = Followed()
    followed.lists(member("a"))
    followed.answer()
    followed.lists(member("a", is_draining=True))
    followed.lists()
    followed.registry.settle()
    assert followed.names() == []


def test_one_whose_entry_cannot_be_read_stays() -> None:
    followed = Followed()
    followed.lists(member("a"), member("b", port=2))
    followed.answer()
    key = ("m", "decode", "a")
    followed.lists(member("b", port=2), problems=(Problem("a.json", "it is garbage", key),))
    assert followed.serving() == ["a", "b"]
    followed.lists(member("b", port=2), problems=(Problem("x.json", "it is garbage"),), is_whole=False)
    assert followed.serving() == ["a", "b"]  # nobody can say whose it is
    followed.lists(member("b", port=2))
    assert followed.serving() == ["b"]


def test_what_is_wrong_is_told_once_for_as_long_as_it_is() -> None:
    followed = Followed()
    bad = Problem("x.json", "it is garbage")
    for problems in ((bad,), (bad,), (), (bad,)):
        followed.lists(member("a"), problems=problems)
    assert followed.told("discovery.problem") == ["test x.json: it is garbage"] * 2


def test_what_steers_a_terminal_reaches_no_log(caplog: pytest.LogCaptureFixture) -> None:
    followed = Followed()
    evil = Member(uid="\x1b[31m", name="a", model="x\ny\x1b]0;", role="decode", url="http://h:1")
    followed.lists(evil, evil, problems=(Problem("a\r\nERROR forged", "z" * 10_000),))
    for line in (*followed.told("discovery.problem"), *caplog.messages):
        assert line.isprintable()
        assert len(line) <= 1000
    assert len(caplog.messages) == 2


# --- beside others ------------------------------------------------------------------------------


def test_one_that_the_operator_removes_does_not_come_back_until_it_starts_anew() -> None:
    followed = Followed()
    followed.lists(member("a"), member("b", port=2))
    followed.answer()
    with seat(followed.worker("a")):
        followed.registry.remove(followed.worker("a"))
        followed.lists(member("a"), member("b", port=2))
        assert followed.worker("a").is_leaving
    followed.registry.settle()
    followed.lists(member("a"), member("b", port=2))
    assert followed.names() == ["decode/b"]
    followed.lists(member("a", uid="later"), member("b", port=2))
    assert followed.names() == ["decode/b", "decode/a"]


def test_one_that_was_added_by_hand_is_in_the_way_and_says_so() -> None:
    followed = Followed()
    followed.lists(member("7"))
    added = followed.registry.workers[0].address
    other = Followed()
    other.registry.add(added)
    other.lists(member("8"))
    assert other.names() == ["decode/7"]
    assert "there is m/decode/7 at http://10.0.0.1:8000 already" in other.told("discovery.problem")[0]
    assert other.registry.next_index("m", "decode") == 8


def test_names_that_are_no_numbers_do_not_count() -> None:
    followed = Followed()
    followed.lists(member("pod-9"), member("3.x", port=2))
    assert followed.registry.next_index("m", "decode") == 4


def test_nothing_is_kept_of_those_that_have_left() -> None:
    followed = Followed()
    before = count_workers()
    for index in range(500):
        followed.lists(member(f"pod-{index}", port=1 + index % 200), member("stays", port=250))
        followed.answer()
        followed.registry.settle()
    assert max(worker.slot for worker in followed.registry.workers) <= 2  # slots are used again
    followed.lists(member("stays", port=250))
    followed.registry.settle()
    followed.lists(member("stays", port=250))
    assert count_workers() == before + 1


def count_workers() -> int:
    gc.collect()
    return sum(isinstance(found, Worker) for found in gc.get_objects())
