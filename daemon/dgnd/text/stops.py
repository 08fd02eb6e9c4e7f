"""Where an answer ends: an eos id, a stop text (also across token borders), or a sequence of token ids.

Text that might be the beginning of a stop is held back until it is known not to be. How the text is cut into
pieces changes nothing: a stop text counts where it first ends (the longest of those that end there). Matching
is that of Knuth, Morris and Pratt, so a character costs a constant for each stop. Knows nothing of
tokenizers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Sequence
from typing import Literal, NamedTuple

from dgnd.errors import BadRequest

StopKind = Literal["eos", "text", "ids"]

MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  #: characters of a stop text, ids of a stop sequence


class Shown(NamedTuple):
    """What a token led to: the text that may be shown now, whether the answer ends here, and by what."""

    text: str
    stopped: bool = False
    kind: StopKind | None = None


class Automaton:
    """Follows one pattern through a stream."""

    def __init__(self, pattern: Sequence[Hashable]) -> None:
        self.pattern = pattern
        self.matched = 0  #: the longest beginning of the pattern that the stream ends with
        self._fallback = [0] * len(pattern)
        length = 0
        for index in range(1, len(pattern)):
            while length and pattern[index] != pattern[length]:
                length = self._fallback[length - 1]
            length += pattern[index] == pattern[length]
            self._fallback[index] = length

    def advance(self, item: Hashable) -> bool:
        """Takes the next item; whether the whole pattern has just been seen (then it is not used further)."""
        while self.matched and item != self.pattern[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += item == self.pattern[self.matched]
        return self.matched == len(self.pattern)


def check_stops(stop_texts: Sequence[str], stop_id_sequences: Sequence[Sequence[int]]) -> None:
    """Raises BadRequest for stops that are empty, too long or too many."""
    for name, stops in (("stop", stop_texts), ("stop_ids", stop_id_sequences)):
        if len(stops) > MAX_STOPS:
            raise BadRequest(
                f"{name} has {len(stops)} entries; at most {MAX_STOPS} are allowed", setting=name
            )
        for stop in stops:
            if not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise BadRequest(
                    f"an entry of {name} has length {len(stop)}; it must lie in [1, {MAX_STOP_LENGTH}]",
                    setting=name,
                )


class StopMatcher:
    """One answer's stops."""

    def __init__(
        self,
        stop_texts: Sequence[str] = (),
        stop_id_sequences: Sequence[Sequence[int]] = (),
        eos_ids: Collection[int] = (),
    ) -> None:
        check_stops(stop_texts, stop_id_sequences)
        self._texts = [Automaton(stop) for stop in stop_texts]
        self._ids = [Automaton(tuple(stop)) for stop in stop_id_sequences]
        self._eos = frozenset(eos_ids)
        self._token_starts: deque[int] = deque(maxlen=max((len(a.pattern) for a in self._ids), default=0))
        self._held = ""
        self._start = 0  # where the held text begins in the whole text
        self._cut = False  # nothing more is shown

    def push(self, token_id: int, piece: str) -> Shown:
        """Takes the next token and the text that the detokenizer gave for it.

        An eos token's own text is not shown, nor is that of a stop sequence. After a stop only `flush` may
        follow.
        """
        if token_id in self._eos:
            return Shown(self._release(self._end), True, "eos")
        self._token_starts.append(self._end)
        lengths = [len(automaton.pattern) for automaton in self._ids if automaton.advance(token_id)]
        id_cut = self._token_starts[-max(lengths)] if lengths else None
        text_cut = self._take(piece)
        if id_cut is not None and (text_cut is None or id_cut <= text_cut):
            return self._stop(id_cut, "ids")
        if text_cut is not None:
            return self._stop(text_cut, "text")
        return Shown(self._release(self._safe()))

    def flush(self, tail: str = "") -> str:
        """The last text to show, when the answer is over; `tail` is what the detokenizer still held."""
        if self._cut:
            return ""
        text_cut = self._take(tail)
        self._cut = True
        return self._release(self._end if text_cut is None else text_cut)

    @property
    def _end(self) -> int:
        return self._start + len(self._held)

    def _take(self, piece: str) -> int | None:
        """Adds the piece to the held text; where the text is to be cut, when a stop text ended in it."""
        begin = self._end
        self._held += piece
        if not self._texts:
            return None
        for offset, char in enumerate(piece, begin + 1):
            lengths = [len(automaton.pattern) for automaton in self._texts if automaton.advance(char)]
            if lengths:
                return offset - max(lengths)
        return None

    def _safe(self) -> int:
        """Up to where the text can't be of a stop any more."""
        safe = self._end - max((automaton.matched for automaton in self._texts), default=0)
        begun = max((automaton.matched for automaton in self._ids), default=0)
        return min(safe, self._token_starts[-begun]) if begun else safe

    def _release(self, stop: int) -> str:
        text, self._held = self._held[: stop - self._start], self._held[stop - self._start :]
        self._start = stop
        return text

    def _stop(self, cut: int, kind: StopKind) -> Shown:
        self._cut = True
        return Shown(self._release(cut), True, kind)
