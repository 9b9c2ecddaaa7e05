from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.options import DiscoverConfig
from orchestrator.discovery import SOURCES
from orchestrator.discovery.changes import Fate, Known, decide
from orchestrator.discovery.listed import Listed, sort_out
from orchestrator.wire.member import Member, MemberSet
from tests.orchestrator.discovery.followed import DECODE, PREFILL, member


def test_there_is_a_source_for_each_option() -> None:
    assert list(SOURCES) == list(DiscoverConfig.model_fields)


def reasons(*members: Member, known: dict[str, str] | None = None) -> list[str]:
    return [p.reason for p in sort_out(MemberSet(members), [DECODE], known or {}, [PREFILL]).problems]


def test_members_of_pools_that_others_find_are_passed_over_and_those_of_none_are_named() -> None:
    assert reasons(member("a", pool=PREFILL)) == []
    assert reasons(member("a", pool=("m", "both")), member("b", pool=("x", "decode"))) == [
        "no pool m/both is found by this source; there is: m/decode",
        "no pool x/decode is found by this source; there is: m/decode",
    ]


def test_of_two_with_one_address_the_one_that_is_known_is_used() -> None:
    first, second = member("a"), member("b")
    for known, used in (({}, "a"), ({"m/decode/b": "uid-b"}, "b")):
        found = sort_out(MemberSet((first, second)), [DECODE], known)
        assert list(found.pools[DECODE].members) == [f"m/decode/{used}"]
        assert (
            found.problems[0].reason
            == f"it has the url 'http://10.0.0.1:8000' of m/decode/{used}, which is used"
        )


def test_of_two_alike_the_one_that_does_not_drain_is_used_without_a_word() -> None:
    leaving = member("a", uid="old", is_draining=True)
    assert reasons(leaving, member("a", port=2), known={"m/decode/a": "old"}) == []


def test_urls_are_as_the_config_has_them() -> None:
    found = sort_out(
        MemberSet((Member(uid="u", name="a", model="m", role="decode", url="HTTP://H:80/"),)), [DECODE], {}
    )
    assert found.pools[DECODE].members["m/decode/a"].url == "http://h:80"
    for url in (
        "ftp://h:1",
        "http://h:1/x",
        "http://0.0.0.0:1",
        "http://u:p@h:1",
        "",
        "http://h:99999",
        "h:1",
    ):
        bad = Member(uid="u", name="a", model="m", role="decode", url=url)
        assert reasons(bad)[0].startswith("its url is wrong: ")


few = st.sampled_from(["a", "b", "c"])
members = st.builds(
    lambda name, uid, port, is_draining, is_ready: member(
        name, uid, port, is_draining=is_draining, is_ready=is_ready
    ),
    few,
    few,
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
workers = st.builds(
    lambda name, uid, port, is_well, is_drained: Known(
        f"m/decode/{name}", uid, f"http://10.0.0.{port}:8000", is_well, is_drained
    ),
    few,
    few,
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)


@given(
    st.lists(members, max_size=5),
    st.lists(workers, max_size=3, unique_by=(lambda w: w.name, lambda w: w.url)),
)
def test_whatever_is_listed_no_two_workers_have_one_name_or_address(
    listed: list[Member], known: list[Known]
) -> None:
    uids = {worker.name: worker.uid for worker in known}
    found = sort_out(MemberSet(tuple(listed)), [DECODE], uids).pools[DECODE]
    changes = decide(found, known)
    stay = [worker for worker in known if changes.fates[worker.name] in (Fate.STAY, Fate.DRAIN)]
    there = [(w.name, w.url) for w in stay] + [(name, one.url) for name, one in changes.joining]
    # Those that are removed are still there until their legs have ended.
    there += [(w.name, w.url) for w in known if changes.fates[w.name] is Fate.REMOVE]
    assert len({name for name, _ in there}) == len({url for _, url in there}) == len(there)
    assert all(not one.is_draining and one.is_ready for _, one in changes.joining)


@given(st.lists(workers, max_size=3, unique_by=lambda w: w.name))
def test_an_empty_list_drops_nobody_who_answers(known: list[Known]) -> None:
    fates = decide(Listed(), known).fates
    for worker in known:
        stays = worker.is_well and not worker.is_drained
        assert fates[worker.name] is (Fate.STAY if stays else Fate.REMOVE)
