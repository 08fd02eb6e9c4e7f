"""How an answer stands, in one line: model, route, speed, context. Knows no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from dgnd.control import api

_SEPARATOR: Final = " · "


class AnswerState:
    """Of the answer that comes, or of the last one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.model = ""
        self.context = 0  #: positions that the model has
        self.used = 0  #: of them, at the end of the last answer
        self.route: Sequence[api.RouteHop] = ()
        self.waits = ""  #: what keeps the answer from going on
        self._tokens = 0  #: of the answer that comes
        self._asked = self._first = self._last = 0.0
        self._speed = 0.0
        self._coming = False

    def of(self, models: Sequence[api.ModelInfo], name: str | None) -> None:
        """The chat is with this model; without a name with the only one."""
        for model in models:
            if name == model.name or (name is None and len(models) == 1):
                self.model, self.context = model.name, model.context

    def begin(self) -> None:
        """Something was asked."""
        self._tokens, self._coming, self.waits = 0, True, ""
        self._asked = self._clock()

    def token(self) -> None:
        """One more has come."""
        self._last = self._clock()
        self._tokens += 1
        if self._tokens == 1:
            self._first = self._last
        elif self._last > self._first:
            self._speed = (self._tokens - 1) / (self._last - self._first)

    def stop(self) -> None:
        """No more comes."""
        self._coming, self.waits = False, ""

    def end(self, result: api.GenerateResult) -> None:
        """The answer as it was."""
        self.stop()
        self.route = result.route
        self.used = result.usage.prompt_tokens + result.usage.completion_tokens
        self._speed = speed(result) or self._speed

    def forget(self) -> None:
        """The conversation begins anew."""
        self.used = 0

    def line(self) -> str:
        """All of it that is known."""
        parts = [self.model, self._waiting() or route_in_words(self.route)]
        if self._speed and not self._waiting():
            parts.append(f"{self._speed:.1f} tok/s")
        used = self.used + (self._tokens if self._coming else 0)
        if self.context:
            parts.append(f"{used}/{self.context} tokens ({100 * used // self.context} %)")
        if self._coming:
            parts.append("space stops")
        return _SEPARATOR.join(part for part in parts if part)

    def _waiting(self) -> str:
        if not self._coming:
            return ""
        seconds = int(self._clock() - (self._last if self._tokens else self._asked))
        if self.waits:
            return self.waits
        return f"waits {seconds} s" if seconds >= 2 or not self._tokens else ""


def speed(result: api.GenerateResult) -> float | None:
    """Tokens a second after the first; None for an answer that is too short to tell."""
    count = result.usage.completion_tokens - 1
    return count / result.timings.decode_s if count > 0 and result.timings.decode_s > 0 else None


def route_in_words(route: Sequence[api.RouteHop]) -> str:
    """The nodes in order."""
    names: list[str] = []
    for hop in route:
        name = hop.name or f"…{hop.peer[-6:]}"
        if names[-1:] != [name]:
            names.append(name)
    return " → ".join(names)
