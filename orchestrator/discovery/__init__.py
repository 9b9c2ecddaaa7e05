"""Sources find workers. A new one is one file, its option in `DiscoverConfig`, and its entry here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from orchestrator.discovery.base import MakeSource
from orchestrator.discovery.dns import dns_source
from orchestrator.discovery.file import file_source
from orchestrator.discovery.kubernetes import kubernetes_source

# By the option of `models.*.ROLE.discover` that asks for it.
SOURCES: Final[Mapping[str, MakeSource]] = {
    "file": file_source,
    "dns": dns_source,
    "kubernetes": kubernetes_source,
}
