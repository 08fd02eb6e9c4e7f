"""A chat at a terminal that can do more: an editor for what is said, answers as Markdown while they come.

Loaded only where there is one, as its libraries take a moment. Knows nothing of dgnd.
"""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus, is_searching
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from dgnctl.chat_completion import ChatCompleter
from dgnctl.markdown_view import MarkdownLines, clipped, dim
from dgnctl.output import emit, emit_raw, printable
from dgnctl.painter import Painter
from dgnctl.screen import Answering, Hints, Watch
from dgnctl.terminal import PROMPT, kept_settings, read_keys
from dgnctl.type_ahead import TypeAhead

#: Rendering takes no more than a share of the time: after it took t, the next begins _REST t later.
_REST: Final = 3.0
#: How often the line below an answer is brought up to date when nothing comes.
_TICK_S: Final = 0.5
_STYLE: Final = Style.from_dict({"bottom-toolbar": "noreverse dim", "bottom-toolbar.text": "noreverse dim"})


class FullTerminal:
    """Implements `dgnctl.screen.Screen`."""

    interactive = True

    def __init__(self, history: Path | None = None) -> None:
        self._fd = sys.stdin.fileno()
        self._ahead = TypeAhead()
        self._hints = Hints()
        self._history = History(history) if history else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_keys(),
            completer=ChatCompleter(lambda: self._hints.words),
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            history=self._history,
            bottom_toolbar=self._toolbar,
            prompt_continuation=_continuation,
            style=_STYLE,
        )

    def ask(self, begin: str, hints: Hints) -> str | None:
        """The next message, first of those typed ahead. Ctrl-C gives up what was typed."""
        self._hints = hints
        line = None if begin else self._ahead.take_line()
        if line is not None:
            emit(f"{PROMPT}{line}\n")
            return line
        try:
            return self._session.prompt(PROMPT, default=begin or self._ahead.take_rest())
        except EOFError:
            return None
        except KeyboardInterrupt:
            self.note("(type exit, or Ctrl-D, to leave)")
            return ""
        finally:
            if isinstance(self._history, History) and (problem := self._history.problem()):
                self.note(f"(what is typed is not kept: {problem})")

    @contextlib.contextmanager
    def answering(self, status: Callable[[], str]) -> Iterator[Answering]:
        """Keys come at once and are not echoed; below the answer is a line on how it stands."""
        self._ahead.begin()
        with kept_settings(self._fd):
            tty.setcbreak(self._fd, termios.TCSANOW)
            answer = MarkdownAnswer(self._fd, self._ahead, status)
            try:
                yield answer
            finally:
                answer.end()

    def note(self, text: str) -> None:
        """Dimmed."""
        emit_raw(dim(printable(text)) + "\n")

    def _toolbar(self) -> AnyFormattedText:
        return clipped(printable(self._hints.status), _columns())


class History(FileHistory):
    """What was typed, in a file; where that can't be used, the chat goes on."""

    _problem = ""
    _failed = False

    def load_history_strings(self) -> Iterable[str]:
        """What is in the file, the newest first; nothing where it can't be read."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Adds it to the file."""
        try:
            super().store_string(string)
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._problem = f"{os.fsdecode(self.filename)}: can't be written: {error.strerror or error}"
            self._failed = True

    def problem(self) -> str:
        """Why nothing is kept from now on; said once."""
        problem, self._problem = self._problem, ""
        return problem


class MarkdownAnswer:
    """An answer that is painted again as it grows. Implements `dgnctl.screen.Answering`."""

    tells = True

    def __init__(self, fd: int, ahead: TypeAhead, status: Callable[[], str]) -> None:
        self.watch: Watch = {fd: lambda: read_keys(fd, ahead)}
        self._status = status
        self._width = _columns()
        self._text = MarkdownLines(self._width, colors=not os.environ.get("NO_COLOR"))
        self._painter = Painter(emit_raw, _rows)
        self._notes: list[str] = []
        self._lines: list[str] = []
        self._stale = False  #: text came since `_lines` were made
        self._rested_at = 0.0

    def add(self, text: str) -> None:
        """Shown by the next `pause`."""
        self._text.add(text)
        self._stale = True

    def note(self, text: str) -> None:
        """Below what has come."""
        self._notes.append(dim(clipped(printable(text), self._width)))

    def pause(self) -> float:
        """Shows how it stands now, unless that was done a moment ago."""
        now = time.monotonic()
        if now < self._rested_at:
            return self._rested_at - now
        self._render()
        self._painter.paint([*self._lines, *self._notes, dim(clipped(self._status(), self._width))])
        took = time.monotonic() - now
        self._rested_at = now + took * (1 + _REST)
        return _TICK_S

    def end(self) -> None:
        """The answer and the notes stay."""
        self._render()
        self._painter.paint([*self._lines, *self._notes])
        self._painter.end()

    def _render(self) -> None:
        width = _columns()
        if width != self._width:  # what is shown was wrapped anew by the terminal: it stays as it is
            self._width = width
            self._text.resize(width)
            self._painter.end()
            self._stale = True
        if self._stale:
            self._lines = self._text.lines()
            self._stale = False


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER) & ~is_searching)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):  # goes on in the next line
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER) & ~is_searching)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _continuation(width: int, number: int, wrapped: int) -> str:
    return " " * width if wrapped else "… "


def _columns() -> int:
    """One less than the terminal has, where a character may be wider than it is taken for."""
    return max(8, _size().columns - 1)


def _rows() -> int:
    return max(2, _size().lines)


def _size() -> os.terminal_size:
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        return os.terminal_size((80, 24))
    return found if found.columns and found.lines else os.terminal_size((80, 24))
