"""`/docs` is one page of HTML, made of the OpenAPI document: nothing on it comes from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from starlette.responses import HTMLResponse, Response

# No script runs on the page, and nothing is loaded; its style is in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_STYLE = """\
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
details { border-top: 1px solid #8884; padding: .4rem 0; }
summary { cursor: pointer; } code, pre { font-family: ui-monospace, monospace; }
b { display: inline-block; min-width: 4.5rem; } pre { overflow-x: auto; font-size: .85rem; }
"""


def docs_page(document: dict[str, Any]) -> Response:
    """Return the page for an OpenAPI document, which is linked there as /openapi.json."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    operations = "\n".join(_operations(document))
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f'<body><h1>{title}</h1><p>For programs: <a href="/openapi.json">/openapi.json</a></p>\n'
        f"{operations}\n</body></html>\n"
    )
    return HTMLResponse(page, headers={"content-security-policy": _POLICY})


def _operations(document: dict[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield _operation(method.upper(), path, operation)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    about = operation.get("description") or operation.get("summary") or ""
    head = f"<summary><b>{escape(method)}</b><code>{escape(path)}</code> {escape(about)}</summary>"
    parts = {key: operation[key] for key in ("parameters", "requestBody", "responses") if key in operation}
    return f"<details>{head}<pre>{escape(json.dumps(parts, indent=2))}</pre></details>"
