"""Hosts with addresses of their own on one machine: network namespaces, whose links can be cut."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests import reaper
from tests.waiting import is_running, wait_for

_CLONE_NEWNET = 0x40000000
_NETWORK = "10.113.77"
_PREFIX = "baton-"


def can_be_made() -> bool:
    """Tell whether this user may make network namespaces."""
    if os.geteuid() or shutil.which("ip") is None:
        return False
    name = f"baton-try-{uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        _ip("netns", "del", name)
    return made.returncode == 0


def _forget_labs_of_the_dead() -> None:
    """Remove what a run that was killed has left: it is named by its process."""
    for name in os.listdir("/run/netns") if os.path.isdir("/run/netns") else ():
        process = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and process.isdigit() and not is_running(int(process)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A host is a namespace with one address; `processes` are started there."""

    def __init__(self, lab: str, index: int) -> None:
        self.address = f"{_NETWORK}.{index + 1}"
        self.namespace = f"{lab}-{index}"
        self._lab, self._link = lab, f"l{index}"
        _ip("netns", "add", self.namespace)
        _ip(
            "-n",
            lab,
            "link",
            "add",
            self._link,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.namespace,
        )
        _ip("-n", lab, "link", "set", self._link, "master", "bridge", "up")
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    def cut(self) -> None:
        """Take its link away: nothing arrives any more, and nobody is told."""
        _ip("-n", self._lab, "link", "set", self._link, "down")

    def mend(self) -> None:
        _ip("-n", self._lab, "link", "set", self._link, "up")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have this thread's new sockets be of this host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{self.namespace}") as there:
            _enter(libc, there.fileno())
            try:
                yield
            finally:
                _enter(libc, before.fileno())


def _enter(libc: Any, descriptor: int) -> None:
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Lab:
    """A lab has hosts on one network, and ends all that was started on them."""

    def __init__(self, count: int) -> None:
        _forget_labs_of_the_dead()
        self._name = f"{_PREFIX}{os.getpid()}-{uuid4().hex[:6]}"
        self._marker = uuid4().hex
        self._processes: list[subprocess.Popen[bytes]] = []
        self.hosts: list[Host] = []
        _ip("netns", "add", self._name)
        _ip("-n", self._name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._name, "link", "set", "bridge", "up")
        for index in range(count):
            self.hosts.append(Host(self._name, index))

    def start(self, host: Host, argv: Sequence[str], log: Path) -> None:
        """Start a process on a host; what it prints goes into the file `log`."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", host.namespace, *argv],
                env={**os.environ, "BATON_TEST": self._marker},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def close(self) -> None:
        for pid in reaper.marked(self._marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        wait_for(lambda: not reaper.marked(self._marker), "the end of all processes")
        for process in self._processes:
            process.wait()
        for name in (*(host.namespace for host in self.hosts), self._name):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


@contextlib.contextmanager
def lab(count: int) -> Iterator[Lab]:
    """Have so many hosts until the block ends."""
    made = Lab(count)
    try:
        yield made
    finally:
        made.close()
