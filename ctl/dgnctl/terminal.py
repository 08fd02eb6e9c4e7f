"""The two ways to hold a chat: a terminal, with keys that stop an answer, and plain lines from a pipe.

Whatever happens, the terminal is left as it was found.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Final, NoReturn, Protocol

import click

from dgnctl.output import discard_stdout, emit
from dgnd.errors import BadRequest

PROMPT: Final = "> "
_PULSE_S: Final = 0.5

Watch = Mapping[int, Callable[[], bool]]


class Screen(Protocol):
    """What a chat asks of the place it is held in."""

    interactive: bool

    def ask(self) -> str | None:
        """The next line; None at the end of input."""
        ...

    def streaming(self) -> contextlib.AbstractContextManager[Watch]:
        """While an answer comes: files to watch, whose callbacks tell whether to stop."""
        ...


class TypeAhead:
    """What is typed while an answer comes: the space key stops it, the rest is kept for the next prompt."""

    def __init__(self) -> None:
        self._kept = ""
        self._stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def begin(self) -> None:
        """A new answer comes."""
        self._stopped = False

    def receive(self, data: bytes) -> bool:
        """Takes keys; True when one of them stops the answer."""
        for char in self._decoder.decode(data):
            if char == "\x1b":  # an arrow or function key: the rest of it is no text
                break
            if char in "\x7f\b":
                self._kept = self._kept[:-1] if self._kept and self._kept[-1] != "\n" else self._kept
            elif char == " " and not self._stopped:
                self._stopped = True
            elif char in "\r\n":
                self._kept += "\n"
            elif char.isprintable():
                self._kept += char
        return self._stopped

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


class Terminal:
    """A chat at a terminal, with line editing."""

    interactive = True

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._ahead = TypeAhead()

    def ask(self) -> str | None:
        """The next line, first of those typed ahead. Ctrl-C gives up the line.

        Raises:
            BadRequest: the line is not valid text.
        """
        line = self._ahead.take_line()
        if line is not None:
            emit(f"{PROMPT}{line}\n")
            return line
        with _prefilled(self._ahead.take_rest()), _noticed_signals():
            try:
                return input(PROMPT)
            except EOFError:
                emit("\n")
                return None
            except KeyboardInterrupt:
                emit("\n(type exit, or Ctrl-D, to leave)\n")
                return ""
            except UnicodeDecodeError:
                raise BadRequest("that line is not valid text in this locale") from None

    @contextlib.contextmanager
    def streaming(self) -> Iterator[Watch]:
        """Keys come at once and are not echoed."""
        self._ahead.begin()
        with kept_settings(self._fd):
            tty.setcbreak(self._fd, termios.TCSANOW)
            yield {self._fd: self._on_keys}

    def _on_keys(self) -> bool:
        data = os.read(self._fd, 1024)
        if not data:
            raise SystemExit(128 + signal.SIGHUP)  # the terminal is gone
        return self._ahead.receive(data)


class Pipe:
    """A chat over pipes: a line in, an answer out, no prompts."""

    interactive = False

    def ask(self) -> str | None:
        """The next line of stdin.

        Raises:
            BadRequest: the line is not UTF-8.
        """
        data = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        if not data:
            return None
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"a line on stdin is not UTF-8: {error}") from None

    def streaming(self) -> contextlib.AbstractContextManager[Watch]:
        """Nothing to watch."""
        return contextlib.nullcontext({})


def open_screen() -> Screen:
    """A terminal where stdin and stdout are one, else pipes."""
    if sys.stdin is not None and sys.stdout is not None and sys.stdin.isatty() and sys.stdout.isatty():
        return Terminal()
    return Pipe()


@contextlib.contextmanager
def kept_settings(fd: int) -> Iterator[None]:
    """Puts a terminal's settings back at the end."""
    settings = termios.tcgetattr(fd)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # a terminal that is gone needs none
            termios.tcsetattr(fd, termios.TCSANOW, settings)


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """While it lasts, SIGTERM and SIGHUP unwind like an exit, so that what must be put back is."""
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hang_ups(screen: Screen) -> Iterator[None]:
    """A terminal that is gone, which reads and writes tell before SIGHUP comes or after it, ends alike."""
    try:
        yield
    except (OSError, termios.error) as error:
        if not screen.interactive or error.args[0] != errno.EIO:
            raise
        discard_stdout()
        raise SystemExit(128 + signal.SIGHUP) from None


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _noticed_signals() -> Iterator[None]:
    """While it lasts, no signal waits longer than _PULSE_S for its handler.

    Python's `input` runs handlers only where a signal interrupts its wait for keys. One that comes a moment
    before, while the prompt is being written, would stay unnoticed until a key is pressed.
    """
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, _PULSE_S, _PULSE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _prefilled(text: str) -> Iterator[None]:
    """The next prompt begins with `text`, where there is line editing."""
    try:
        import readline
    except ImportError:
        if text:
            click.echo(f"(typed ahead and lost, as there is no line editing here: {text})", err=True)
        yield
        return
    readline.set_startup_hook(lambda: readline.insert_text(text))
    try:
        yield
    finally:
        readline.set_startup_hook()
