"""An actor of Ray runs one worker on its node: it ends with its engine, and the engine with it.

Ray starts it, and starts it again wherever there is room, as often as it or its node is lost. It tells what
happens when it is asked (`report`), as no file system is shared with the machine of `baton up`. Baton must be
installed on the nodes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from launch.backends.node import Reserved, spec_here
from launch.engines.base import PlanError
from launch.local.processes import UNKNOWN_CODE, DistantGuard, ProcessGroup
from orchestrator import __version__
from orchestrator.compiled import ROOT
from orchestrator.config.options import Config
from orchestrator.interpreter import PATH_ENV

POLL_S: Final = 0.1
MAX_LOG_BYTES: Final = 64 * 1024 * 1024  # what nobody has fetched until then is lost
FORGET_LOG_BYTES: Final = 1024 * 1024  # so much that was fetched is not kept
MAX_PIECE: Final = 256 * 1024  # of the log in one report
TOLD_S: Final = 5.0  # whoever asks gets to know of the end of the engine within that time, or not at all


class WorkerActor:
    """Calls come in threads of their own: `report` waits for news, and others come through meanwhile."""

    def __init__(self, config: str, name: str, environ: Mapping[str, str], version: str) -> None:
        """Start the engine of the worker `name` of the config, which is given as JSON."""
        import ray

        self._uid = f"{ray.get_runtime_context().get_actor_id()}-{os.urandom(4).hex()}"
        self._raylet = os.getppid()
        self._host = ray.util.get_node_ip_address()
        self._reserved = Reserved()
        self._output = _Output()
        self._group: ProcessGroup | None = None
        self._code: int | None = None
        self._is_told = threading.Event()  # somebody knows of the engine's end
        self._is_stopping = False
        self._delay_s = 1.0  # from the engine's end to that of the actor, which Ray starts again at once
        self._guard = DistantGuard()
        self._guard.__enter__()
        try:
            self._start(config, name, environ, version)
        except (PlanError, OSError, ValueError) as error:
            self._output.note(f"{name} cannot be started on {self._host}: {error}")
            self._code = UNKNOWN_CODE
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self, config: str, name: str, environ: Mapping[str, str], version: str) -> None:
        if version != __version__:
            raise PlanError(
                f"Baton {__version__} is installed there, and `baton up` is {version}: make them equal"
            )
        inherited = {**_environ(), **environ}
        known = Config.model_validate_json(config)
        spec = spec_here(known, name, self._host, self._reserved, inherited)
        self._group = ProcessGroup(spec, self._output.path, self._guard, inherited)
        self._output.unlink()

    def report(self, uid: str, offset: int, delay_s: float, wait_s: float) -> dict[str, Any]:
        """Return what is known, once there is news or after `wait_s`.

        The caller knows the start `uid`, and its output up to `offset`. Should the engine end, the actor ends
        `delay_s` after it.
        """
        self._delay_s = delay_s
        offset = offset if uid == self._uid else 0
        deadline = time.monotonic() + wait_s
        while uid == self._uid and time.monotonic() < deadline and not self._has_news(offset):
            time.sleep(POLL_S)
        offset, piece = self._output.after(offset)
        if self._code is not None and not self._output.has_more(offset):
            self._is_told.set()
        return {
            "uid": self._uid,
            "host": self._host,
            "ready_url": "" if self._group is None else self._group.ready_url,
            "code": self._code,
            "offset": offset,
            "output": piece,
        }

    def _has_news(self, offset: int) -> bool:
        return self._output.has_more(offset) or (self._code is not None and not self._is_told.is_set())

    def stop(self, limit_s: float) -> bool:
        """Have the engine end, by force after `limit_s`. Returns whether it went without force."""
        self._is_stopping = True
        return self._group is None or asyncio.run(self._group.end(limit_s, asyncio.Event()))

    def kill(self) -> None:
        """Have the engine end at once, also while `stop` waits."""
        self._is_stopping = True
        if self._group is not None:
            self._group.signal(signal.SIGKILL)

    def _watch(self) -> None:
        """End the actor some time after its engine, or at once if its raylet is gone: Ray starts it again."""
        while self._code is None:
            self._code = None if self._group is None else self._group.exit_code()
            if os.getppid() != self._raylet:  # Ray waits for calls under way, such as reports, for ever
                os._exit(1)
            time.sleep(POLL_S)
        restart_at = time.monotonic() + self._delay_s
        if self._group is not None:
            self._group.signal(signal.SIGKILL)  # what is left of its group is of no use
        self._is_told.wait(TOLD_S)
        time.sleep(max(0.0, restart_at - time.monotonic()))
        if not self._is_stopping:
            os._exit(1)  # `exit_actor` would end it for good


class _Output:
    """An engine writes to a file that has no name once it runs: nothing is left of it after the end."""

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="baton-", suffix=".log")
        self.path = Path(name)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._dropped = 0  # bytes of the beginning that are not in the file any more
        self._lock = threading.Lock()

    def unlink(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        self.unlink()
        self._file.close()

    def note(self, text: str) -> None:
        """Write a line of ours: the engine writes nothing."""
        self._file.write(f"{text}\n".encode())
        self.unlink()

    def has_more(self, offset: int) -> bool:
        return self._dropped + self._size() > offset

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def after(self, offset: int) -> tuple[int, bytes]:
        """Return where the caller goes on, and what was written from `offset` on; the rest is forgotten."""
        with self._lock:
            start = max(0, offset - self._dropped)
            if start >= FORGET_LOG_BYTES or self._size() > MAX_LOG_BYTES:
                start = self._forget(start)
            piece = os.pread(self._file.fileno(), MAX_PIECE, start)
            return self._dropped + start + len(piece), piece

    def _forget(self, start: int) -> int:
        """Empty the file if all of it was fetched, or it is too large; return where to read on.

        The engine appends to it: what it writes at this very moment is lost.
        """
        size = self._size()
        if start < size <= MAX_LOG_BYTES:
            return start
        os.ftruncate(self._file.fileno(), 0)
        self._dropped += size
        return 0


def _environ() -> dict[str, str]:
    """Return the node's environment for an engine: without what Ray sets for its own processes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept.pop("OMP_NUM_THREADS", None)  # Ray sets it to the CPUs of the actor, which has next to none
    if not {"site-packages", "dist-packages"} & set(ROOT.parts):
        kept[PATH_ENV] = os.pathsep.join(filter(None, (str(ROOT), kept.get(PATH_ENV))))
    return kept
