"""What `baton explain` prints of options, and the page of the docs that has them all."""

from __future__ import annotations

import re

import pytest

from launch import manual
from launch.cli import main
from launch.exits import Exit
from launch.manual import NoSuchOption, explained, options
from orchestrator.compiled import ROOT
from orchestrator.config.base import is_reloadable, options_of
from orchestrator.config.options import Config
from orchestrator.routing.policies import POLICIES


def folded(name: str) -> str:
    return re.sub(r"^models\.\*\.(prefill|decode|both)", "models.*.ROLE", name)


NAMES = {folded(name) for name, _ in options_of(Config)}


def test_every_option_is_explained() -> None:
    found = {option.name: option for option in manual._walk(options())}
    assert found.keys() == NAMES
    assert all(option.about for option in found.values())
    reloadable = {name for name, option in options_of(Config) if is_reloadable(option)}
    assert {name for name, option in found.items() if option.is_reloadable} == set(map(folded, reloadable))


def test_the_page_is_what_is_made() -> None:
    """`python -m launch.manual > docs/config.md` makes it anew."""
    assert (ROOT / "docs/config.md").read_text("utf-8") == manual.page()


def test_links_of_the_page_lead_somewhere() -> None:
    page = manual.page()
    titles = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"## (.*)", page)
    }
    assert set(re.findall(r"\]\(#(.*?)\)", page)) <= titles


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_port", ["base_port: whole number (at least 1, at most 65535)", "  default: 8100"]),
        ("orchestrator.log.format", ["orchestrator.log.format: console, json", "  a change needs a restart"]),
        ("models.0.decode.seats", ["models.*.ROLE.seats: whole number (at least 1)"]),
        ("models[0].both.urls", ["models.*.ROLE.urls: list of texts", "  a reload takes it over"]),
        (
            "models.*.prefill.workers.2.gpus",
            ["models.*.ROLE.workers.*.gpus: list of whole numbers (at least 0, below 1024)"],
        ),
        ("models.0.name", ["models.*.name: text", "  it must be given"]),
        (
            "orchestrator.tls",
            ["orchestrator.tls: section", "  cert  This PEM file holds the certificate chain"],
        ),
        ("models", ["models: list of sections", "  ROLE       A pool of workers"]),
    ],
)
def test_what_is_said(name: str, expected: list[str]) -> None:
    text = explained(name)
    assert text.startswith(expected[0])
    assert all(line in text for line in expected), text


def test_an_option_that_is_a_policy_lists_them_all_with_their_arguments() -> None:
    text = explained("routing.decode")
    for policy in POLICIES.values():
        assert f"\n  {policy.name}\n" in text
        assert all(f"\n    {argument.name}: " in text for argument in policy.arguments)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("routing.prefil", "routing.prefill"),
        ("seats", "models.*.ROLE.seats"),
        ("listen", "orchestrator.listen"),
        ("models.prefill.sim", "models.*.ROLE.sim"),
        ("models.prefill", "models.*.ROLE"),
        ("models.decode.seat", "models.*.ROLE.seats"),
        ("orchestrator.request_timeout_s", "orchestrator.limits.request_timeout_s"),
        ("", None),
        ("a.b.\x1b[31m", None),
    ],
)
def test_one_that_there_is_not(name: str, nearest: str | None) -> None:
    with pytest.raises(NoSuchOption) as caught:
        explained(name)
    hint = str(caught.value).partition(", did you mean ")[2]
    assert hint == (f"{nearest!r}?" if nearest else "")
    assert "\x1b" not in str(caught.value)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "base_port"]) == Exit.OK
    assert capsys.readouterr().out == explained("base_port")
    assert main(["explain"]) == Exit.OK
    assert capsys.readouterr().out.startswith("orchestrator  This section describes the orchestrator")
    assert main(["explain", "base_prt"]) == Exit.USAGE
    assert capsys.readouterr().err == "there is no option 'base_prt', did you mean 'base_port'?\n"
