"""The command line of `baton render`; it imports nothing that takes long."""

from __future__ import annotations

import argparse

ABOUT = "write Kubernetes objects or a Helm chart of CONFIG into a folder"
TARGETS = ("kubernetes", "helm")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what stands before CONFIG, and the options."""
    parser.add_argument("target", choices=TARGETS, help="plain objects for kubectl, or a chart for helm")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="write into this folder")
    parser.add_argument(
        "--force", action="store_true", help="write over files that this command has not written, too"
    )
