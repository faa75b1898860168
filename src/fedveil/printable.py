"""Texts that others may have written, made fit to be shown: nothing in them steers a terminal.

An escape sequence moves a terminal's cursor or sets its title, a carriage return writes over a
line, a line break adds one to a log, and marks of direction turn letters around. All of them are
shown as Python writes them in a string; half a character is a question mark. The words of every
error go through here (errors.py), every line of a log (log.py), what is printed (screen.py), and
the pages of reports (report/page/rendering.py).
"""

from __future__ import annotations

import unicodedata

__all__ = ["one_line", "printable"]

_JOINERS = "\u200c\u200d"
"""They shape letters of Persian and Hindi, and emoji of several parts."""


def one_line(text: str) -> str:
    """A text in one line, in which whatever is no letter, sign or space is written out: "\\x1b"."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def printable(text: str) -> str:
    """The same of each line of a text that may have several."""
    return "\n".join(map(one_line, text.split("\n")))


def _shown(character: str) -> str:
    if (
        character.isprintable()
        or character in _JOINERS
        or unicodedata.category(character) == "Zs"  # a space, such as that between Japanese words
    ):
        return character
    if "\ud800" <= character <= "\udfff":  # half a character of UTF-16, which no file can hold
        return "?"
    return character.encode("unicode_escape").decode("ascii")
