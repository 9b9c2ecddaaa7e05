from __future__ import annotations

import contextlib
import os
import re
import socket
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


NO_FILES = {"fifo": "a FIFO", "socket": "a socket", "device": "a device", "directory": "a directory"}


def put(kind: str, path: Path) -> None:
    """Put something at a path that is no regular file."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):  # such paths must be short
            made.bind(path.name)


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_passed_over_and_named(kind: str, tmp_path: Path) -> None:
    write_member(tmp_path, member())
    put(kind, tmp_path / "f.json")
    found = read_members(tmp_path)
    assert [one.uid for one in found.members] == ["u0"]
    assert [problem.place for problem in found.problems] == ["f.json"]
    assert re.search(f"passed over: Is {NO_FILES[kind]}", found.problems[0].reason)
    assert found.is_whole  # it keeps no worker that is listed no more


@pytest.mark.parametrize("kind", sorted(NO_FILES.keys() - {"directory"}))
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_list_that_is_no_file_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"list.{suffix}"
    put(kind, path)
    with pytest.raises(OSError, match=f"Is {NO_FILES[kind]}"):
        read_members(path)


@pytest.mark.parametrize("kind", [*NO_FILES, "garbage", "link"])
def test_a_member_is_removed_whatever_lies_beside_its_file(kind: str, tmp_path: Path) -> None:
    write_member(tmp_path, member())
    odd = tmp_path / "a.json"  # comes before it
    if kind == "garbage":
        odd.write_text("{")
    elif kind == "link":
        odd.symlink_to(odd)
    else:
        put(kind, odd)
    remove_member(tmp_path, "u0")
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_removal_that_cannot_be_sure_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "a.json")
    with pytest.raises(OSError, match="symbolic links"):
        remove_member(tmp_path, "u0")


def test_links_are_followed_and_one_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    write_member(tmp_path / "elsewhere", member())
    folder = tmp_path / "members"
    folder.mkdir()
    (folder / "good.json").symlink_to(next((tmp_path / "elsewhere").iterdir()))
    (folder / "gone.json").symlink_to(tmp_path / "nothing")
    (folder / "self.json").symlink_to(folder / "self.json")
    found = read_members(folder)
    assert [one.uid for one in found.members] == ["u0"]
    assert {problem.place: problem.reason for problem in found.problems} == {
        "gone.json": "it is a link to a file that is not there",
        "self.json": "it cannot be read: Too many levels of symbolic links",
    }
    assert not found.is_whole  # a member may be behind either


WHY = [
    (b"", "it is empty"),
    (b" \n", "it is empty"),
    (b"{", "JSON is malformed: it ends too early"),
    (b"[]", "it has not the fields of a member"),
    (b"{}", "uid is missing"),
    (b'{"uid": "\xff"}', "it is not UTF-8"),
    ({"name": "a b"}, "name is wrong: it has letters, digits and . _ : - [ ] only, and begins with"),
    ({"name": ""}, "name is wrong: it is empty"),
    ({"name": "a" * 300}, "name is wrong: it has more than 256 characters"),
    ({"role": "cook"}, "role is wrong: 'cook' is none of prefill, decode, both"),
    ({"uid": 3}, "uid is wrong: expected `str`, got `int`"),
]


@pytest.mark.parametrize(("content", "why"), WHY)
def test_what_is_wrong_with_a_member_is_said_in_plain_words(
    content: bytes | dict[str, object], why: str, tmp_path: Path
) -> None:
    is_entry = isinstance(content, dict)
    encoded = msgspec.json.encode(member_fields() | content) if isinstance(content, dict) else content
    (tmp_path / "x.json").write_bytes(encoded)
    assert read_members(tmp_path).problems[0].reason.startswith(why)
    if is_entry and "uid" not in content:  # in a list numbers may stand for strings
        path = tmp_path / "list.json"
        path.write_bytes(b"[" + encoded + b"]")
        assert read_members(path).problems[0].reason.startswith(why)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize(
    ("content", "why"), [(b"", "it is empty; a list without members is []"), (b"\xff\xfe[", "UTF|YAML")]
)
def test_what_is_wrong_with_a_list_is_said_in_plain_words(
    content: bytes, why: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"list.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(why) if "|" not in why else why):
        read_members(path)
    path.write_bytes(b"[]")
    assert read_members(path).members == ()
