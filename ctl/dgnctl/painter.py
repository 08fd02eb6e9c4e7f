"""Lines that grow and change at the end of a terminal, above them what stays.

Writes escape codes, reads nothing. Only the lines that differ are written again; a line that has left the
screen stays as it was shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Painter:
    """Lines that begin in the first column of an empty line; each must fit into the terminal's width.

    Args:
        write: takes what goes to the terminal.
        height: gives its rows as of now.
    """

    def __init__(self, write: Callable[[str], None], height: Callable[[], int]) -> None:
        self._write = write
        self._height = height
        self._shown: list[str] = []

    def paint(self, lines: Sequence[str]) -> None:
        """The lines are now these; the cursor stays at the end of the last one."""
        same = 0
        for old, new in zip(self._shown, lines, strict=False):
            if old != new:
                break
            same += 1
        if same == len(self._shown) == len(lines):
            return
        top = max(0, len(self._shown) - max(2, self._height()))  # the first that is on the screen
        first = max(same, top)
        back = len(self._shown) - 1 - first
        out = ""
        if back >= 0:
            out = "\r" + (f"\x1b[{back}A" if back else "") + "\x1b[J"
        elif self._shown:
            out = "\r\n"
        rest = list(lines[first:])
        if not rest and back >= 0 and first > 0:  # the end went away: the cursor back to the line before
            out += "\x1b[A" + "\r" + lines[first - 1]
        self._write(out + "\r\n".join(rest))
        self._shown = list(lines)

    def end(self) -> None:
        """What is shown stays; the cursor goes to a line of its own."""
        if self._shown:
            self._write("\r\n")
        self._shown = []
