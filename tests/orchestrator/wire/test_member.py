from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wire.member import (
    MAX_FILE_BYTES,
    MAX_MEMBERS,
    Member,
    file_name,
    read_members,
    remove_member,
    write_member,
)


def member(uid: str = "u0", name: str = "0", **more: object) -> Member:
    fields = {"uid": uid, "name": name, "model": "a/b", "role": "decode", "url": "http://h:1"} | more
    return msgspec.convert(fields, Member)


def test_a_folder_has_what_was_written(tmp_path: Path) -> None:
    written = [member(), member("u1", "1", zone="z", is_draining=True, revision="r")]
    for one in written:
        write_member(tmp_path / "members", one)
    assert read_members(tmp_path / "members").members == tuple(written)


def test_roles_and_models_with_the_same_names_have_files_of_their_own(tmp_path: Path) -> None:
    for role, model in (("prefill", "m"), ("decode", "m"), ("decode", "n")):
        write_member(tmp_path, member(role=role, model=model))
    assert len(read_members(tmp_path).members) == 3


def test_a_later_start_replaces_the_file_of_an_earlier_one_and_outlives_its_removal(tmp_path: Path) -> None:
    write_member(tmp_path, member("first"))
    write_member(tmp_path, member("second"))
    remove_member(tmp_path, "first")
    assert [one.uid for one in read_members(tmp_path).members] == ["second"]
    remove_member(tmp_path, "second")
    assert read_members(tmp_path).members == ()
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_for_a_file_has_one_all_the_same(tmp_path: Path) -> None:
    write_member(tmp_path, member(name="n" * 256, model="ü" * 256))
    assert len(read_members(tmp_path).members) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"uid": 3}', b" " * (MAX_FILE_BYTES + 1)],
)
def test_a_file_of_garbage_is_named_with_whose_it_is_and_the_others_are_read(
    content: bytes, tmp_path: Path
) -> None:
    write_member(tmp_path, member())
    name = file_name("a/b", "decode", "bad")
    (tmp_path / name).write_bytes(content)
    found = read_members(tmp_path)
    assert [one.uid for one in found.members] == ["u0"]
    assert [(problem.place, problem.key) for problem in found.problems] == [(name, ("a/b", "decode", "bad"))]
    assert found.problems[0].reason


def test_drafts_and_other_files_are_no_members(tmp_path: Path) -> None:
    (tmp_path / ".1.draft").write_text("{")
    (tmp_path / ".x.json").write_text("{")
    (tmp_path / "notes.txt").write_text("x")
    assert read_members(tmp_path) == read_members(tmp_path)
    assert read_members(tmp_path).problems == ()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\nb", "a b", 'a"', "é", "a" * 257, "a\x00"])
def test_a_hostile_name_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    path.write_bytes(msgspec.json.encode([dict(member_fields(), name=name)]))
    found = read_members(path)
    assert found.members == ()
    assert [problem.place for problem in found.problems] == ["entry 0"]


def member_fields() -> dict[str, object]:
    return {"uid": "u", "name": "0", "model": "m", "role": "decode", "url": "http://h:1"}


def test_a_list_may_be_yaml_whose_scalars_are_taken_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "members.yaml"
    path.write_text(
        "- {uid: 017, name: 0, model: no, role: decode, url: 'http://h:1', is_draining: true, zone: 1e3}\n"
        "- {uid: u, name: x, model: m, role: cook, url: 'http://h:2'}\n"
    )
    found = read_members(path)
    expected = member("017", "0", model="no", zone="1e3", is_draining=True)
    assert found.members == (expected,)
    assert [(problem.place, problem.key) for problem in found.problems] == [("entry 1", ("m", "cook", "x"))]


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize("content", ["", "x", "{", "{}", "[" * 20_000, "- &a [*a]\n- *b", "\t- x", "\ud800"])
def test_a_file_that_is_no_list_says_so(content: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"members.{suffix}"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"\w"):
        read_members(path)


def test_a_file_that_is_too_large_or_absent_says_so(tmp_path: Path) -> None:
    path = tmp_path / "members.yaml"
    with pytest.raises(OSError, match="No such file"):
        read_members(path)
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ValueError, match="bytes"):
        read_members(path)


def test_a_list_that_is_too_long_is_cut_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    path.write_bytes(msgspec.json.encode([member(f"u{i}", str(i)) for i in range(MAX_MEMBERS + 1)]))
    found = read_members(path)
    assert len(found.members) == MAX_MEMBERS
    assert "first" in found.problems[0].reason


@given(st.binary(max_size=200))
def test_no_content_does_more_than_raise_what_is_promised(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    for name in ("a.json", "a.yaml"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(content)
        with contextlib.suppress(ValueError):
            read_members(path)
