"""The doctor, called as a user calls it, at simulated workers in threads of the test's process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.shared.processes import free_port
from launch.cli import main
from tests.worker.sim.workers import MODEL, Worker


@dataclass
class Report:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    def of(self, verdict: str) -> list[str]:
        """The findings with that verdict, without it and with single blanks."""
        return [" ".join(line.split()[1:]) for line in self.lines if line.split()[0] == verdict]

    @property
    def faults(self) -> list[str]:
        return self.of("fail")

    @property
    def warnings(self) -> list[str]:
        return self.of("warn")


@dataclass
class Doctor:
    directory: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, config: Mapping[str, Any], *options: str) -> Report:
        """Have it look at a config, for whose API a free port is taken."""
        path = self.directory / "c.yaml"
        orchestrator = {"listen": f"127.0.0.1:{free_port()}"} | config.get("orchestrator", {})
        path.write_text(json.dumps({**config, "orchestrator": orchestrator}))
        self.capsys.readouterr()
        code = main(["doctor", "c.yaml", *options])
        shown = self.capsys.readouterr()
        return Report(code, shown.out, shown.err)

    def visit(self, prefills: Sequence[Worker], decodes: Sequence[Worker], *options: str) -> Report:
        """Have it look at workers that run."""
        return self(cluster(prefills, decodes), "--timeout-s", "20", *options)


def cluster(prefills: Sequence[Worker], decodes: Sequence[Worker], **config: Any) -> dict[str, Any]:
    pools = {"prefill": {"urls": [w.url for w in prefills]}, "decode": {"urls": [w.url for w in decodes]}}
    return {"models": [{"name": MODEL, **pools}], **config}
