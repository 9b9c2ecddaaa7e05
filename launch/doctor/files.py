"""These checks read the files that the config names: keys, certificates, models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.doctor.case import Case
from launch.doctor.certificate import CertificateProblem, try_certificate
from launch.doctor.findings import Finding, fail, ok, warn
from orchestrator.config.files import is_world_writable
from orchestrator.config.keys import KeyFileError, KeyRing

SOON_DAYS = 30.0
_KEYS = "orchestrator.api_keys_file"
_TLS = "orchestrator.tls"


def check_keys(case: Case) -> Iterator[Finding]:
    path = case.config.orchestrator.api_keys_file
    if path is None:
        return
    try:
        ring, is_open = KeyRing.load(path), is_world_writable(path)
    except KeyFileError as error:
        yield from (fail("key", _KEYS, problem, "correct the line") for problem in error.problems)
    except OSError as error:
        yield fail(
            "key", _KEYS, f"{path} cannot be read: {error.strerror}", "correct the path, or who may read it"
        )
    else:
        yield _keys(path, len(ring), is_open)


def _keys(path: str, count: int, is_open: bool) -> Finding:
    if is_open:
        return warn("key", _KEYS, f"{path} can be written by everybody on this machine", f"chmod o-w {path}")
    return ok("key", _KEYS, f"{count} keys")


def check_tls(case: Case) -> Iterator[Finding]:
    tls = case.config.orchestrator.tls
    if tls is None:
        return
    try:
        days = try_certificate(tls.cert, tls.key).days_left
    except CertificateProblem as error:
        yield fail("tls", _TLS, f"the certificate {tls.cert} {error}", error.advice)
    except OSError as error:
        found = f"{tls.cert} or {tls.key} cannot be read: {error.strerror}"
        yield fail("tls", _TLS, found, "correct the path, or who may read it")
    else:
        found = f"the certificate {tls.cert} is valid for {days:.0f} more days"
        yield warn("tls", _TLS, found, "renew it") if days < SOON_DAYS else ok("tls", _TLS, found)


def check_models(case: Case) -> Iterator[Finding]:
    """Check that the models are there which vLLM would load here."""
    for path in dict.fromkeys(place.model.path or "" for place in case.here("vllm")):
        yield _model(path, case.around.environ)


def _model(path: str, environ: Mapping[str, str]) -> Finding:
    if os.path.isdir(path):
        return _directory(Path(path))
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        return fail("model", path, "there is no such directory", "correct models.*.path")
    if _is_cached(path, environ):
        return ok("model", path, "is in the hub's cache")
    if environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        advice = "download it before (hf download), or unset HF_HUB_OFFLINE"
        return fail("model", path, "is not in the hub's cache, and HF_HUB_OFFLINE is set", advice)
    return warn(
        "model", path, "is not in the hub's cache", "the first start downloads it, which takes its time"
    )


def _directory(path: Path) -> Finding:
    if not (path / "config.json").is_file():
        return fail("model", str(path), "has no config.json", "give a directory as the hub has it")
    size = weights_bytes(path)
    if not size:
        return fail(
            "model", str(path), "has no weights (*.safetensors, *.bin)", "download all files of the model"
        )
    return ok("model", str(path), f"{size / 1e6:,.0f} MB of weights")


def weights_bytes(path: Path) -> int:
    """Return how large the weights in a directory are; 0 if there are none."""
    patterns = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
    return sum(file.stat().st_size for pattern in patterns for file in path.glob(pattern))


def _is_cached(name: str, environ: Mapping[str, str]) -> bool:
    """Return whether the hub's cache has a snapshot of the model."""
    home = environ.get("HF_HOME") or os.path.join(environ.get("HOME", ""), ".cache", "huggingface")
    cache = environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return any(Path(cache, f"models--{name.replace('/', '--')}", "snapshots").glob("*/config.json"))
