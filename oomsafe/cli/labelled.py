"""Paragraphs in lines of a given width, each behind a short label."""

from __future__ import annotations

import re
import textwrap

from rich.text import Text

#: The cells of a label before its text.
LABEL = 8

#: The narrowest text: a terminal that is narrower breaks it by itself.
NARROWEST = 24


def labelled(label: str, text: str, width: int, style: str = "", indent: int = LABEL) -> list[Text]:
    """``why     It had the most points``, and the lines that follow indented by as much; in a narrow text the label has its own line."""
    narrow = width < 2 * NARROWEST
    lines = wrapped(text, width - (2 if narrow else indent))
    if narrow and label:
        return [Text(f"{label}:", style="bold"), *(Text(f"  {line}", style=style) for line in lines)]
    firsts = [f"{label:{2 if narrow else indent}}", *[" " * (2 if narrow else indent)] * len(lines)]
    return [Text.assemble((first, "bold"), (line, style)) for first, line in zip(firsts, lines, strict=False)]


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` characters, broken between words, and not within ``812 000``."""
    whole = re.sub(r"(?<=\d) (?=\d{3}\b)", "\xa0", text)
    return [line.replace("\xa0", " ") for line in textwrap.wrap(whole, width, break_on_hyphens=False)]
