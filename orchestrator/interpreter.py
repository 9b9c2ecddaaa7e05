"""Processes that we start import our packages and the installed ones, never files of the current directory.

Python puts the current directory first for `python -m` and `python -c`: a file called `worker.py` or
`logging.py` that lies there would be executed in place of the module of that name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from orchestrator.compiled import ROOT

SAFE_PATH_ENV = "PYTHONSAFEPATH"
PATH_ENV = "PYTHONPATH"


def import_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what is set over `environ` for processes that we start, and inherited by what they start.

    Where our packages were found in the current directory, as in a checkout that is not installed, they are
    named: the processes would not find them there.
    """
    if not _is_found_in_current_directory():
        return {SAFE_PATH_ENV: "1"}
    paths = (str(ROOT), environ.get(PATH_ENV))
    return {SAFE_PATH_ENV: "1", PATH_ENV: os.pathsep.join(filter(None, paths))}


def _is_found_in_current_directory() -> bool:
    if sys.flags.safe_path or not sys.path:
        return False
    return os.path.realpath(sys.path[0] or os.curdir) == os.path.realpath(ROOT)
