"""Someone at a terminal of some size: dgnctl in a pseudo-terminal, its screen as pyte has it."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import pexpect
import pyte

DEADLINE_S = 45.0


class Screen(pyte.HistoryScreen):
    """What leaves it at the top is kept; it answers what is asked of it, as terminals do."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], object]) -> None:
        super().__init__(columns, rows, history=10_000, ratio=1.0)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)


class Seat:
    """A context manager; `keys` types, `shows` waits for something on the screen."""

    def __init__(
        self, *arguments: str, columns: int = 80, rows: int = 24, env: Mapping[str, str] | None = None
    ) -> None:
        environment = {**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", **(env or {})}
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "dgnctl", *arguments],
            dimensions=(rows, columns),
            env=environment,
            encoding=None,
            timeout=DEADLINE_S,
        )
        self.child.delaybeforesend = None
        self.screen = Screen(columns, rows, lambda data: self.child.send(data.encode()))
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""  #: all that came

    def __enter__(self) -> Seat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.child.close(force=True)

    # --- keys

    def keys(self, text: str) -> None:
        """Types; Enter is \\r."""
        self.child.send(text.encode())

    def resize(self, columns: int, rows: int) -> None:
        """The window gets another size."""
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    # --- what is seen

    def feed(self, wait_s: float = 0.05) -> bool:
        """Takes what has come; False at the end."""
        try:
            data = self.child.read_nonblocking(65536, wait_s)
        except pexpect.TIMEOUT:
            return True
        except (pexpect.EOF, OSError) as end:
            if isinstance(end, OSError) and end.errno != errno.EIO:
                raise
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def rows(self) -> list[str]:
        """What is on the screen."""
        return [row.rstrip() for row in self.screen.display]

    def everything(self) -> str:
        """What has left the screen at the top, and what is on it."""
        above = []
        for line in self.screen.history.top:
            above.append("".join(line[x].data for x in range(self.screen.columns)).rstrip())
        return "\n".join([*above, *self.rows()])

    def until(self, true: Callable[[], Any], what: str) -> Any:
        """Takes what comes until the condition holds; returns what it returned."""
        end = time.monotonic() + DEADLINE_S
        while True:
            found = true()
            if found:
                return found
            shown = "\n".join(self.rows())
            assert time.monotonic() < end, f"no {what}; the screen:\n{shown}"
            assert self.feed() or true(), f"it ended before {what}; the screen:\n{shown}"

    def shows(self, pattern: str) -> re.Match[str]:
        """Waits until something like it is on the screen."""
        found: re.Match[str] = self.until(
            lambda: re.search(pattern, "\n".join(self.rows()), re.MULTILINE), repr(pattern)
        )
        return found

    def prompt(self) -> None:
        """Waits until it can be typed: an empty prompt, and below it only the status line."""
        self.until(self.at_prompt, "prompt")

    def at_prompt(self) -> bool:
        """Whether the cursor is behind an empty prompt."""
        cursor = self.screen.cursor
        return cursor.x == 2 and self.rows()[cursor.y] == ">"

    def say(self, text: str) -> str:
        """Types a message; returns what is shown from there until the next prompt."""
        before = len(self.everything_above())
        self.keys(text)
        self.until(lambda: text.split("\n")[-1][-20:] in "\n".join(self.rows()), f"echo of {text!r}")
        self.keys("\r")
        self.until(
            lambda: self.at_prompt() and len(self.everything_above()) > before, f"prompt after {text!r}"
        )
        return "\n".join(self.everything_above()[before:]).strip("\n")

    def everything_above(self) -> list[str]:
        """The lines above the one with the cursor."""
        above = len(self.screen.history.top)
        return self.everything().split("\n")[: above + self.screen.cursor.y]

    def ends(self) -> int:
        """Waits for the end; returns the exit code."""
        end = time.monotonic() + DEADLINE_S
        while self.feed():
            assert time.monotonic() < end, "it does not end"
        self.child.wait()
        code: int = self.child.exitstatus
        return code
