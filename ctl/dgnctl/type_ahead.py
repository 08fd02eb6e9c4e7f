"""Keys that are typed while an answer comes, as values. Knows no terminal."""

from __future__ import annotations

import codecs
from typing import Final

_MAX_SEQUENCE: Final = 32


class TypeAhead:
    """What is typed while an answer comes: the space key stops it, the rest is kept for the next prompt.

    A space within a line is of the line too, as who types a message ahead means it.
    """

    def __init__(self) -> None:
        self._kept = ""
        self._stopped = False
        self._escape = ""  #: as much as has come of what an arrow or function key sends, which is no text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def begin(self) -> None:
        """A new answer comes."""
        self._stopped = False

    def receive(self, data: bytes) -> bool:
        """Takes keys; True when one of them stops the answer."""
        for char in self._decoder.decode(data):
            if self._goes_on(char):
                continue
            if char in "\x7f\b":
                self._kept = self._kept[:-1] if self._kept and self._kept[-1] != "\n" else self._kept
            elif char == " " and not self._stopped:
                self._stopped = True
                self._kept += " " if self._kept and self._kept[-1] != "\n" else ""
            elif char in "\r\n":
                self._kept += "\n"
            elif char.isprintable():
                self._kept += char
        return self._stopped

    def _goes_on(self, char: str) -> bool:
        """Whether the character is of a sequence that began with Esc."""
        before = self._escape
        if char == "\x1b":
            self._escape = char
        elif before == "\x1b" and char in "[O":
            self._escape += char
        elif before[1:2] == "[" and not "@" <= char <= "~" and len(before) < _MAX_SEQUENCE:
            self._escape += char  # parameters of it
        elif len(before) > 1:
            self._escape = ""  # its end
        else:
            self._escape = ""
            return False
        return True

    def take_line(self) -> str | None:
        """A whole line that was typed ahead, if there is one."""
        line, newline, rest = self._kept.partition("\n")
        if not newline:
            return None
        self._kept = rest
        return line

    def take_rest(self) -> str:
        """The begin of a line that was typed ahead."""
        rest, self._kept = self._kept, ""
        return rest
