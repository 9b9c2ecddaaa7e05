from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from launch.local.logs import TAIL_BYTES, likely_cause, make_run_directory, tail


def test_run_directories_lie_where_the_user_is(tmp_path: Path) -> None:
    made = make_run_directory({}, tmp_path)
    assert re.fullmatch(r"\.baton/run-\d{8}-\d{6}-\d+", str(made))
    assert (tmp_path / made).is_dir()


def test_or_in_the_state_directory(tmp_path: Path) -> None:
    (tmp_path / ".baton").touch()  # a file in the way, as root may write everywhere
    made = make_run_directory({"XDG_STATE_HOME": str(tmp_path / "state")}, tmp_path)
    assert made.parent == tmp_path / "state" / "baton"
    assert made.is_dir()


def test_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * TAIL_BYTES + b"\n" + b"\x1b[31mred\x1b[0m\nlast \xff\n")
    assert tail(log, 2) == ["red", "last \N{REPLACEMENT CHARACTER}"]
    assert tail(tmp_path / "none", 2) == []


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("/usr/bin/python: No module named vllm", "vLLM is not installed"),
        ("ModuleNotFoundError: No module named 'vllm'", "vLLM is not installed"),
        ("ModuleNotFoundError: No module named 'foo'", "a Python module is missing"),
        ("OSError: [Errno 98] Address already in use", "another process listens"),
        ("OSError: [Errno 99] error while attempting to bind", "its host is not an address"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "the GPU's memory is too small"),
        ("ValueError: Free memory on device cuda:0 (3/79 GiB) on startup is less than desired", "others use"),
        ("ValueError: No available memory for the cache blocks. Try", "too little memory for the KV cache"),
        ("RuntimeError: No CUDA GPUs are available", "there is no such GPU here"),
        ("RuntimeError: Failed to infer device type", "there is no such GPU here"),
        ("OSError: x is not a local folder and is not a valid model identifier", "the model was not found"),
        ("api_server.py: error: unrecognized arguments: --nonsense", "does not know one of the args"),
        ("OSError: [Errno 28] No space left on device", "the disk, or /dev/shm, is full"),
    ],
)
def test_likely_causes(line: str, cause: str) -> None:
    found = likely_cause(["INFO: starting", line, "RuntimeError: Engine core initialization failed."], 1)
    assert found is not None
    assert cause in found


def test_no_cause_is_better_than_a_wrong_one() -> None:
    assert likely_cause(["something else"], 1) is None
    assert "ran out of memory" in (likely_cause([], -signal.SIGKILL) or "")
