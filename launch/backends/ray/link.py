"""`baton up` and its agent exchange lines of JSON over pipes (`launch/backends/ray/agent.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from launch.backends.base import BackendError
from launch.local.logs import tail
from launch.local.processes import Guard
from orchestrator.interpreter import import_variables

MAX_LINE: Final = 16 * 1024 * 1024  # bytes: a config with thousands of workers, or much output of an engine
END_S: Final = 5.0  # for the agent to end by itself
COMMAND: Final = (sys.executable, "-m", "launch.backends.ray.agent")


class Link:
    """A link has an agent, and answers by the numbers of what was asked."""

    def __init__(self, log: Path, guard: Guard, hear: Callable[[Mapping[str, Any]], None]) -> None:
        """`hear` is called with each line that is no answer."""
        self.log = log
        self._guard = guard
        self._hear = hear
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._refusal: str | None = None  # why an agent has ended, in its own words

    async def open(self) -> None:
        """Start the agent; one of before is ended. Raises `BackendError`."""
        await self.close()
        try:
            with self.log.open("ab") as errors:
                self._process = await asyncio.create_subprocess_exec(
                    *COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    limit=MAX_LINE,
                    env={**os.environ, **import_variables(os.environ)},
                    start_new_session=True,  # Ctrl-C is for `baton up`
                    preexec_fn=self._guard.add_self,
                )
        except OSError as error:
            raise BackendError(f"the process that talks to Ray cannot be started: {error}") from error
        self._reading = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101  # for the type checker
        try:
            while line := await process.stdout.readline():
                self._take(json.loads(line))
        finally:
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_exception(BackendError(self._last_words()))
            self._asked.clear()

    def _take(self, line: Mapping[str, Any]) -> None:
        asked = self._asked.pop(line["id"], None) if line.get("id") is not None else None
        if asked is None and set(line) == {"error"}:
            self._refusal = line["error"]
        elif asked is None:
            self._hear(line)
        elif asked.done():
            return
        elif "error" in line:
            asked.set_exception(BackendError(line["error"]))
        else:
            asked.set_result(line["done"])

    def _last_words(self) -> str:
        if self._refusal is not None:
            return self._refusal
        said = " ".join(line.strip() for line in tail(self.log, 3)) or "it said nothing"
        return f"the process that talks to Ray has ended: {said} (log: {self.log})"

    def tell(self, **command: object) -> None:
        """Have the agent do something; nothing happens if there is none."""
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            process.stdin.write(json.dumps(command).encode() + b"\n")

    async def ask(self, within_s: float, **command: object) -> Any:
        """Have the agent do something, and return what came of it. Raises `BackendError`."""
        if self._reading is None or self._reading.done():
            raise BackendError(self._last_words())
        self._number += 1
        number = self._number
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        self.tell(id=number, **command)
        try:
            async with asyncio.timeout(within_s):
                return await answer
        except TimeoutError:
            raise BackendError(f"Ray does not answer within {within_s:g} s (log: {self.log})") from None
        finally:
            self._asked.pop(number, None)

    async def wait_ended(self) -> None:
        """Wait until the agent has ended."""
        if self._reading is not None:
            await asyncio.wait((self._reading,))

    async def close(self) -> None:
        """End the agent, if there is one. This can be repeated."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None  # noqa: S101  # for the type checker
        process.stdin.close()
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._guard.forget(process.pid)
        if self._reading is not None:
            await asyncio.wait((self._reading,))


def ask_once(*commands: Mapping[str, object], limit_s: float) -> None:
    """Have an agent carry out commands, and end. Raises `BackendError` if one fails."""
    lines = "".join(json.dumps({"id": number, **command}) + "\n" for number, command in enumerate(commands))
    try:
        done = subprocess.run(  # noqa: S603  # our own module
            COMMAND,
            input=lines,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            env={**os.environ, **import_variables(os.environ)},
        )
    except subprocess.TimeoutExpired:
        raise BackendError(f"Ray does not answer within {limit_s:g} s") from None
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        if answer.get("error"):
            raise BackendError(answer["error"])
    if len(answers) < len(commands):
        raise BackendError(f"the process that talks to Ray has ended: {done.stderr[-500:].strip()}")
