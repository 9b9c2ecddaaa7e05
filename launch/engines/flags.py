"""Slips in an engine's arguments are found before the engine is started, which takes minutes.

What the installed vLLM takes is read out of its sources, as importing it takes many seconds. Where it is not
installed a few names that everybody uses are enough to see a letter out of place. An argument that is like no
other is left to the engine: it may be newer than what is known here.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from orchestrator.config.addresses import is_loopback
from orchestrator.config.checks import Finding
from orchestrator.config.options import Config, PoolConfig, WorkerConfig
from orchestrator.config.yaml12 import Path as Place
from orchestrator.wire.info import Role

_SOURCES = ("engine/arg_utils.py", "entrypoints/**/cli_args.py")  # below vLLM's folder
_FLAG = re.compile(r"""["'](--[a-z][a-z0-9-]+)["']""")
_LEAST_FLAGS = 50  # with fewer the sources have another form than this knows
_COMMON = (
    *("--model", "--tokenizer", "--dtype", "--quantization", "--load-format", "--seed"),
    *("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--gpu-memory-utilization"),
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size", "--kv-cache-dtype"),
    *("--enable-prefix-caching", "--enable-chunked-prefill", "--enforce-eager", "--block-size"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser", "--chat-template"),
    *("--speculative-config", "--compilation-config", "--distributed-executor-backend", "--hf-overrides"),
    *("--enable-lora", "--max-loras", "--lora-modules", "--served-model-name", "--limit-mm-per-prompt"),
    *("--trust-remote-code", "--swap-space"),
)
_ALIKE = 0.75  # of a name that is meant to be another one; more if not all names are known
_VERY_ALIKE = 0.85

# How many GPUs an engine takes is their product.
_SIZES: Mapping[str, str] = {
    "--tensor-parallel-size": "--tensor-parallel-size",
    "-tp": "--tensor-parallel-size",
    "--pipeline-parallel-size": "--pipeline-parallel-size",
    "-pp": "--pipeline-parallel-size",
}
_ELSEWHERE = frozenset({"--nnodes", "--node-rank", "--distributed-executor-backend"})  # it may span machines


@dataclass(frozen=True, slots=True)
class Known:
    """An engine takes these arguments: all of them, or a part."""

    flags: frozenset[str]
    are_all: bool


def engine_findings(config: Config) -> Iterator[Finding]:
    """Return what the engines of this machine would refuse of their arguments."""
    for index, model in enumerate(config.models):
        for role, pool in model.pools():
            if pool.is_managed and any(is_loopback(worker.host) for worker in _workers(pool)):
                yield from _pool(("models", index, role), role, pool)


def _workers(pool: PoolConfig) -> Sequence[WorkerConfig]:
    return pool.workers or [WorkerConfig()]


def _pool(path: Place, role: Role, pool: PoolConfig) -> Iterator[Finding]:
    known = known_flags(pool.engine)
    yield from _unknown((*path, "args"), pool.args, known)
    for index, worker in enumerate(pool.workers or ()):
        yield from _unknown((*path, "workers", index, "args"), worker.args, known)
    if pool.engine == "vllm" and pool.device == "cuda":
        yield from _too_few_gpus(path, pool)


# --- unknown arguments --------------------------------------------------------------------------


def _unknown(path: Place, args: Sequence[str], known: Known) -> Iterator[Finding]:
    for index, arg in enumerate(args):
        if arg.startswith("--") and len(arg) > 2:
            flag = re.split(r"[=.]", arg, maxsplit=1)[0].replace("_", "-")
            if message := _mistake(flag, known):
                yield Finding((*path, index), message)


def _mistake(flag: str, known: Known) -> str | None:
    name = "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag
    if {flag, name} & known.flags or any(other.startswith(flag) for other in known.flags):
        return None  # engines take the beginning of a name too
    cutoff = _ALIKE if known.are_all else _VERY_ALIKE
    nearest = difflib.get_close_matches(flag, known.flags, n=1, cutoff=cutoff)
    return f"the engine knows no argument {flag}, did you mean {nearest[0]}?" if nearest else None


@cache
def known_flags(engine: str) -> Known:
    """Return the arguments of an engine."""
    if engine == "sim":
        return Known(frozenset(_flags_of("worker.sim", ("__main__.py",))), are_all=True)
    flags = frozenset(_flags_of("vllm", _SOURCES))
    is_read = len(flags) >= _LEAST_FLAGS
    return Known(flags | frozenset(_COMMON), are_all=is_read)


def _flags_of(package: str, sources: Sequence[str]) -> Iterator[str]:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for source in sources:
            for file in Path(folder).glob(source):
                yield from _flags_in(file)


def _flags_in(file: Path) -> Iterator[str]:
    """Yield the arguments that a module names, and those that are made of its classes' fields."""
    try:
        text = file.read_text("utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return
    yield from _FLAG.findall(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield f"--{node.target.id.replace('_', '-')}"


# --- GPUs ---------------------------------------------------------------------------------------


def _too_few_gpus(path: Place, pool: PoolConfig) -> Iterator[Finding]:
    for index, worker in enumerate(_workers(pool)):
        sizes, place = _sizes([*pool.args, *worker.args])
        needed = sizes[0] * sizes[1]
        given = len(worker.gpus) if worker.gpus is not None else pool.gpus_per_replica
        if needed > given:
            where = (*path, "workers", index) if worker.gpus is not None else (*path, "gpus_per_replica")
            verb = "need" if " and " in place else "needs"
            what = f"{place} {verb} {needed} GPUs for each worker, and "
            has = f"worker {index} has {given}" if worker.gpus is not None else f"gpus_per_replica is {given}"
            yield Finding(where, what + has)
            return


def _sizes(args: Sequence[str]) -> tuple[tuple[int, int], str]:
    """Return the tensor and pipeline sizes, and the arguments that give them as they are written."""
    words = [word for arg in args for word in arg.split("=", 1)]
    if any(word.replace("_", "-") in _ELSEWHERE for word in words):
        return (1, 1), ""
    found: dict[str, int] = {}
    for word, value in zip(words, words[1:], strict=False):  # noqa: RUF007
        name = _SIZES.get(word.replace("_", "-"))
        if name is not None and value.isascii() and value.isdigit() and len(value) < 6:
            found[name] = int(value)
    written = " and ".join(f"{name} {size}" for name, size in found.items())
    return (found.get("--tensor-parallel-size", 1), found.get("--pipeline-parallel-size", 1)), written


def missing_gpus(gpus: Mapping[str, Collection[int]], count: int | None) -> Iterator[str]:
    """Yield a sentence for each worker that is to have GPUs which this machine has not.

    `gpus` are those of each worker, `count` is how many there are; None if nobody knows.
    """
    for name, wanted in gpus.items():
        beyond = [gpu for gpu in wanted if count is not None and gpu >= count]
        if beyond:
            has = f"has only {count}" if count else "has none"
            yield f"{name} needs GPU {', '.join(map(str, beyond))}, and this machine {has}"


def count_gpus(exists: Callable[[str], bool] = lambda path: Path(path).exists()) -> int | None:
    """Count the GPUs of this machine; return None if there may be some that this does not know."""
    if any(exists(path) for path in ("/dev/kfd", "/dev/dxg")):  # AMD's, and those of Windows
        return None
    try:
        return sum(1 for _ in Path("/proc/driver/nvidia/gpus").iterdir())
    except OSError:
        return None if exists("/dev/nvidiactl") else 0
