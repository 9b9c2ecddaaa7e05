"""Workers that come and go in a simulation: what is told of that, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.simulate.scaled import reversals
from launch.simulate.scaler import Change
from orchestrator.scaling.roles import Wish
from orchestrator.wire.info import Role
from tests.launch.simulate.sites import SLOW_PREFILL, row, trace_file

FAST = {"decode_ms_per_token": 10, "num_blocks": 1000, "block_size": 512}
RANGE = {"min": 1, "max": 6}
SCALING = {"ttft_p95_s": 10, "itl_p95_ms": 100, "down_after_s": 60}
BUSY_S = (300, 600)  # between these there are prompts for 2.5 workers, else for a half


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return written(tmp_path, SCALING)


def written(folder: Path, scaling: dict[str, Any] | None) -> Path:
    pool = {"engine": "sim", "sim": {**SLOW_PREFILL, **FAST}, "replicas": RANGE if scaling else 1}
    document = {"models": [{"name": "m", "prefill": pool, "decode": pool}], "scaling": scaling}
    path = folder / "config.yaml"
    path.write_text(json.dumps(document))
    return path


def trace(folder: Path) -> str:
    """A prompt keeps a worker busy for a second."""
    rows: list[dict[str, Any]] = []
    at_ms = 0.0
    while at_ms < 900_000:
        rows.append(row(at_ms, 100, answer=10))
        at_ms += 400 if BUSY_S[0] <= at_ms / 1e3 < BUSY_S[1] else 2000
    return trace_file(folder, rows)


def simulated(site: Path, folder: Path, *more: str) -> list[str]:
    return ["simulate", str(site), "--trace", trace(folder), "--scale", "--start-s", "20", *more]


def test_workers_come_and_go(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = simulated(site, tmp_path)
    assert cli.main([*words, "-o", "json"]) == 0
    [found] = json.loads(capsys.readouterr().out).values()
    wanted = [(each["at_s"], each["wanted"]) for each in found["changes"] if each["role"] == "prefill"]
    most = max(count for _, count in wanted)
    assert 4 <= most <= 6
    assert BUSY_S[0] < next(at_s for at_s, count in wanted if count >= 3) < BUSY_S[0] + 90
    assert wanted[-1][1] < most
    assert all(each["why"] for each in found["changes"])
    assert set(found["reversals"]) == {"prefill", "decode"}
    assert found["reversals"]["prefill"] <= 4
    assert found["good"] > 0.8
    best = found["constant"]
    assert (best["prefill"] >= 3, best["decode"]) == (True, 1)
    # 0.25 h of at least two workers; the constant number is there all the time.
    assert 0.5 < found["worker_hours"] < 0.25 * (most + 2)
    assert found["constant_worker_hours"] == pytest.approx(0.25 * (best["prefill"] + 1), rel=0.02)
    assert found["ratio"] == pytest.approx(found["worker_hours"] / found["constant_worker_hours"])
    assert cli.main(words) == 0
    head, *changes = capsys.readouterr().out.splitlines()
    assert f"{found['ratio']:.2f} times those of the best constant: " in "\n".join([head, *changes])
    assert any(line.endswith(f"prefill {most}: " + why(found, "prefill", most)) for line in changes)


def why(found: dict[str, Any], role: str, wanted: int) -> str:
    return next(
        str(each["why"]) for each in found["changes"] if (each["role"], each["wanted"]) == (role, wanted)
    )


def test_where_no_number_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = written(tmp_path, {**SCALING, "ttft_p95_s": 0.5})  # a prompt takes twice as long
    assert cli.main(simulated(site, tmp_path)) == 0
    assert "no constant number of workers is enough" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "scaling", "says"),
    [
        (["--trace", "t"], None, "--scale goes by the section `scaling`, which the config has not"),
        (["--trace", "t", "--advise"], SCALING, "--scale looks for the fewest workers by itself"),
        (["--calibrate", "r"], SCALING, "--scale needs --trace FILE"),
    ],
)
def test_what_is_refused(
    words: list[str],
    scaling: dict[str, Any] | None,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["simulate", str(written(tmp_path, scaling)), "--scale", *words]) != 0
    out, err = capsys.readouterr()
    assert (out, says in err) == ("", True), err


def test_reversals_are_turns_of_one_role() -> None:
    assert reversals(changes(1, 2, 3, 2, 3), "prefill") == 2
    assert reversals(changes(1, 2, 3, 4), "prefill") == 0
    assert reversals(changes(), "prefill") == 0
    assert reversals(changes(3, 1), "decode") == 0


def changes(*wanted: int) -> list[Change]:
    role: Role = "prefill"
    return [Change(float(at), Wish("m", role, count, 1, 0, 0, "so it is")) for at, count in enumerate(wanted)]
