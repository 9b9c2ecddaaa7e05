"""What the pages are held against finds slips: an option that there is not, a link that leads nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import symptoms
from tests.docs.commands import commands_in, fault, fault_in_prose
from tests.docs.pages import Page, anchor
from tests.docs.test_links import leads

PAGE = """\
# A title, `code` & more

See [here](#a-title-code--more), ![a picture](p.svg) and `[no](link)`.

<!-- at models.0 -->
```yaml
# no heading
a: 1
```

### Below
```text
one ... three
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Page:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return Page(path, tmp_path)


def test_a_page_is_taken_apart(page: Page) -> None:
    assert [section.title for section in page.sections()] == ["A title, `code` & more", "Below"]
    assert [(block.kind, block.note, block.text) for block in page.blocks] == [
        ("yaml", "at models.0", "# no heading\na: 1\n"),
        ("text", "", "one ... three\n"),
    ]
    assert list(page.links()) == [(3, "#a-title-code--more"), (3, "p.svg")]
    assert anchor("A title, `code` & more") == "a-title-code--more"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("#below", True),
        ("#above", False),
        ("page.md#below", True),
        ("page.md#above", False),
        ("p.svg", False),
        ("https://example.com/x", True),
    ],
)
def test_where_links_lead(page: Page, target: str, expected: bool) -> None:
    assert leads(page, target) is expected


@pytest.mark.parametrize(
    ("line", "is_right"),
    [
        ("baton up c.yaml --set base_port=1   # a comment", True),
        ("$ .venv/bin/baton plan CONFIG [--set a=1]", True),
        ("baton up c.yaml --sett a=1", False),
        ("baton upp c.yaml", False),
        ("baton check", False),
        ("make bench ARGS=--quick", True),
        ("make nothing", False),
        ("python -m bench.soak --quick", True),
        ("python -m bench.nothing", False),
        ("pip install . && baton check c.yaml", True),
        ("pip install . && baton check", False),
        ("rm -rf /", False),
    ],
)
def test_commands_that_can_be_and_that_cannot(line: str, is_right: bool) -> None:
    assert all(fault(words) is None for words in commands_in(line)) is is_right


def test_commands_go_on_over_lines() -> None:
    assert list(commands_in("curl -d '{\n  1}' URL\nbaton up \\\n    c.yaml\n")) == [
        ["curl", "-d", "{\n  1}", "URL"],
        ["baton", "up", "c.yaml"],
    ]


@pytest.mark.parametrize(
    ("words", "is_right"),
    [
        ("up", True),
        ("key new", True),
        ("up --dry-run", True),
        ("--help", True),
        ("upp", False),
        ("up --no", False),
    ],
)
def test_commands_in_sentences(words: str, is_right: bool) -> None:
    assert (fault_in_prose(words.split()) is None) is is_right


def test_a_quoted_line_that_was_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symptoms, "quoted", lambda: {"It burns": ["fire in ...", "HTTP/1.1 503"]})
    monkeypatch.setattr(symptoms, "MADE", {"It burns": "test"})
    symptoms.check("It burns", "fire in hall 3\nHTTP/1.1 503 Service Unavailable")
    with pytest.raises(AssertionError, match=r"not seen:\nHTTP/1\.1 503\nbut"):
        symptoms.check("It burns", "fire in hall 3\nHTTP/1.1 500")
    with pytest.raises(AssertionError, match="no test says"):
        symptoms.check("It floods", "")
