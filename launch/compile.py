"""`python -m launch.compile` builds the compiled form of this checkout, unless it is there.

The sources are copied first and built there with `setup.py`, as `pip install .` builds them. What is made is
tried, then renamed into its place (`orchestrator/form.py`). One build runs at a time: whoever comes second
waits, and mostly finds what it wants. This imports the standard library only: `setup.py` asks it what a build
needs, before anything is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.compiled import MYPYC, ROOT
from orchestrator.form import BUILDS_ENV, FORM_ENV, MANIFEST, SUFFIX, FormError, builds_folder, key, wished

COMPILE_ENV = "BATON_COMPILE"  # read by `setup.py`
LOG = "build.log"  # in a build; of a build that failed it lies beside the others, as KEY.log
KEPT = 4  # builds: of some branches, and those that processes run that were started before an edit
LOOK_S = 1.0  # between two looks for the process for which this one builds
INTERRUPTED = 130
_COPIED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "orchestrator", "launch")
_TRIAL = """
import os
from importlib import import_module
from orchestrator.compiled import MODULES
from orchestrator.form import take_form
take_form(os.environ)
for module in MODULES:
    import_module(module)
"""


class CannotBuild(Exception):
    """Nothing can be built here; the message says why, in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Build, or find what was built. The last line that is printed says what came of it."""
    parser = argparse.ArgumentParser(prog="launch.compile", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--while",
        dest="process",
        type=int,
        metavar="PID",
        help="build at low priority, as long as this process runs, and not what has failed before",
    )
    process: int | None = parser.parse_args(argv).process
    if process is not None:
        _stay_behind(process)
    try:
        print(_outcome(os.environ, again=process is None), flush=True)
    except (CannotBuild, FormError) as error:
        print(f"pure Python runs, the compiled form is not built: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _outcome(environ: Mapping[str, str], *, again: bool) -> str:
    if wished(environ) == "pure":
        return f"nothing is built: {FORM_ENV}=pure"
    return f"the compiled form is in {build(environ, again=again)}"


def _stay_behind(process: int) -> None:
    """Work in the background, and end with `process`, as will the compiler, which is in the same group."""
    if os.getpgrp() != os.getpid():
        os.setsid()
    _give_way()
    threading.Thread(target=_end_with, args=(process,), daemon=True).start()


def _give_way() -> None:
    """Leave the cores to others. Where memory runs out, the compiler (1.2 GB) goes before an engine does."""
    os.nice(19)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_with(process: int) -> None:
    while _runs(process):
        time.sleep(LOOK_S)
    os.killpg(0, signal.SIGKILL)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# --- what a build needs -------------------------------------------------------------------------


def lacks() -> str | None:
    """Return what of the machine's own is missing for a build, or None."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no {compiler} (Debian: apt-get install gcc)"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        return f"Python's headers are not there: {headers} (Debian: apt-get install python3-dev)"
    return None


def _lacks_mypyc() -> str | None:
    """Return what is missing of what pip would fetch by itself. Another mypyc makes another build."""
    try:
        found = version("mypy")
    except PackageNotFoundError:
        found = "none"
    return None if found == MYPYC else f"it needs mypy {MYPYC}, {found} is installed (make setup)"


# --- the build ----------------------------------------------------------------------------------


def build(environ: Mapping[str, str], *, again: bool) -> Path:
    """Return the folder of the build of these sources, which is made if it is not there.

    What has failed before is tried `again`, or not. Raises `CannotBuild`.
    """
    missing = lacks() or _lacks_mypyc()
    if missing:
        raise CannotBuild(missing)
    try:
        builds = builds_folder(environ)
        return _found(builds, environ) or _made_alone(builds, environ, again=again)
    except (OSError, RuntimeError) as error:
        raise CannotBuild(str(error)) from error


def _made_alone(builds: Path, environ: Mapping[str, str], *, again: bool) -> Path:
    builds.mkdir(parents=True, exist_ok=True)
    with _alone(builds):
        return _found(builds, environ) or _made(builds, environ, again=again)


