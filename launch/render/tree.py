"""Objects of Kubernetes are plain data, with reasons, and with values that users change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Noted:
    """A part with its reason, which becomes a comment above it."""

    tree: Tree
    why: str


@dataclass(frozen=True, slots=True)
class Value:
    """A value that a Helm chart takes from its values; everywhere else it is the default."""

    default: str | int
    template: str  # what Helm makes of it


Tree: TypeAlias = "Scalar | Value | Noted | Sequence[Tree] | Mapping[str, Tree]"
Object: TypeAlias = Mapping[str, "Tree"]


def plain(tree: Tree) -> Any:
    """Return the data alone: without reasons, values with their defaults."""
    match tree:
        case Noted():
            return plain(tree.tree)
        case Value():
            return tree.default
        case Mapping():
            return {key: plain(item) for key, item in tree.items()}
        case str():
            return tree
        case Sequence():
            return [plain(item) for item in tree]
    return tree


def without_none(**given: Tree) -> dict[str, Tree]:
    """Return the mapping without what is None."""
    return {key: tree for key, tree in given.items() if tree is not None}
