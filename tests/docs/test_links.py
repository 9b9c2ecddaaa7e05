"""Links between pages lead somewhere, every page can be found, and the site's list of pages is whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from orchestrator.compiled import ROOT
from tests.docs.pages import DOCS, PAGES, Page

EVERYWHERE = ("https://", "http://", "mailto:")
SITE = ROOT / "mkdocs.yml"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_what_is_there(path: Any) -> None:
    page = Page(path)
    assert [f"{page.name}:{line}: {target}" for line, target in page.links() if not leads(page, target)] == []


def leads(page: Page, target: str) -> bool:
    """Whether a link of that page leads to a file, and to a heading in it; other sites are not asked."""
    if target.startswith(EVERYWHERE):
        return True
    name, _, wanted = target.partition("#")
    path = (page.path.parent / name).resolve() if name else page.path
    if not path.is_file():
        return False
    if page.path.is_relative_to(DOCS) and not path.is_relative_to(DOCS):
        return False  # the site has nothing else
    return not wanted or wanted in Page(path, path.parent).anchors()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_headings_are_told_apart(path: Any) -> None:
    titles = [section.title for section in Page(path).sections()]
    assert sorted(titles) == sorted(set(titles))


def pages_of(nav: Any) -> Iterator[str]:
    """The pages that a part of the site's list names."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(part)


def listed() -> list[str]:
    return list(pages_of(yaml.safe_load(SITE.read_text())["nav"]))


def test_the_site_lists_every_page_once() -> None:
    assert sorted(listed()) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_first_page_has_them_in_the_order_of_the_site() -> None:
    index = Page(DOCS / "index.md")
    assert ["index.md", *(target for _, target in index.links())] == listed()
