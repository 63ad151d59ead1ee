"""Colours on a terminal, by the package rich where it is installed."""

from __future__ import annotations

import sys
from typing import TextIO


def marked(text: str, style: str, stream: TextIO | None = None) -> str:
    """The text in a colour; unchanged where there is no terminal, or no rich, or NO_COLOR is set.

    Args:
        text: one line.
        style: of rich, such as `bold red`.
        stream: where it will be written; None: standard output.
    """
    stream = stream or sys.stdout
    if not stream.isatty():
        return text
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return text
    console = Console(file=stream, width=len(text) + 1)
    with console.capture() as capture:
        console.print(Text(text, style=style), end="")
    return capture.get()
