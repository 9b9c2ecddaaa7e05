from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from bench.shared.figures import Column
from bench.shared.processes import ROOT, python
from bench.transport.legs import AGAIN, ARMS, BASE, Arm, Prompt
from bench.transport.model import VOCABULARY, write_model
from bench.transport.plot import save_plot
from bench.transport.rounds import Panel, table
from worker.token_ids import Limits, unpack

TINY = ["--sizes", "40", "--large", "50", "--streams", "16", "--rounds", "1", "--seconds", "1"]
ENCODINGS = ["--only", "bytes", "orchestrator", "worker", "streams"]
PACKED = {arm.ids: arm for arm in ARMS["chat"] if arm.ids in ("base64", "bin")}
PARAMS = "kv_transfer_params"


# --- legs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS["chat"], ids=lambda arm: arm.name)
def test_a_chat_leg_carries_its_text_or_its_ids(arm: Arm) -> None:
    prompt = Prompt("chat", 3000)
    leg = document(prompt.decode_leg(arm).body)
    texts = [message["content"] for message in leg["messages"]]
    assert ("".join(texts[1:]) == prompt.text) is (arm.ids is None)
    assert ids_of(leg[PARAMS].get("prompt_token_ids")) == (prompt.ids if arm.ids else None)


@pytest.mark.parametrize("arm", ARMS["ids"], ids=lambda arm: arm.name)
def test_a_completion_leg_carries_its_ids(arm: Arm) -> None:
    prompt = Prompt("ids", 3000)
    leg = document(prompt.decode_leg(arm).body)
    packed = leg[PARAMS].get("prompt_token_ids")
    assert ids_of(leg.get("prompt", packed)) == prompt.ids
    assert (packed is not None) is (arm.ids is not None)


def test_a_leg_that_is_too_large_for_msgpack_goes_as_json() -> None:
    arm = Arm("msgpack", "msgpack")
    small, large = Prompt("chat", 10).decode_leg(arm), Prompt("chat", 300_000).decode_leg(arm)
    assert b"x-msgpack" in small.headers
    assert b"x-msgpack" not in large.headers
    assert large.body.startswith(b"{")


def document(body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(body) if body.startswith(b"{") else msgspec.msgpack.decode(body)
    return found


def ids_of(found: Any) -> list[int] | None:
    if isinstance(found, str | bytes):
        return unpack(found, Limits(VOCABULARY, 10_000))
    return found


# --- rounds -----------------------------------------------------------------------------------------


def panel(**rows: list[float]) -> Panel:
    named = {name.replace("_", " "): [{"us": figure} for figure in figures] for name, figures in rows.items()}
    return Panel("worker", "chat", 1000, [Column("us", "us", 1)], named)


def test_only_what_the_base_does_not_differ_from_itself_by_is_marked() -> None:
    found = panel(json=4 * [100], json_again=[90, 97, 97, 104], orjson=[95, 100, 100, 105], msgpack=4 * [89])
    assert [arm for arm in found.rows if found.is_beyond_noise(arm, "us")] == ["msgpack"]
    assert found.document()["beyond_noise"]["msgpack"] == ["us"]
    lines = table(found).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["us", "min-max"],
        ["json", "100.0", "100.0-100.0"],
        ["json", "again", "97.0", "90.0-104.0"],
        ["orjson", "100.0", "95.0-105.0"],
        ["msgpack", "89.0*", "89.0-89.0"],
    ]


def test_ratios_to_the_base_are_shown_where_they_are_asked_for() -> None:
    rows = {"http": [100.0, 200.0, 300.0], "mux": [60.0, 100.0, 120.0]}
    named = {arm: [{"us": figure} for figure in figures] for arm, figures in rows.items()}
    found = Panel("worker", "events", 64, [Column("us", "us/event", 1)], named, "streams", "http", ("us",))
    assert table(found).splitlines()[0] == "worker: events, 64 streams"
    assert table(found).splitlines()[-1] == "mux: us/event: 0.500 (0.400-0.600) x http"
    assert found.document()["ratios"] == {"us": {"mux": [0.6, 0.5, 0.4]}}


