"""These checks look at this machine: descriptors, memory and GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.doctor.case import Case
from launch.doctor.files import weights_bytes
from launch.doctor.findings import Finding, fail, ok, warn
from launch.plan import ProcessSpec
from orchestrator.config.addresses import WorkerPlace
from orchestrator.config.descriptors import OWN, raise_limit

FEW_DESCRIPTORS = 4096
_ASK_GPUS_S = 20.0
_THIS = "this machine"
_GIB = 2**30
_ENGINE_GIB = 1.0  # what vLLM's process takes on a CPU beside weights and KV cache
_SHOWN = "CUDA_VISIBLE_DEVICES"
_GPU_SHARE = 0.9  # vLLM's --gpu-memory-utilization


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory is in MiB."""

    name: str
    total: int
    free: int


def check_descriptors(case: Case) -> Iterator[Finding]:
    limit, clients = raise_limit(), case.config.orchestrator.max_connections
    if clients is not None and clients * 2 + OWN > limit:
        found = f"a process may open {limit} descriptors, too few for max_connections: {clients}"
        yield fail("files", _THIS, found, f"raise `ulimit -n` to {clients * 2 + OWN} or more")
    elif limit < FEW_DESCRIPTORS:
        found = f"a process may open {limit} descriptors: at most {(limit - OWN) // 2} clients"
        yield warn("files", _THIS, found, "raise `ulimit -n`")
    else:
        yield ok("files", _THIS, f"a process may open {limit} descriptors")


def check_memory(case: Case) -> Iterator[Finding]:
    """Check that what workers on CPUs need, reckoned roughly, is there."""
    places = [place for place in case.here("vllm", "cpu") if place.name not in case.running]
    available = available_bytes()
    if not places or available is None:
        return
    needed = sum(_need_bytes(case, place) for place in places)
    found = (
        f"{len(places)} workers need about {needed / _GIB:.1f} GiB, and {available / _GIB:.1f} are available"
    )
    if needed > available:
        yield warn(
            "memory", _THIS, found, "take fewer workers, a smaller model, or less VLLM_CPU_KVCACHE_SPACE"
        )
    else:
        yield ok("memory", _THIS, found)


def _need_bytes(case: Case, place: WorkerPlace) -> float:
    spec = case.spec(place.name)
    given = (spec.env if spec else {}).get("VLLM_CPU_KVCACHE_SPACE") or case.around.environ.get(
        "VLLM_CPU_KVCACHE_SPACE", "1"
    )
    cache_gib = float(given) if given.replace(".", "", 1).isdigit() else 1.0
    path = Path(place.model.path or "")
    return (weights_bytes(path) if path.is_dir() else 0) + (cache_gib + _ENGINE_GIB) * _GIB


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return how much memory new processes may take; None if that is not known."""
    found = [value for value in (_of_machine(meminfo), _of_group(group)) if value is not None]
    return min(found, default=None)


def _of_machine(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _of_group(group: Path) -> int | None:
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return int(limit) - int(used) + _cached(group / "memory.stat")
    except (OSError, ValueError):  # no cgroup v2, or `max`
        return None


def _cached(stat: Path) -> int:
    """Return how much of a group's memory holds pages of files, which go when others need it."""
    lines = (line.split() for line in stat.read_text().splitlines())
    return sum(int(value) for name, value in lines if name in ("inactive_file", "active_file"))


# --- GPUs -------------------------------------------------------------------------------------------


def check_gpus(case: Case) -> Iterator[Finding]:
    """Check that the GPUs are there that the plan gives to workers, and that they are not given too often."""
    specs = [spec for spec in case.specs if spec.gpus]
    if not specs:
        return
    gpus = gpus_here()
    if gpus is None:
        advice = "install NVIDIA's driver, or set device: cpu"
        yield fail("gpu", specs[0].name, "asks for a GPU, and nvidia-smi shows none", advice)
        return
    if _SHOWN in case.around.environ:  # the plan counts among those, and nvidia-smi among all
        yield from _overfull(specs)
        return
    problems = [*_absent(specs, len(gpus)), *_overfull(specs)]
    yield from problems
    if not problems:
        yield ok("gpu", _THIS, f"{len(gpus)} GPUs: {', '.join(sorted({gpu.name for gpu in gpus}))}")
    yield from _busy(case, specs, gpus)


def _absent(specs: Sequence[ProcessSpec], count: int) -> Iterator[Finding]:
    for spec in specs:
        for gpu in spec.gpus:
            if gpu >= count:
                advice = "take fewer replicas or gpus_per_replica, or name others in workers: [{gpus: [...]}]"
                yield fail("gpu", spec.name, f"is given GPU {gpu}, and this machine has {count}", advice)


def _overfull(specs: Sequence[ProcessSpec]) -> Iterator[Finding]:
    shares: Counter[int] = Counter()
    for spec in specs:
        for gpu in spec.gpus:
            shares[gpu] += round(_share(spec) * 1000)
    for gpu, share in shares.items():
        if share > 1000:
            advice = "give each of them a --gpu-memory-utilization, 1 or less together"
            yield fail("gpu", f"GPU {gpu}", f"its workers want {share / 1000:.0%} of its memory", advice)


def _share(spec: ProcessSpec) -> float:
    """Return the last --gpu-memory-utilization of a command, as vLLM reads it."""
    share, argv = _GPU_SHARE, list(spec.argv)
    for number, word in enumerate(argv):
        option, equals, value = word.replace("_", "-").partition("=")
        if option == "--gpu-memory-utilization":
            share = _number(value if equals else argv[number + 1] if number + 1 < len(argv) else "", share)
    return share


def _number(text: str, default: float) -> float:
    try:
        return float(text)
    except ValueError:
        return default


def _busy(case: Case, specs: Sequence[ProcessSpec], gpus: Sequence[Gpu]) -> Iterator[Finding]:
    for spec in specs:
        if spec.name in case.running:
            continue
        for gpu in (gpus[number] for number in spec.gpus if number < len(gpus)):
            if gpu.free < gpu.total * _share(spec):
                found = f"wants {_share(spec):.0%} of {gpu.total} MiB, and {gpu.free} are free"
                yield warn(
                    "gpu", spec.name, found, "end what else uses the GPU, or lower --gpu-memory-utilization"
                )


def gpus_here() -> list[Gpu] | None:
    """Return the GPUs in the order in which CUDA counts them by default; None if there is no way to know."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603  # no shell, no input
            [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_ASK_GPUS_S,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return [_gpu(line) for line in done.stdout.splitlines() if line.count(",") >= 2] or None


def _gpu(line: str) -> Gpu:
    name, total, free = (word.strip() for word in line.rsplit(",", 2))
    return Gpu(name, int(total) if total.isdigit() else 0, int(free) if free.isdigit() else 0)
