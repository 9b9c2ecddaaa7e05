from __future__ import annotations

from pathlib import Path

import pytest

from bench.compare import routers
from bench.compare.routers import ROUTERS, Router, Site
from orchestrator.config.file import load_config
from orchestrator.form import FORM_ENV
from orchestrator.wire.info import STREAMS_ENV


def named(name: str) -> Router:
    return next(router for router in ROUTERS if router.name == name)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(port=18000, prefill=18001, decode=18002, folder=tmp_path)


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(routers, "PEERS", tmp_path / "peers")
    for name in ("vllm-router", "sglang-router"):
        assert named(name).lacks() == f"{name} is not in peers (make bench installs it)"


@pytest.mark.processes  # nginx and wrk are asked for theirs, where they are installed
def test_peer_is_there_with_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "lib/python3.11/site-packages/vllm_router-0.1.17.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-router\nVersion: 0.1.17\n")
    monkeypatch.setattr(routers, "PEERS", tmp_path)
    assert named("vllm-router").lacks() is None
    assert routers.versions()["vllm-router"] == "0.1.17"


def test_missing_nginx_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "_nginx_program", lambda: None)
    assert named("nginx").lacks() == "nginx is not installed (Debian: apt-get install nginx-light)"


def test_baton_runs_with_its_defaults(site: Site) -> None:
    config = load_config(named("baton").command(site)[-1])
    assert config.orchestrator.listen == "127.0.0.1:18000"
    assert config.orchestrator.log.access
    assert [pool.urls for _, pool in config.models[0].pools()] == [
        ["http://127.0.0.1:18001"],
        ["http://127.0.0.1:18002"],
    ]


@pytest.mark.parametrize("transport", ["json", "orjson", "msgpack"])
def test_every_transport_has_a_row(transport: str) -> None:
    assert transport in [router.env.get("BATON_TRANSPORT") for router in ROUTERS]


def test_both_ways_to_a_worker_have_a_row_in_both_forms() -> None:
    rows = {
        name: tuple(named(name).env[variable] for variable in (STREAMS_ENV, FORM_ENV))
        for name in ("baton", "baton-mux", "baton-compiled", "baton-mux-compiled")
    }
    assert rows == {
        "baton": ("http", "pure"),
        "baton-mux": ("mux", "pure"),
        "baton-compiled": ("http", "compiled"),
        "baton-mux-compiled": ("mux", "compiled"),
    }


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
def test_router_is_told_where_to_listen_and_what_decodes(router: Router, site: Site) -> None:
    told = " ".join(router.command(site)) + "".join(
        file.read_text() for file in site.folder.iterdir() if file.is_file()
    )
    assert "18000" in told
    assert "18002" in told
