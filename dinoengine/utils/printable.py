"""Text that was given by others, as it may be shown on a terminal, in a log or on a page."""

from __future__ import annotations

import re

# What moves the cursor, colours, rings, breaks lines or turns the direction of writing, and what no encoding can write.
# Not all that str.isprintable() denies: letters of some alphabets need joiners, and fonts are newer than Python's tables.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text in one line without control characters: each becomes its escape, as ``repr`` writes it (``\\x1b``, ``\\n``).

    For names of files, of which only "/" and NUL are not allowed: one could clear the screen, or look like lines of a log.
    """
    return _UNSAFE.sub(lambda match: repr(match.group())[1:-1], text)


def printable_lines(text: str) -> str:
    """A message of several lines, each ``printable`` (tabulators stay)."""
    return re.sub(r"[^\n\t]+", lambda match: printable(match.group()), text)
