"""What a chat asks of the place it is held in, whatever that is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dgnctl.output import emit

Watch = Mapping[int, Callable[[], bool]]


@dataclass
class Hints:
    """What a terminal may show beside the line that is typed."""

    status: str = ""
    words: dict[str, list[str]] = field(default_factory=dict)  #: by command, what may come after it


class Answering(Protocol):
    """One answer as it comes."""

    watch: Watch  #: files whose callbacks tell whether to stop
    tells: bool  #: whether `note` shows anything

    def add(self, text: str) -> None:
        """More of it."""
        ...

    def note(self, text: str) -> None:
        """What happened to it meanwhile."""
        ...

    def pause(self) -> float:
        """Nothing more has come for now; returns the seconds after which this is to be called again."""
        ...


class Screen(Protocol):
    """What a chat asks of the place it is held in."""

    interactive: bool

    def ask(self, begin: str, hints: Hints) -> str | None:
        """The next line, which begins so; None at the end of input."""
        ...

    def answering(self, status: Callable[[], str]) -> contextlib.AbstractContextManager[Answering]:
        """An answer comes; `status` is a line on how it stands."""
        ...

    def note(self, text: str) -> None:
        """A line that is no part of an answer."""
        ...


class PlainAnswer:
    """An answer that is only written; it ends with a line break."""

    tells = False

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._last = "\n"

    def add(self, text: str) -> None:
        """Writes it at once."""
        self._last = text[-1:] or self._last
        emit(text)

    def note(self, text: str) -> None:
        """Nothing: what comes of it is told at the end."""

    def pause(self) -> float:
        """Nothing waits to be shown."""
        return math.inf

    def end(self) -> None:
        """The last line is ended."""
        if self._last != "\n":
            emit("\n")
