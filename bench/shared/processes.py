"""A benchmark starts its processes here, and reads what they use."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from random import Random
from typing import IO

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]
# Below what kernels give to connections.
PORTS = range(10_000, 20_000)
# A process takes so many ports at once for itself, and keeps one descriptor open for them.
PORTS_AT_ONCE = 50


class Failed(Exception):
    """Something under test did not do its work. The text is the reason, in one line."""


def raise_file_limit() -> None:
    """Let this process, and those that it starts, open as many files as the system permits."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def lacks_files(count: int) -> str | None:
    """Say why a process cannot have so many files open, or return None."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_enough = hard == resource.RLIM_INFINITY or hard >= count
    return None if is_enough else f"needs {count} open files, the limit is {hard} (ulimit -Hn)"


def free_port() -> int:
    """Return a port of this machine that nobody listens on, and that no running process has been given here.

    The kernel gives none of these ports to connections: it could do so before the port is used.
    Raises `Failed` if there is none left.
    """
    port = next(filter(is_free, _ports), None)
    if port is None:
        raise Failed(f"no free port left in {PORTS.start} to {PORTS.stop - 1}")
    return port


def _own_ports() -> Iterator[int]:
    """Yield ports that this process alone has for as long as it runs, each of them once, in random order."""
    firsts = PORTS[::PORTS_AT_ONCE]
    for first in filter(_take, Random().sample(firsts, len(firsts))):
        yield from Random().sample(range(first, first + PORTS_AT_ONCE), PORTS_AT_ONCE)


_ports = _own_ports()


def _take(first: int) -> bool:
    """Take the ports from `first` on for this process; False if another running process has them.

    A socket's name says that they are taken: the kernel frees it, however the process ends.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        holder.bind(f"\0baton-ports-{first}")
    except OSError:
        holder.close()
        return False
    holder.detach()
    return True


def is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def wait_for(condition: Callable[[], object], what: str, limit_s: float, every_s: float = 0.1) -> None:
    """Return once `condition` is true. Raises `Failed` after the limit."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"waited {limit_s:.0f} s for {what}")
        time.sleep(every_s)


def python(*arguments: str) -> list[str]:
    """Return a command for the interpreter that runs this."""
    return [sys.executable, *arguments]


@contextlib.contextmanager
def running(
    command: list[str],
    port: int,
    *,
    cores: Set[int] | None = None,
    env: Mapping[str, str] | None = None,
    limit_s: float = START_LIMIT_S,
) -> Iterator[int]:
    """Run a process that listens on `port`, pinned to these cores; yield its pid, and stop it at the end.

    Raises `Failed` with the last line that it wrote if it ends, or does not listen in time.
    """
    with tempfile.TemporaryFile() as output:
        with _pinned(cores):
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            _wait_for(port, process, output, limit_s)
            yield process.pid
        finally:
            _stop(process)


@contextlib.contextmanager
def _pinned(cores: Set[int] | None) -> Iterator[None]:
    """Children inherit the affinity: set any later, it would miss the threads that they have started."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if cores is None else cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin(pid: int, cores: Set[int]) -> None:
    """Pin a process that runs already: all threads that it has; those that they start inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


def _wait_for(port: int, process: subprocess.Popen[bytes], output: IO[bytes], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Failed(f"ended with {process.returncode}: {_said(output)}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise Failed(f"does not listen after {limit_s:.0f} s: {_said(output)}")


def _said(output: IO[bytes]) -> str:
    output.seek(0)
    return last_line(output.read().decode(errors="replace"))


def last_line(text: str) -> str:
    """Return what a program said last: the reason why it ended, if there is one."""
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "(no output)")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop it and its session: what does not end with it is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_LIMIT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cpu_seconds(pid: int) -> float:
    """Add up user and system time of a process and its descendants, of ended ones if they were waited for."""
    return sum(_own_cpu_seconds(member) for member in tree(pid))


def threads_seconds(pid: int) -> float:
    """Add up the CPU time of a process's living threads, without its children: to the nanosecond."""
    return sum(map(thread_seconds, Path(f"/proc/{pid}/task").iterdir()))


def thread_seconds(task: Path) -> float:
    """Read the CPU time of a thread, /proc/PID/task/TID. One that has just ended has 0."""
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        return 0.0


def wait_idle(pid: int, limit_s: float = 30.0) -> None:
    """Return once the process tree uses less than a fifth of a core, at the latest after `limit_s`."""
    pause_s = 0.1
    used = cpu_seconds(pid)
    for _ in range(int(limit_s / pause_s)):
        time.sleep(pause_s)
        before, used = used, cpu_seconds(pid)
        if used - before < pause_s / 5:
            return


def rss_bytes(pid: int) -> int:
    """Add up the resident memory of a process and its living descendants; shared pages count for each."""
    return sum(_status_bytes(member, "VmRSS:") for member in tree(pid))


def peak_rss_bytes(pid: int) -> int:
    """Add up the same at its highest, for each process since its start."""
    return sum(_status_bytes(member, "VmHWM:") for member in tree(pid))


def open_files(pid: int) -> int:
    """Count the descriptors of a process and its living descendants; shared ones count for each."""
    return sum(len(os.listdir(f"/proc/{member}/fd")) for member in tree(pid))


def tree(pid: int) -> list[int]:
    """List a process and its living descendants."""
    return [pid, *(member for child in children(pid) for member in tree(child))]


def children(pid: int) -> set[int]:
    """List the living children of a process; one that has ended has none."""
    return {child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in _listed(task)}


def _listed(children: Path) -> Iterable[int]:
    """Of one thread. A thread that has ended since has none: they have moved to another one."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return map(int, children.read_text().split())
    return ()


def _own_cpu_seconds(pid: int) -> float:
    """Add up utime, stime, and the same of children that it has waited for; see proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) * _TICK_S


def _status_bytes(pid: int, field: str) -> int:
    """A zombie has no memory: 0."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)
