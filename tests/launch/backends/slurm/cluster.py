"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of several nodes.

Everything is in one folder, listens on free ports and runs as whoever starts it. Whatever happens, all of it
ends with the block: daemons, the steps of jobs, and what these have started.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.shared.processes import free_port
from tests import reaper

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
START_S = 60.0
MARK = "BATON_SLURM_CLUSTER"
PARTITION = "gpu"


def lacks() -> str | None:
    """Return why there can be no cluster here; None if there can."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class SlurmCluster:
    """Nodes are called `n1`, `n2`, ... `environ` has what Slurm's commands need to find the cluster."""

    folder: Path
    nodes: tuple[str, ...]
    environ: Mapping[str, str]
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: str) -> str:
        """Run one of Slurm's commands, and return its output."""
        done = subprocess.run(
            command, env={**os.environ, **self.environ}, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout

    def state_of(self, node: str) -> str:
        """Return what Slurm says of a node: idle, mixed, down, ..."""
        return self.run("sinfo", "--noheader", "--nodes", node, "--format", "%T").strip()

    def jobs(self) -> list[str]:
        """Return the jobs, or tasks of jobs, that have not ended."""
        return self.run("squeue", "--noheader", "--array", "--format", "%i").split()

    def start_node(self, node: str) -> None:
        """Start a node's daemon; nothing happens if it runs."""
        if node not in self._daemons:
            self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Have a node gone in one moment: its daemon, the steps on it and what they have started."""
        daemon = self._daemons.pop(node)
        for pid in (daemon.pid, *_steps_of(node, self._mark)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def stop_controller(self) -> None:
        """Have Slurm answer nobody; the nodes and the jobs go on."""
        daemon = self._daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait()

    def start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D")

    def hide(self, folder: Path | None, node: str) -> None:
        """Have a node, which is idle, see nothing of a folder; or see all again."""
        daemon = self._daemons.pop(node)
        daemon.terminate()
        daemon.wait()
        if folder is None:
            self.start_node(node)
        else:
            script = 'mount -t tmpfs none "$1" && exec slurmd -D -N "$2"'
            self._start(node, "unshare", "--mount", "sh", "-c", script, "sh", str(folder), node)
        self._wait(node, lambda: self.state_of(node) == "idle")

    @property
    def _mark(self) -> str:
        return f"{MARK}={self.environ[MARK]}"

    def _start(self, name: str, *command: str) -> None:
        program = _program(command[0])
        assert program is not None
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                (program, *command[1:]),
                env={**os.environ, **self.environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )

    def _start_all(self) -> None:
        munge = self.folder / "munge"
        files = (f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed"))
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        self._wait("munged", lambda: (munge / "socket").exists())
        self._start("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        self._wait("slurmctld", self._are_all_idle)

    def _are_all_idle(self) -> bool:
        asked = subprocess.run(
            ("sinfo", "--noheader", "--Node", "--format", "%T"),
            env={**os.environ, **self.environ},
            text=True,
            capture_output=True,
            check=False,
        )
        return asked.stdout.split() == ["idle"] * len(self.nodes)

    def _wait(self, name: str, is_up: object) -> None:
        assert callable(is_up)
        end = time.monotonic() + START_S
        while not is_up():
            assert self._daemons[name].poll() is None, self.said()
            assert time.monotonic() < end, f"{name} is not up after {START_S} s: {self.said()}"
            time.sleep(0.05)

    def said(self) -> str:
        """Return the last lines of each daemon."""
        files = sorted(self.folder.glob("*.out"))
        return "".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}\n" for file in files)

    def _stop(self) -> None:
        for daemon in self._daemons.values():
            daemon.kill()
        reaper_kill(self._mark)
        for daemon in self._daemons.values():
            daemon.wait()


def reaper_kill(mark: str) -> None:
    """Kill all that have this in their environment, until there is none."""
    while left := reaper.marked(mark):
        reaper.kill(left)
        time.sleep(reaper.POLL_S)


def _steps_of(node: str, mark: str) -> list[int]:
    """Return the daemons that look after the jobs on a node, then all processes of the jobs."""
    on_node = f"SLURMD_NODENAME={node}".encode()
    jobs = [
        pid
        for pid, environ in reaper.environments()
        if mark.encode() in environ and on_node in environ.split(b"\0")
    ]
    return [*filter(_is_step_daemon, {_parent(pid) for pid in jobs}), *jobs]


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return 0


def _is_step_daemon(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmstepd")
    return False


@contextlib.contextmanager
def slurm_cluster(folder: Path, nodes: int = 4) -> Iterator[SlurmCluster]:
    """Start a cluster, and yield it once all nodes are idle; its folder must be new."""
    names = tuple(f"n{number}" for number in range(1, nodes + 1))
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True, mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(_configuration(folder, names))
    environ = {"SLURM_CONF": str(configuration), MARK: secrets.token_hex(8)}
    cluster = SlurmCluster(folder, names, environ)
    try:
        cluster._start_all()
        yield cluster
    finally:
        cluster._stop()


def _configuration(folder: Path, nodes: tuple[str, ...]) -> str:
    user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname()
    lines = [
        "ClusterName=baton",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={free_port()}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder / 'munge' / 'socket'}",
        "CredType=cred/munge",
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmdSpoolDir={folder / 'spool'}/%n",
        f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
        f"SlurmdPidFile={folder / 'slurmd.%n.pid'}",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "MpiDefault=none",
        "ReturnToService=2",
        "SlurmdTimeout=5",
        "SlurmctldTimeout=10",
        "InactiveLimit=0",
        "KillWait=10",
        "MinJobAge=300",
        "SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=5",
        "SlurmdParameters=config_overrides",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "GresTypes=gpu",
        "NodeName=DEFAULT CPUs=8 RealMemory=8000",
        *(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}" for node in nodes),
        f"PartitionName={PARTITION} Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP",
    ]
    return "".join(f"{line}\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep a cluster for a shell until Ctrl-C."""
    folder = _folder(arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    with slurm_cluster(folder) as made:
        print("".join(f"export {name}={value}\n" for name, value in made.environ.items()), flush=True)
        signal.sigwait((signal.SIGINT, signal.SIGTERM))


def _folder(arguments: Sequence[str] | None) -> Path:
    """Return where the cluster is to be made. Exits with the usage, or with why there can be none."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.launch.backends.slurm.cluster",
        description="Start a real Slurm of four nodes on this machine, print the variables that a shell "
        "needs to use it, and end all of it at Ctrl-C.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new folder, which gets all of its files")
    folder: Path = parser.parse_args(arguments).folder.absolute()
    missing = lacks()
    if missing is not None:
        parser.error(missing)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"{folder} is there already: name a new folder")
    return folder


if __name__ == "__main__":
    main()
