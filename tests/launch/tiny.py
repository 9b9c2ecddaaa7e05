"""A tiny checkout: one module has a compiled form, which is built in seconds, by the real `setup.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from orchestrator.compiled import ROOT
from orchestrator.form import BUILDS_ENV, FORM_ENV
from orchestrator.interpreter import PATH_ENV, SAFE_PATH_ENV

FILES = (
    *("setup.py", "pyproject.toml", "README.md", "LICENSE", "launch/__init__.py", "launch/compile.py"),
    *("orchestrator/__init__.py", "orchestrator/compiled.py", "orchestrator/form.py"),
)
# With these in the environment it would find, and build, this checkout in place of itself.
_NOT_ITS_OWN = {FORM_ENV, PATH_ENV, SAFE_PATH_ENV}
SOURCE = "from orchestrator.two import FACTOR\n\n\ndef times(n: int) -> int:\n    return FACTOR * n\n"
ASKED = """
import os
from orchestrator.form import take_form
form = take_form(os.environ)
from orchestrator import one
print(one.__file__.endswith(".so"), one.times(4), form.reason)
"""


@dataclass
class Checkout:
    """`root` is the checkout, `builds` where its builds are."""

    root: Path
    builds: Path

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in _NOT_ITS_OWN}
        return {**kept, BUILDS_ENV: str(self.builds)}

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, *arguments)
        return subprocess.run(
            command, cwd=self.root, env=self.env | env, text=True, capture_output=True, check=False
        )

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            (sys.executable, *arguments),
            cwd=self.root,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def compile(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "launch.compile", *arguments, **env)

    def form(self, **env: str) -> tuple[bool, int, str]:
        """Whether a process runs the compiled form, what its module computes, and why."""
        done = self.run("-c", ASKED, **env)
        assert done.returncode == 0, done.stderr
        compiled, product, reason = done.stdout.strip().split(maxsplit=2)
        return compiled == "True", int(product), reason

    def all_builds(self) -> list[Path]:
        return [path.parent for path in self.builds.glob("*/manifest")]


def make_checkout(folder: Path) -> Checkout:
    root = folder / "checkout"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    listing = root / "orchestrator/compiled.py"
    text, count = re.subn(
        r"^MODULES = \(.*?^\)", 'MODULES = ("orchestrator.one",)', listing.read_text(), flags=re.DOTALL | re.M
    )
    assert count == 1
    listing.write_text(text)
    made = Checkout(root, folder / "builds")
    made.write("orchestrator/one.py", SOURCE)
    made.write("orchestrator/two.py", "from typing import Final\n\nFACTOR: Final = 2\n")
    return made
