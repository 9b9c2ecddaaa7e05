"""docs/commands.md is what the command line says of itself."""

from __future__ import annotations

import argparse

from launch.cli import _parser
from launch.reference import page
from orchestrator.compiled import ROOT


def test_the_page_is_as_the_commands_are() -> None:
    """`python -m launch.reference > docs/commands.md` makes it anew."""
    assert (ROOT / "docs/commands.md").read_text("utf-8") == page(_parser())


def test_what_a_section_says() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    key = commands.add_parser("key", help="make keys").add_subparsers()
    new = key.add_parser("new", help="make one", description="Make a key.")
    new.add_argument("name", metavar="NAME", nargs="?", help="of its owner | user")
    new.add_argument("-n", "--number", metavar="N", default=3, help="so many; default: %(default)d")
    new.add_argument("--force", action="store_true", help="even if it is there")
    new.add_argument("--hidden", help=argparse.SUPPRESS)
    sections = page(parser).split("\n## ")
    assert sections[1].splitlines() == [
        "`baton key new`",
        "",
        "`baton key new [NAME]`: Make a key.",
        "",
        "| argument | what it is for |",
        "|---|---|",
        "| `NAME` | of its owner \\| user |",
        "| `-n`, `--number N` | so many; default: 3 |",
        "| `--force` | even if it is there |",
        "",
        "More: [who may do what](operating.md#keys-who-may-do-what).",
    ]
    assert sections[2].startswith("Exit codes\n\n| code | means |\n|---|---|\n| 0 | done")


def test_a_command_without_arguments_has_no_table() -> None:
    parser = argparse.ArgumentParser()
    parser.add_subparsers().add_parser("schema", help="print it")
    assert "`baton schema`: print it.\n\nMore: [all options](config.md).\n" in page(parser)
