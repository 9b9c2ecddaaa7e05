"""The output of started processes goes to logs, whose ends often tell why one has failed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_BYTES = 64 * 1024
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def make_run_directory(environ: Mapping[str, str], cwd: Path) -> Path:
    """Make a new directory `.baton/run-TIME-PID` in `cwd`, or below the user's state directory if that cannot
    be written. The result is relative to `cwd` where it can be, as it is printed. Raises `OSError` if neither
    can be made.
    """
    name = f"run-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    state = state_directory(environ)
    try:
        return _made(cwd / ".baton" / name).relative_to(cwd)
    except OSError as here:
        try:
            return _made(state / name)
        except OSError as there:
            why = f"{cwd / '.baton'}: {here.strerror}; {state}: {there.strerror}"
            raise OSError(why) from there


def state_directory(environ: Mapping[str, str]) -> Path:
    """Return where the runs are whose own directory could not be written."""
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "baton"


def _made(path: Path) -> Path:
    path.mkdir(parents=True, mode=0o700)
    return path


def tail(log: Path, lines: int) -> list[str]:
    """Return the last lines without colours; nothing if the file cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return _ANSI.sub("", text).splitlines()[-lines:]


# A log says this and means that; the most telling come first: an engine's last line is seldom the reason.
_CAUSES: Sequence[tuple[str, str]] = (
    (
        r"No module named '?vllm",
        "vLLM is not installed in this environment: run `make setup`, or `pip install vllm`",
    ),
    (r"No module named '?nixl|NIXL is not available", "NIXL is not installed in this environment"),
    (r"No module named \S+", "a Python module is missing in this environment"),
    (r"address already in use|EADDRINUSE|Errno 98", "another process listens at one of its ports"),
    (r"Cannot assign requested address|Errno 99", "its host is not an address of this machine"),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "the GPU's memory is too small: lower --gpu-memory-utilization or --max-model-len",
    ),
    (
        r"Free memory on device .* is less than desired",
        "others use the GPU's memory: lower --gpu-memory-utilization",
    ),
    (
        r"No available memory for the cache blocks|KV cache is needed, which is larger than",
        "too little memory for the KV cache: lower --max-model-len, or raise --gpu-memory-utilization"
        " (on a CPU: VLLM_CPU_KVCACHE_SPACE)",
    ),
    (
        r"No CUDA GPUs are available|Found no NVIDIA driver|CUDA_ERROR_NO_DEVICE|invalid device ordinal"
        r"|Failed to infer device type|No CUDA runtime is found",
        "there is no such GPU here: set device: cpu, or check gpus",
    ),
    (r"CUDA driver version is insufficient", "the NVIDIA driver is too old for this PyTorch"),
    (
        r"Repository Not Found|is not a valid model identifier|is not a local folder"
        r"|Can't load the configuration of|Invalid repository ID or local directory",
        "the model was not found: check its path",
    ),
    (r"GatedRepo|401 Client Error|gated repo", "the hub refuses this model: set HF_TOKEN"),
    (
        r"ConnectionError|Max retries exceeded|Name or service not known|LocalEntryNotFound|offline mode",
        "the model could not be downloaded: no network, or HF_HUB_OFFLINE is set",
    ),
    (r"unrecognized arguments?:|error: argument", "the engine does not know one of the args"),
    (r"No space left on device", "the disk, or /dev/shm, is full"),
    (r"Too many open files", "too many open files: raise `ulimit -n`"),
    (r"Permission denied", "a file or a port may not be used by this user"),
    (r"MemoryError|Cannot allocate memory", "the machine ran out of memory"),
)


def likely_cause(lines: Sequence[str], exit_code: int | None) -> str | None:
    """Return the likely cause of a failure from the end of a log; None if nothing in it is known."""
    text = "\n".join(lines)
    for pattern, cause in _CAUSES:
        if re.search(pattern, text, re.IGNORECASE):
            return cause
    if exit_code == -signal.SIGKILL:
        return "it was killed from outside: perhaps the machine ran out of memory"
    return None