def test_a_figure_that_an_arm_does_not_have_is_left_out() -> None:
    found = panel(json=4 * [1], json_again=4 * [1], quiet=4 * [math.nan])
    assert not found.is_beyond_noise("quiet", "us")
    assert found.document()["rows"]["quiet"] == 4 * [{"us": None}]
    assert table(found).splitlines()[-1].split() == ["quiet", "-", "---"]


def test_without_an_a_a_pair_or_in_a_few_rounds_nothing_is_marked() -> None:
    assert not panel(json=4 * [100], msgpack=4 * [1]).is_beyond_noise("msgpack", "us")
    assert not panel(json=[100], json_again=[100], msgpack=[1]).is_beyond_noise("msgpack", "us")


def test_plot_draws_curves_and_points(tmp_path: Path) -> None:
    one, other = panel(json=[1, 2], msgpack=[1, 1]), panel(json=[3, 4], msgpack=[5, 5])
    larger = Panel(one.section, one.series, 2000, one.columns, other.rows)
    alone = Panel("streams", one.series, 1000, one.columns, one.rows)
    save_plot([one, larger, alone], tmp_path / "result.png")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


# --- everything -------------------------------------------------------------------------------------


def test_model_has_a_tokenizer_for_all_of_its_vocabulary(tmp_path: Path) -> None:
    write_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (
        tokenizer.get_vocab_size()
        == VOCABULARY
        == json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    )
    text = Prompt("chat", 2000).text
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert 4 < len(text) / len(tokenizer.encode(text).ids) < 6


@pytest.mark.processes
def test_every_section_is_measured_for_every_encoding(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = run(*ENCODINGS, *TINY, "--output", str(output))
    assert done.returncode == 0, done.stderr
    panels = json.loads(output.read_text())["panels"]
    sections = {panel["section"] for panel in panels}
    assert sections == {
        "bytes",
        "orchestrator",
        "sim worker",
        "sim worker, 16 streams, 5 large requests a second",
    }
    for found in panels:
        assert found["rows"].keys() >= {BASE.name, "orjson", "msgpack"}
        assert found["section"] == "bytes" or BASE.name + AGAIN in found["rows"]
    assert output.with_suffix(".svg").exists()
    assert "sim worker: chat taken in, 40 tokens" in done.stdout


@pytest.mark.processes
def test_connections_are_measured_for_every_arm(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    tiny = ["--counts", "4", "--large", "50", "--rounds", "1", "--seconds", "0.2"]
    done = run("--only", "connections", *tiny, "--output", str(output))
    assert done.returncode == 0, done.stderr
    panels = json.loads(output.read_text())["panels"]
    assert [(found["series"], found["size"], found["unit"]) for found in panels] == [
        ("small requests", 32, "connections"),
        ("events", 4, "streams"),
        ("64 streams, 5 large requests a second", 50, "tokens"),
    ]
    for found in panels:
        assert list(found["rows"]) == ["http", "http again", "mux"]
        assert {"worker_us", "orchestrator_us"} <= found["ratios"].keys()
    assert "mux: orchestrator us/event: " in done.stdout
    assert output.with_suffix(".svg").exists()


@pytest.mark.processes
def test_what_cannot_be_measured_is_said_in_one_line(tmp_path: Path) -> None:
    done = run("--only", "streams", *TINY, "--seconds", "0.001", "--output", str(tmp_path / "result.json"))
    assert done.returncode == 1
    assert done.stderr == "transport: no stream had two events within 0.001 s\n"
    assert list(tmp_path.iterdir()) == []


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which it pins to a core."""
    return subprocess.run(
        python("-m", "bench.transport", *options), cwd=ROOT, capture_output=True, text=True, check=False
    )
