"""The command says what came of each program, and writes it into the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.clients import __main__ as command
from bench.clients.__main__ import HEAD, Row, arguments_of, clients, main, record
from bench.clients.environments import pins
from bench.clients.errors import DOCS
from bench.clients.programs import PROGRAMS, Program, Site
from bench.shared.processes import Failed


def fails(site: Site) -> str:
    raise Failed("it found 1|2")


def program(run: object, package: str = "pytest") -> Program:
    return Program("one", "", package, run)  # type: ignore[arg-type]


@pytest.mark.processes
def test_each_program_has_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = clients([program(lambda site: site.answer), program(fails)], "http://127.0.0.1:1")
    assert [row.holds for row in rows] == [True, False]
    assert rows[1].found == "it found 1\\|2"
    assert "FAILED: it found" in capsys.readouterr().out


@pytest.mark.processes
def test_what_is_not_there_has_its_row() -> None:
    (row,) = clients([program(fails, "no-such-package")], "http://127.0.0.1:1")
    assert (row.version, row.holds) == ("-", False)


def test_the_last_run_is_written_into_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "clients.md"
    docs.write_text(DOCS.read_text())
    monkeypatch.setattr(command, "DOCS", docs)
    for name in ("first", "second"):
        record([Row(name, "1", "well", True, 0.5)])
    before, _, after = DOCS.read_text().partition(HEAD)
    found = docs.read_text()
    assert found.startswith(
        f"{before}{HEAD}\n|---|---|---|---|\n| second | 1 | well | 0.5 |\n\nLast run on 2"
    )
    assert found.partition(", ")[2].rpartition(", ")[2] == after.rpartition(", ")[2]


def test_the_docs_tell_of_all_programs() -> None:
    text = DOCS.read_text().partition(HEAD)[2].partition("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert rows == [program.name for program in PROGRAMS]
    assert "FAILED" not in text


def test_environments_are_pinned() -> None:
    used = {program.environment for program in PROGRAMS} - {"", "node"}
    assert set(pins()) == used


def test_a_name_that_no_program_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "arguments_of", lambda: arguments_of(["--only", "nobody"]))
    with pytest.raises(Failed, match="no such program"):
        main()
