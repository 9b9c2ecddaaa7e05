"""The admin API is not for pages of other sites that are open in an operator's browser.

Such a page can have the browser send requests without asking, if they look like those of forms, links or
images.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers

from orchestrator.api.base import JSON
from orchestrator.errors import Forbidden, UnsupportedMediaType

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN = frozenset({"same-origin", "none"})  # none: typed in, or a bookmark


def refuse_other_sites(method: str, headers: Headers) -> None:
    """Raise `Forbidden` if a page of another site sent the request, other than by a link to be read.

    Raises `UnsupportedMediaType` if a change comes with a body that is not JSON, as a form's would be.
    """
    if not _is_own_site(headers) and not _is_link(method, headers):
        raise Forbidden("pages of other sites may not use this listener")
    if any(not _is_own(origin, headers) for origin in headers.getlist("origin")):
        what = "read this" if method in _READS else "change anything"
        raise Forbidden(f"pages of other sites may not {what}")
    if method not in _READS and not _is_json(headers):
        raise UnsupportedMediaType("Unsupported Media Type: Only 'application/json' is allowed")


def _is_own_site(headers: Headers) -> bool:
    return all(site.strip().lower() in _OWN for site in headers.getlist("sec-fetch-site"))


def _is_link(method: str, headers: Headers) -> bool:
    """Return whether somebody follows a link: the page that has it sees nothing of the answer."""
    mode, what = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return method in _READS and (mode, what) == ("navigate", "document")


def _is_own(origin: str, headers: Headers) -> bool:
    return urlsplit(origin).netloc.lower() == headers.get("host", "").strip().lower()


def _is_json(headers: Headers) -> bool:
    content_types = headers.getlist("content-type")
    if not content_types:
        return "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
    return all(value.strip().lower().partition(";")[0] == JSON.decode() for value in content_types)
