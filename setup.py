"""Baton's hot modules as C extensions, if BATON_COMPILE=1 is set; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
MYPYC = "mypy[mypyc]==2.4.1"  # as in requirements/constraints.txt


def main() -> None:
    if os.environ.get("BATON_COMPILE") != "1":
        setup()
    elif "egg_info" in sys.argv:  # pip asks what the build needs
        setup(setup_requires=_requirements())
    else:
        setup(ext_modules=_extensions())


def _requirements() -> list[str]:
    """mypyc, and what it takes the types of: all that Baton itself needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [MYPYC, *project["dependencies"]]


def _extensions() -> list[Extension]:
    _require_compiler()
    from mypyc.build import mypycify

    sys.path.insert(0, str(ROOT))
    from orchestrator.compiled import SOURCES, library

    return mypycify(list(SOURCES), opt_level="3", debug_level="0", group_name=library())


def _require_compiler() -> None:
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None:
        sys.exit(
            f"BATON_COMPILE=1 needs a C compiler, and there is no {compiler} (Debian: apt-get install gcc)"
        )
    if not headers.exists():
        sys.exit(f"BATON_COMPILE=1 needs Python's headers, not found: {headers} (Debian: python3-dev)")


main()
