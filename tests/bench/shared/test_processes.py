from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.shared import processes
from bench.shared.processes import (
    PORTS,
    ROOT,
    Failed,
    cpu_seconds,
    free_port,
    is_free,
    open_files,
    peak_rss_bytes,
    pin,
    python,
    rss_bytes,
    running,
)
from tests.waiting import wait_until_gone

pytestmark = pytest.mark.processes

LISTEN = "import socket, sys; listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
# Only with children of its own does the process listen: one that ended, one that lives.
FAMILY = """
import subprocess, sys
burn = "import time\\nwhile time.process_time() < 0.3: pass\\n"
subprocess.run([sys.executable, "-c", burn])
child = subprocess.Popen([sys.executable, "-c", burn + "print(flush=True); input()"], stdin=-1, stdout=-1)
child.stdout.readline()
"""
WAIT = "\nlistener.accept()\nimport time\ntime.sleep(3600)\n"


@pytest.fixture
def family() -> Iterator[int]:
    port = free_port()
    with running(python("-c", FAMILY + LISTEN + WAIT, str(port)), port) as pid:
        yield pid


def test_ports_are_free_and_never_the_same() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == 200
    assert set(ports) <= set(PORTS)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert not is_free(ports[0])


@contextlib.contextmanager
def other(code: str) -> Iterator[str]:
    """Another process that knows `processes`; yields the line that it prints, and lets it end after."""
    command = python("-c", f"from bench.shared.processes import *\n{code}\ninput()")
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline()
        process.communicate("\n")


def test_ports_of_several_processes_are_never_the_same() -> None:
    draw = "print(*(free_port() for _ in range(120)), flush=True)"
    with other(draw) as first, other(draw) as second:
        drawn = [*map(int, first.split()), *map(int, second.split()), *(free_port() for _ in range(120))]
    assert len(set(drawn)) == 360


def test_ports_of_a_process_that_has_ended_are_for_others() -> None:
    ours = -os.getpid()  # no port, so that nobody else asks for it
    with other(f"from bench.shared import processes; print(processes._take({ours}), flush=True)") as took:
        assert took == "True\n"
        assert not processes._take(ours)
    assert processes._take(ours)


def test_when_no_port_is_left_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ports", iter(()))
    with pytest.raises(Failed, match=r"^no free port left in 10000 to 19999$"):
        free_port()


def test_cpu_counts_children_that_live_and_that_have_ended(family: int) -> None:
    assert cpu_seconds(family) > 0.5  # 0.3 s of each, less what the clock ticks round off


def test_memory_counts_children_that_live(family: int) -> None:
    alone = int(Path(f"/proc/{family}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert rss_bytes(family) > 1.2 * alone
    assert peak_rss_bytes(family) >= rss_bytes(family)


def test_open_files_count_children_that_live(family: int) -> None:
    alone = len(list(Path(f"/proc/{family}/fd").iterdir()))
    assert open_files(family) >= alone + 3  # a child has its standard streams at least


def test_process_is_pinned_before_it_starts_and_gone_after_the_block() -> None:
    port, core = free_port(), max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    pinned = f"import os\nassert os.sched_getaffinity(0) == {{{core}}}\n"
    with running(python("-c", pinned + LISTEN + WAIT, str(port)), port, cores={core}) as pid:
        assert os.sched_getaffinity(0) == before
    assert not Path(f"/proc/{pid}").exists()


def test_all_threads_of_a_process_that_runs_are_pinned() -> None:
    port, cores = free_port(), {max(os.sched_getaffinity(0))}
    thread = "import threading as t, time\nt.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"
    with running(python("-c", thread + LISTEN + WAIT, str(port)), port) as pid:
        pin(pid, cores)
        threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
        assert [os.sched_getaffinity(one) for one in threads] == [cores, cores]


def test_children_that_outlive_a_process_are_killed() -> None:
    port = free_port()
    with running(python("-c", FAMILY + LISTEN + WAIT, str(port)), port) as pid:
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    wait_until_gone([int(child)])


def test_process_that_ends_says_why() -> None:
    command = python("-c", "print('one'); raise SystemExit('port 99999 is no port')")
    with pytest.raises(Failed, match=r"^ended with 1: port 99999 is no port$"), running(command, free_port()):
        pass


def test_command_that_is_not_there_is_an_error_of_the_system() -> None:
    with pytest.raises(FileNotFoundError), running(["/nowhere/router"], free_port()):
        pass


def test_process_that_ignores_the_wish_to_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.shared.processes.STOP_LIMIT_S", 0.0)
    port = free_port()
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    with running(python("-c", deaf + LISTEN + WAIT, str(port)), port) as pid:
        pass
    assert not Path(f"/proc/{pid}").exists()
