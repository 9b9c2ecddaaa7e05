"""Slips of the hand in a config, its engines' arguments or the environment: the whole of what is said."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from launch.cli import main
from launch.engines import flags
from launch.engines.flags import Known, count_gpus, missing_gpus
from launch.exits import Exit
from orchestrator.config.file import load_config
from orchestrator.config.options import DEFAULT_SEATS

SIM = "models: [{name: m, both: {engine: sim%s}}]\n"
VLLM = "models: [{name: m, path: a/b, both: {device: cuda%s}}]\n"
KNOWN = Known(
    frozenset({"--max-model-len", "--max-num-seqs", "--enable-prefix-caching", "--tensor-parallel-size"}),
    are_all=True,
)

WRONG = {
    "a number beyond all bounds": (
        SIM % f", replicas: {10**23}",
        f"c.yaml:1:40: replicas: the number {10**23} is too large\n",
    ),
    "too many workers": (
        SIM % ", replicas: 50000",
        "c.yaml:1:40: replicas: must be at most 4096, got 50000\n",
    ),
    "too many workers in all": (
        "models:\n  - {name: m, both: {engine: sim, replicas: 4096}}\n  - {name: n, both: {engine: sim}}\n",
        "c.yaml:1:1: there are 4097 workers in all, at most 4096 are possible\n",
    ),
    "too many GPUs for each": (
        VLLM % f", gpus_per_replica: {2**50}",
        f"c.yaml:1:52: gpus_per_replica: must be at most 1024, got {2**50}\n",
    ),
    "too many processes": (
        f"orchestrator: {{processes: {2**40}}}\n{SIM % ''}",
        f"c.yaml:1:16: processes: must be at most 256, got {2**40}\n",
    ),
    "a backlog that no kernel takes": (
        f"orchestrator: {{backlog: {2**40}}}\n{SIM % ''}",
        f"c.yaml:1:16: backlog: must be at most 2.14748e+09, got {2**40}\n",
    ),
    "an age of the world": (
        f"launch: {{start_timeout_s: 1e300}}\n{SIM % ''}",
        "c.yaml:1:10: start_timeout_s: must be at most 1e+09, got 1e+300\n",
    ),
    "a merge key": (
        "models: [{name: m, prefill: &x {engine: sim}, decode: {<<: *x}}]\n",
        "c.yaml:1:56: merge keys (<<) are of YAML 1.1, and this is YAML 1.2: write the keys out, or repeat "
        "an alias\n",
    ),
    "a variable": (
        f"orchestrator: {{listen: '${{HOST}}:22000'}}\n{SIM % ''}",
        "c.yaml:1:16: ${HOST} stands for itself: this file has no variables; --set KEY.PATH=VALUE gives one "
        "value\n",
    ),
    "a variable of a shell": (
        f"orchestrator: {{api_keys_file: $HOME/keys}}\n{SIM % ''}",
        "c.yaml:1:16: $HOME stands for itself: this file has no variables; --set KEY.PATH=VALUE gives one "
        "value\n",
    ),
    "a key of the file in a section": (
        f"launch: {{base_port: 9000}}\n{SIM % ''}",
        "c.yaml:1:10: unknown key 'base_port', it belongs at the top of the file\n",
    ),
    "a key of a section in another": (
        SIM % ", request_timeout_s: 3",
        "c.yaml:1:40: unknown key 'request_timeout_s', it belongs in orchestrator.limits\n",
    ),
    "a key of a pool in the file": (
        f"seats: 3\n{SIM % ''}",
        "c.yaml:1:1: unknown key 'seats', it belongs in models.*.ROLE\n",
    ),
    "a key with a line break": (
        f'"a\\nb": 1\n{SIM % ""}',
        "c.yaml:1:1: unknown key 'a\\nb' (known keys: orchestrator, models, routing, health, scaling, "
        "launch, aliases, base_port)\n",
    ),
    "a variable's name that is none": (
        SIM % ", env: {'A=B': x}",
        "c.yaml:1:46: A=B: expected the name of a variable, got 'A=B'\n",
    ),
    "a NUL in a variable": (
        SIM % ', env: {A: "x\\0"}',
        "c.yaml:1:46: A: no program can be given a NUL character\n",
    ),
    "an argument of vLLM": (
        VLLM % ", args: [--max-modle-len, 5]",
        "c.yaml:1:59: the engine knows no argument --max-modle-len, did you mean --max-model-len?\n",
    ),
    "an argument with underscores and a value": (
        VLLM % ", args: [--max_num_sqes=5]",
        "c.yaml:1:59: the engine knows no argument --max-num-sqes, did you mean --max-num-seqs?\n",
    ),
    "more parts than GPUs": (
        VLLM % ', args: [--tensor-parallel-size, "2", -pp=2]',
        "c.yaml:1:31: --tensor-parallel-size 2 and --pipeline-parallel-size 2 need 4 GPUs for each worker, "
        "and gpus_per_replica is 1\n",
    ),
    "more parts than a worker's GPUs": (
        VLLM % ", args: [-tp, 2], workers: [{gpus: [0]}]",
        "c.yaml:1:78: --tensor-parallel-size 2 needs 2 GPUs for each worker, and worker 0 has 1\n",
    ),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flags, "known_flags", lambda engine: KNOWN)
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_what_check_says(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = WRONG[case]
    Path("c.yaml").write_text(textwrap.dedent(text))
    begun = time.process_time()
    assert main(["check", "c.yaml"]) == Exit.USAGE
    assert time.process_time() - begun < 30.0  # seconds of CPU, whatever the file says
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", expected)


@pytest.mark.parametrize(
    "pool",
    [
        ", args: [--max-model-len, 5, --no-enable-prefix-caching, --max-num-seq=3, -tp, 1]",
        ", args: [--nothing-that-is-known]",  # newer than what is known here
        ", gpus_per_replica: 4, args: [--tensor-parallel-size=2]",
        ", args: [-tp, 8, --distributed-executor-backend, ray]",  # on several machines
        ', args: ["$HOME"], env: {A: "${B}"}',  # the engine's own business
        ", workers: [{host: 10.0.0.1, args: [--max-modle-len, 5]}]",  # another machine's vLLM
    ],
)
def test_what_is_right(
    pool: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.engines.flags.count_gpus", lambda: None)
    Path("c.yaml").write_text(VLLM % pool)
    assert main(["check", "c.yaml"]) == Exit.OK
    assert capsys.readouterr() == ("c.yaml: right; models: m\n", "")


def test_the_most_workers_take_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(SIM % ", replicas: 4096")
    begun = time.process_time()
    assert main(["check", "c.yaml"]) == Exit.OK
    assert time.process_time() - begun < 30.0  # a fifth on a quiet machine; it was minutes
    assert capsys.readouterr().out == "c.yaml: right; models: m\n"


@pytest.mark.parametrize("command", ["check", "plan", "up"])
def test_a_transport_that_there_is_not(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_TRANSPORT", "foo")
    Path("c.yaml").write_text(SIM % "")
    assert main([command, "c.yaml"]) == Exit.USAGE
    shown = capsys.readouterr()
    where = "" if command == "check" else "c.yaml: "
    assert shown.err == f"{where}BATON_TRANSPORT must be one of json, orjson, msgpack, not 'foo'\n"
    assert shown.out == ""


# --- GPUs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (None, []),
        (4, []),
        (1, ["b needs GPU 1, 2, and this machine has only 1"]),
        (0, ["a needs GPU 0, and this machine has none", "b needs GPU 1, 2, and this machine has none"]),
    ],
)
def test_gpus_that_the_machine_has_not(count: int | None, expected: list[str]) -> None:
    assert [*missing_gpus({"a": [0], "b": [1, 2], "c": []}, count)] == expected


def test_gpus_that_nobody_can_count_are_none_that_are_missing() -> None:
    assert count_gpus(lambda path: path == "/dev/kfd") is None


def test_up_starts_nothing_without_its_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.up.count_gpus", lambda: 0)
    monkeypatch.setattr("launch.engines.flags.count_gpus", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Path("c.yaml").write_text(VLLM % "")
    assert main(["up", "c.yaml"]) == Exit.START_FAILED
    assert capsys.readouterr().err == "m/both/0 needs GPU 0, and this machine has none\n"
    assert main(["check", "c.yaml"]) == Exit.OK  # it may be for another machine
    assert capsys.readouterr().err == "note: m/both/0 needs GPU 0, and this machine has none\n"


# --- seats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "seats"),
    [
        ("", DEFAULT_SEATS),
        (", args: [--max-num-seqs, 32]", 32),
        (", args: [--max-num-seqs=32]", 32),
        (", args: [--max_num_seqs, '8', --max-num-seqs, 16]", 16),
        (", args: [--max-num-seqs, 32], seats: 5", 5),
        (", args: [--max-num-seqs, many]", DEFAULT_SEATS),
        (", args: [--max-num-seqs]", DEFAULT_SEATS),
        (", args: [--max-num-seqs, 8], workers: [{args: [--max-num-seqs, 4]}, {}]", 4),
    ],
)
def test_seats_are_those_that_the_engine_is_given(pool: str, seats: int) -> None:
    Path("c.yaml").write_text(SIM % pool)
    config = load_config("c.yaml")
    assert config.models[0].both is not None
    assert config.models[0].both.seats == seats
    again = type(config).model_validate_json(config.model_dump_json())  # as other processes get it
    assert again.models[0].both is not None
    assert again.models[0].both.seats == seats


def test_seats_of_prefill_workers_are_not_given_by_that() -> None:
    pool = "{engine: sim, args: [--max-num-seqs, 8]}"
    Path("c.yaml").write_text(f"models: [{{name: m, prefill: {pool}, decode: {pool}}}]\n")
    load_config("c.yaml")


# --- files that are none ------------------------------------------------------------------------


def test_a_fifo_that_nobody_writes_into_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("c.yaml")
    assert main(["check", "c.yaml"]) == Exit.USAGE
    assert capsys.readouterr().err == "c.yaml: Is a FIFO into which nobody has written for 2 s\n"


def test_a_fifo_with_a_writer_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("c.yaml")
    writer = threading.Thread(target=lambda: Path("c.yaml").write_text(SIM % ""))
    writer.start()
    assert main(["check", "c.yaml"]) == Exit.OK
    writer.join()
    assert capsys.readouterr().out == "c.yaml: right; models: m\n"


# --- Ctrl-C -------------------------------------------------------------------------------------

INTERRUPTED = """\
import builtins, launch.cli, sys
original = builtins.__import__
def interrupted(name, *arguments, **named):
    if name == {name!r}:
        raise KeyboardInterrupt
    return original(name, *arguments, **named)
builtins.__import__ = interrupted
sys.exit(launch.cli.main({argv!r}))
"""


@pytest.mark.processes
@pytest.mark.parametrize("name", ["argparse", "orchestrator.config.file", "pydantic", "yaml", "launch.plan"])
def test_ctrl_c_during_imports_ends_without_a_word(name: str) -> None:
    Path("c.yaml").write_text(SIM % "")
    code = INTERRUPTED.format(name=name, argv=["plan", "c.yaml"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (Exit.INTERRUPTED, "", "")
