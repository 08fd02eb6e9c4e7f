"""The two ways to hold a chat: a terminal, with keys that stop an answer, and plain lines from a pipe.

Whatever happens, the terminal is left as it was found.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import click

from dgnctl.output import discard_stdout, emit
from dgnctl.screen import Answering, Hints, PlainAnswer, Screen
from dgnctl.type_ahead import TypeAhead
from dgnd.errors import BadRequest

PROMPT: Final = "> "
_PULSE_S: Final = 0.5


class Terminal:
    """A chat at a terminal of which nothing is known, with line editing."""

    interactive = True

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._ahead = TypeAhead()

    def ask(self, begin: str, hints: Hints) -> str | None:
        """The next line, first of those typed ahead. Ctrl-C gives up the line.

        Raises:
            BadRequest: the line is not valid text.
        """
        line = None if begin else self._ahead.take_line()
        if line is not None:
            emit(f"{PROMPT}{line}\n")
            return line
        with _prefilled(begin or self._ahead.take_rest()), _noticed_signals():
            try:
                return input(PROMPT)
            except EOFError:
                emit("\n")
                return None
            except KeyboardInterrupt:
                emit("\n(type exit, or Ctrl-D, to leave)\n")
                return ""
            except UnicodeDecodeError:
                raise BadRequest(
                    "that line is not valid text in this locale; try a UTF-8 locale, such as LANG=C.UTF-8"
                ) from None

    @contextlib.contextmanager
    def answering(self, status: Callable[[], str]) -> Iterator[Answering]:
        """Keys come at once and are not echoed."""
        self._ahead.begin()
        with kept_settings(self._fd):
            tty.setcbreak(self._fd, termios.TCSANOW)
            answer = PlainAnswer({self._fd: lambda: read_keys(self._fd, self._ahead)})
            try:
                yield answer
            finally:
                answer.end()

    def note(self, text: str) -> None:
        """On stdout, among the answers."""
        click.echo(text)


def read_keys(fd: int, ahead: TypeAhead) -> bool:
    """Takes what was typed; True when it stops the answer. Ends the program where the terminal is gone."""
    data = os.read(fd, 1024)
    if not data:
        discard_stdout()
        raise SystemExit(128 + signal.SIGHUP)
    return ahead.receive(data)


class Pipe:
    """A chat over pipes: a line in, an answer out, no prompts."""

    interactive = False

    def ask(self, begin: str, hints: Hints) -> str | None:
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
            raise BadRequest(f"a line on stdin is not UTF-8: {error}; iconv -t UTF-8 makes it so") from None

    @contextlib.contextmanager
    def answering(self, status: Callable[[], str]) -> Iterator[Answering]:
        """Nothing to watch."""
        answer = PlainAnswer({})
        try:
            yield answer
        finally:
            answer.end()

    def note(self, text: str) -> None:
        """On stderr, as stdout is for answers."""
        click.echo(text, err=True)


def open_screen(history: Callable[[], Path | None]) -> Screen:
    """Pipes, unless stdin and stdout are a terminal; a plain one where it can't do more. `history` gives the
    file for what is typed, if it is to be kept."""
    if sys.stdin is None or sys.stdout is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Pipe()
    if os.environ.get("TERM", "").lower() in ("", "dumb", "unknown"):
        return Terminal()
    from dgnctl.chat_terminal import FullTerminal  # takes a moment, which pipes need not wait for

    return FullTerminal(history())


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
    if number == signal.SIGHUP:
        discard_stdout()  # what is left in it would fail at the very end, with another exit code
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
