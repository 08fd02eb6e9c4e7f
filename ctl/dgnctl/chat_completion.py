"""Completion of commands and of what comes after them. What is said to the model is not completed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from dgnctl.chat_line import COMMANDS

_WITH_FILE = ("save", "load")


class ChatCompleter(Completer):
    """Completes only where the text begins with a slash.

    Args:
        words: gives, by command, what may come after it.
    """

    def __init__(self, words: Callable[[], Mapping[str, Sequence[str]]]) -> None:
        self._words = words
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Commands, then files, models, settings."""
        before = document.text_before_cursor
        if not before.startswith("/") or "\n" in before:
            return
        command, space, argument = before[1:].partition(" ")
        if not space:
            for name, found in COMMANDS.items():
                if name.startswith(command):
                    yield Completion(name, -len(command), display=f"/{name}", display_meta=found.about)
        elif command in _WITH_FILE:
            yield from self._paths.get_completions(Document(argument, len(argument)), complete_event)
        else:
            for word in self._words().get(command, ()):
                if word.startswith(argument):
                    yield Completion(word, -len(argument))
