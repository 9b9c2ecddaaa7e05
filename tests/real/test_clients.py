"""Programs that people point at vLLM come to their end; those that need an installation: `make clients`."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.clients.programs import LIGHT, Program, Site
from tests.real.ask import ANSWERS
from tests.real.conftest import MODEL, Cluster


@pytest.mark.parametrize("program", LIGHT, ids=lambda program: program.name)
def test_a_program_comes_to_its_end(cluster: Cluster, tmp_path: Path, program: Program) -> None:
    program.run(Site(cluster.front, "tiny-chat", MODEL, ANSWERS, tmp_path))
