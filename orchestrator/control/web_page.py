"""The page for people on the admin listener: a few files of the package, which come as they are.

They hold no figures: the page reads those from the same listener, with the key that its reader gives it. So
they are there without a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from orchestrator.errors import NotFound

FOLDER: Final = Path(__file__).parent / "page"
MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
# Only what comes from here runs, is loaded or is asked, and no page of others can hold this one.
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class WebPage:
    """It has the files in memory from the start on."""

    def __init__(self) -> None:
        files = (path for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES)
        self._files = {path.name: path.read_bytes() for path in files}
        self._paths = frozenset(f"/page/{name}" for name in self._files)

    def is_asked_for(self, scope: Scope) -> bool:
        """Tell whether a request is for the page or one of its files."""
        is_browser = scope["path"] == "/" and "text/html" in Headers(scope=scope).get("accept", "")
        return is_browser or scope["path"] in self._paths

    def page(self) -> Response:
        """Return the page itself."""
        return self._answer("index.html")

    async def file(self, request: Request, name: str) -> Response:
        """Return one of the files that the page loads."""
        if name not in self._files:
            raise NotFound(f"no such path: {request.method} {request.url.path[:200]}")
        return self._answer(name)

    def _answer(self, name: str) -> Response:
        return Response(self._files[name], media_type=MEDIA_TYPES[Path(name).suffix], headers=_HEADERS)
