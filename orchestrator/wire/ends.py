"""The end of a request, under the names that it had before it became part of `wire/info.py`."""

from orchestrator.wire.info import END_PATH as PATH
from orchestrator.wire.info import EndRequest, end_body

__all__ = ["PATH", "EndRequest", "end_body"]
