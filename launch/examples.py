"""The example configs: of a checkout, or as an installed package carries them."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"  # in a checkout
PACKAGE = "baton-serve"


def examples() -> dict[str, Path]:
    """Return the files by their names, without `.yaml`."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) or _installed()}


def _installed() -> list[Path]:
    from importlib.metadata import PackageNotFoundError, distribution  # slow, and seldom needed

    try:
        files = distribution(PACKAGE).files or ()
    except PackageNotFoundError:
        return []
    found = (file for file in files if file.match("share/baton/configs/*.yaml"))
    return sorted(Path(str(file.locate())).resolve() for file in found)