@contextmanager
def _alone(builds: Path) -> Iterator[None]:
    """Hold the lock of all builds; it goes with the process that holds it."""
    with (builds / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another build is under way: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _found(builds: Path, environ: Mapping[str, str]) -> Path | None:
    folder = builds / key(ROOT)
    is_there = folder.is_dir() and _works(ROOT, builds, environ, subprocess.DEVNULL)
    return _used(folder) if is_there else None


def _used(folder: Path) -> Path:
    """Have a build be among those that are kept."""
    with suppress(OSError):
        os.utime(folder)
    return folder


def _made(builds: Path, environ: Mapping[str, str], *, again: bool) -> Path:
    failed = builds / f"{key(ROOT)}.log"
    if failed.exists() and not again:
        raise CannotBuild(f"it has failed before (`make compile` tries again; log: {failed})")
    failed.unlink(missing_ok=True)
    print("building the compiled form, which takes some minutes", flush=True)
    copy = builds / "part"  # nobody else is here
    _copy(copy)
    if not _compile(copy, environ):
        raise CannotBuild(f"it fails (log: {_kept_log(builds, copy)})")
    return _publish(builds, copy)


def _kept_log(builds: Path, copy: Path) -> Path:
    """Move the log of what has failed to where it is looked for the next time."""
    log = (copy / LOG).replace(builds / f"{key(copy)}.log")
    shutil.rmtree(copy, ignore_errors=True)
    return log


def _copy(copy: Path) -> None:
    """Copy the sources: an edit during the build goes into the next one."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in _COPIED:
        _copy_one(ROOT / name, copy / name)


def _copy_one(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    elif source.exists():
        shutil.copy(source, target)


def _compile(copy: Path, environ: Mapping[str, str]) -> bool:
    """Make a build in `copy/builds` and tell whether it works."""
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    with (copy / LOG).open("wb") as log:
        env = {**environ, COMPILE_ENV: "1", "PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=env, stdout=log, stderr=log, check=False)  # noqa: S603
        if done.returncode != 0:
            return False
        _collect(copy, copy / "builds" / key(copy))
        return _works(copy, copy / "builds", environ, log.fileno())


def _collect(copy: Path, folder: Path) -> None:
    """Move all extensions into a folder, by the names of their modules, and note how they are."""
    folder.mkdir(parents=True)
    lines = []
    for file in sorted((*copy.glob(f"*{SUFFIX}"), *(copy / "orchestrator").rglob(f"*{SUFFIX}"))):
        moved = file.replace(folder / ".".join(file.relative_to(copy).parts))
        lines.append(_sum(moved))
    (folder / MANIFEST).write_text("".join(lines))


def _sum(file: Path) -> str:
    return f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"


def _works(root: Path, builds: Path, environ: Mapping[str, str], output: int) -> bool:
    """Tell whether all modules of a build can be imported, as the orchestrator would."""
    env = {**environ, FORM_ENV: "compiled", BUILDS_ENV: str(builds), "PYTHONPATH": str(root)}
    command = (sys.executable, "-c", _TRIAL)
    done = subprocess.run(command, cwd=root, env=env, stdout=output, stderr=output, check=False)  # noqa: S603
    return done.returncode == 0


def _publish(builds: Path, copy: Path) -> Path:
    made = copy / "builds" / key(copy)
    (copy / LOG).replace(made / LOG)
    folder = _put(made, builds / made.name)
    shutil.rmtree(copy, ignore_errors=True)
    _prune(builds)
    return folder


def _put(made: Path, folder: Path) -> Path:
    if folder.exists():  # damaged
        shutil.rmtree(folder)
    return made.replace(folder)


def _prune(builds: Path) -> None:
    """Remove all builds but the latest, and the logs of those that failed long ago."""
    for kind in ("*/" + MANIFEST, "*.log"):
        paths = [path.parent if path.name == MANIFEST else path for path in builds.glob(kind)]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    sys.exit(main())
