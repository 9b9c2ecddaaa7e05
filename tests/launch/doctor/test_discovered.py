from __future__ import annotations

from pathlib import Path

from launch.doctor.discovered import with_discovered
from launch.doctor.findings import Finding, Verdict
from orchestrator.config.addresses import worker_addresses
from orchestrator.config.options import Config
from orchestrator.wire.member import Member, write_member


def config_of(folder: Path) -> Config:
    pool = {"discover": {"file": str(folder)}, "seats": 4}
    discovered = {"name": "m", "prefill": {"discover": {"file": str(folder)}}, "decode": pool}
    return Config.model_validate({"models": [discovered, {"name": "n", "both": {"urls": ["http://h:1"]}}]})


def test_those_that_serve_are_examined_as_urls(tmp_path: Path) -> None:
    for role, name, port, more in (
        ("prefill", "p", 1, {}),
        ("decode", "a", 2, {}),
        ("decode", "b", 3, {"is_draining": True}),
        ("decode", "c", 2, {}),
    ):
        url = f"http://10.0.0.1:{port}"
        write_member(tmp_path, Member(uid=name, name=name, model="m", role=role, url=url, **more))  # type: ignore[arg-type]
    found: list[Finding] = []
    config = with_discovered(config_of(tmp_path), 10, found.append)
    assert [(one.name, one.url) for one in worker_addresses(config)] == [
        ("m/prefill/0", "http://10.0.0.1:1"),
        ("m/decode/0", "http://10.0.0.1:2"),
        ("n/both/0", "http://h:1"),
    ]
    assert config.models[0].decode is not None
    assert config.models[0].decode.seats == 4
    assert [(one.verdict, one.check) for one in found] == [
        (Verdict.OK, "discover"),
        (Verdict.WARN, "discover"),
    ]
    assert "it has the url 'http://10.0.0.1:2'" in found[1].found


def test_a_source_that_is_away_or_empty_is_told(tmp_path: Path) -> None:
    config = config_of(tmp_path / "absent")
    found: list[Finding] = []
    assert with_discovered(config, 10, found.append) is config
    (tmp_path / "absent").mkdir()
    with_discovered(config, 10, found.append)
    assert [one.verdict for one in found] == [Verdict.FAIL, Verdict.WARN]
    assert "No such file or directory" in found[0].line()


def test_a_config_without_a_source_stays_as_it_is() -> None:
    config = Config.model_validate({"models": [{"name": "n", "both": {"urls": ["http://h:1"]}}]})
    assert with_discovered(config, 10, lambda finding: None) is config
