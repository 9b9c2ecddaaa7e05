from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.endpoints import ENDPOINTS
from orchestrator.config.options import Config
from orchestrator.errors import StartError
from orchestrator.processes.channel import Start
from orchestrator.processes.data_process import in_pieces, pieces, rows_of
from orchestrator.processes.membership import Snapshot
from orchestrator.processes.rows import SPARE_WORKERS, Rows
from orchestrator.telemetry.counters import Layout

CONFIG = Config.model_validate({"models": [{"name": "m", "both": {"urls": ["http://127.0.0.1:1"]}}]})

# --- rows ---------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> Iterator[Rows]:
    made = Rows.create(Layout(["m"], ENDPOINTS), 1 + SPARE_WORKERS, 3)
    yield made
    made.close()


def start(rows: Rows, row_size: int) -> Start:
    return Start(
        index=0,
        row=1,
        rows=rows.count,
        row_size=row_size,
        slots=1 + SPARE_WORKERS,
        config=b"",
        transport="json",
        started=0.0,
        keys=None,
        snapshot=Snapshot(1, ()),
    )


def test_a_process_finds_the_rows_of_its_supervisor(rows: Rows) -> None:
    mapped = rows_of(os.dup(rows.fd), CONFIG, start(rows, rows.row_size))
    mapped.telemetry(1)[0] = 5
    assert rows.in_flight(1) == 5


def test_a_process_of_another_version_does_not_touch_them(rows: Rows) -> None:
    with pytest.raises(StartError, match="another version is installed"):
        rows_of(rows.fd, CONFIG, start(rows, rows.row_size + 8))


# --- lines --------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=30).map(lambda text: text.replace(b"\n", b" ") + b"\n")))
def test_pieces_are_whole_lines_and_short(lines: list[bytes]) -> None:
    found = list(pieces(b"".join(lines), limit=20))
    assert b"".join(found) == b"".join(lines)
    assert all(piece.endswith(b"\n") for piece in found)
    assert all(len(piece) <= 20 or piece.count(b"\n") == 1 for piece in found)


def test_a_pipe_gets_pieces_and_a_file_gets_all_at_once(tmp_path: Path) -> None:
    lines = b"a line\n" * 1000
    reading, writing = os.pipe()
    try:
        assert len(written(lines, writing)) == 2
    finally:
        os.close(reading)
        os.close(writing)
    with (tmp_path / "log").open("wb") as log:
        assert written(lines, log.fileno()) == [lines]


def written(lines: bytes, fd: int) -> list[bytes]:
    found: list[bytes] = []
    in_pieces(found.append, fd)(lines)
    assert b"".join(found) == lines
    return found
