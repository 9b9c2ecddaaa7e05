"""What cannot be rendered ends the command, with words for the user."""

from __future__ import annotations


class RenderError(Exception):
    """The config is right, but nothing can be made of it, or nothing can be written."""
