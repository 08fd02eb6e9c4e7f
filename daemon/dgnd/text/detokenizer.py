"""Token ids to text, one at a time: what is shown is never half a character and is never taken back.

The decoder of `tokenizer.json` is rebuilt as a chain of stages that hold back only what they must: bytes that
don't make a character yet. The text of a sequence of ids is what the pieces make when put together; that is
also what `TextAssets.decode` returns. It equals `Tokenizer.decode` of the library, except where a run of byte
tokens holds both characters and invalid bytes: the library then drops the characters too, and can't know
before the run ends.

A decoder that is not known here is run by the library over a short window (`WindowStage`).
Knows nothing of stops or of sessions.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from dgnd.text.byte_level import token_bytes


class Stage(Protocol):
    """Takes pieces of text, gives pieces of text; `finish` gives what it still holds."""

    def push(self, piece: str) -> str: ...

    def finish(self) -> str: ...


class MapStage:
    """A change that looks at one piece alone."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self._change = change

    def push(self, piece: str) -> str:
        return self._change(piece)

    def finish(self) -> str:
        return ""


class Utf8Stage:
    """Tokens of a byte-level vocabulary; what is invalid becomes U+FFFD as WHATWG and Rust count it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: str) -> str:
        return self._decoder.decode(token_bytes(piece))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteFallbackStage:
    """`<0xE2>` tokens are bytes, all others are text; each invalid byte becomes one U+FFFD."""

    def __init__(self) -> None:
        self._held = b""

    def push(self, piece: str) -> str:
        byte = _fallback_byte(piece)
        if byte is None:
            return self.finish() + piece
        self._held += byte
        text = ""
        while self._held:
            need = _sequence_length(self._held)
            if need > len(self._held):
                break
            good = self._held[:need].decode("utf-8", "ignore") if need else ""
            text += good or "\ufffd"
            self._held = self._held[need if good else 1 :]
        return text

    def finish(self) -> str:
        text = "\ufffd" * len(self._held)
        self._held = b""
        return text


class StripStage:
    """Takes up to `count` of `char` off the beginning of the whole text."""

    def __init__(self, char: str, count: int) -> None:
        self._char, self._left = char, count

    def push(self, piece: str) -> str:
        while self._left and piece:
            if not piece.startswith(self._char):
                self._left = 0
                break
            piece = piece[len(self._char) :]
            self._left -= 1
        return piece

    def finish(self) -> str:
        return ""


class MetaspaceStage:
    """`▁` is a space, but nothing in the very first token."""

    def __init__(self, replacement: str, drop_first: bool) -> None:
        self._replacement, self._first = replacement, drop_first

    def push(self, piece: str) -> str:
        first, self._first = self._first, False
        return piece.replace(self._replacement, "" if first else " ")

    def finish(self) -> str:
        return ""


class WindowStage:
    """Any other decoder: a short window of tokens is decoded with and without the new one."""

    _LONGEST = 16  #: tokens that are held back at most

    def __init__(self, decode: Callable[[Sequence[str]], str]) -> None:
        self._decode = decode
        self._before: list[str] = []  # shown already, for context
        self._held: list[str] = []

    def push(self, piece: str) -> str:
        self._held.append(piece)
        text = self._new_text()
        if not text or (text.endswith("\ufffd") and len(self._held) < self._LONGEST):
            return ""
        self._before, self._held = self._held, []
        return text

    def finish(self) -> str:
        text = self._new_text() if self._held else ""
        self._before, self._held = self._held, []
        return text

    def _new_text(self) -> str:
        shown = self._decode(self._before) if self._before else ""
        return self._decode(self._before + self._held)[len(shown) :]


class Detokenizer:
    """One sequence of ids on its way to text."""

    def __init__(
        self, token: Callable[[int], str | None], stages: list[Stage], skipped: Collection[int]
    ) -> None:
        self._token, self._stages, self._skipped = token, stages, skipped

    def push(self, token_id: int) -> str:
        """The text that this id makes certain; often "", as for special tokens and half characters."""
        if token_id in self._skipped:
            return ""
        token = self._token(token_id)
        return "" if token is None else _through(self._stages, token)

    def finish(self) -> str:
        """What was held back; unfinished characters become U+FFFD."""
        text = ""
        for index, stage in enumerate(self._stages):
            rest = stage.finish()
            text += _through(self._stages[index + 1 :], rest) if rest else ""
        return text


def make_stages(
    decoder: dict[str, Any] | None, decode: Callable[[Sequence[str]], str], whole: bool
) -> list[Stage]:
    """The stages for a decoder as described in tokenizer.json.

    decode: the library's own decoder, for kinds not known here. `whole` false: as in the middle of a text, so
    that nothing is taken off the beginning.
    """
    if decoder is None:
        return [WindowStage(decode)]
    kinds = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    stages: list[Stage] = []
    fused = False
    for kind in kinds:
        stage = _stage(kind, fused, whole)
        if stage is None:
            return [WindowStage(decode)]
        stages.append(stage)
        fused = fused or kind["type"] in ("Fuse", "ByteLevel")
    return stages


def _stage(kind: dict[str, Any], fused: bool, whole: bool) -> Stage | None:
    match kind:
        case {"type": "ByteLevel"} if not fused:
            return Utf8Stage()
        case {"type": "ByteFallback"} if not fused:
            return ByteFallbackStage()
        case {"type": "Fuse"}:
            return MapStage(str)
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old and not fused:
            return MapStage(lambda piece: piece.replace(old, new))
        case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0} if fused:
            return StripStage(char, start if whole else 0)
        case {"type": "Metaspace", "replacement": str(char)} if not fused:
            return MetaspaceStage(char, whole and kind.get("prepend_scheme", "always") != "never")
        case _:
            return None


def _through(stages: Sequence[Stage], piece: str) -> str:
    for stage in stages:
        piece = stage.push(piece)
    return piece


def _fallback_byte(piece: str) -> bytes | None:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return None
    return None


def _sequence_length(held: bytes) -> int:
    """Bytes of the UTF-8 sequence that `held` begins; 0 when its first bytes can't begin one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for index in range(len(held)):
            if decoder.decode(held[index : index + 1]):
                return index + 1
    except UnicodeDecodeError:
        return 0
    return len(held) + 1
