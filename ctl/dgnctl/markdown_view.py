"""Markdown as lines for a terminal, while it is still being written.

Blocks that are over are rendered once, the last one again whenever text comes. Knows nothing of cursors.
"""

from __future__ import annotations

import io
import itertools
from typing import ClassVar, Final

from markdown_it import MarkdownIt
from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

from dgnctl.output import printable

_TAB: Final = " " * 4
#: Colouring code takes a millisecond for a few lines, and keys wait meanwhile.
_LIVE_CODE_LINES: Final = 20


class _Heading(Heading):
    """On the left, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Code(MarkdownElement):
    """As it stands, two columns in, on the terminal's own background."""

    new_line = True

    @classmethod
    def create(cls, markdown: Markdown, token: object) -> _Code:
        return cls((getattr(token, "info", "") or "").partition(" ")[0])

    def __init__(self, language: str) -> None:
        self._language = language or "text"
        self._code = ""

    def on_text(self, context: object, text: str | Text) -> None:
        self._code += str(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = self._code.rstrip()
        syntax = Syntax(code, self._language, theme="ansi_dark", background_color="default", word_wrap=True)
        for line in console.render_lines(syntax, options.update(width=max(8, options.max_width - 2))):
            yield Segment("  ")
            yield from line
            yield Segment.line()


class _Markdown(Markdown):
    """Loses no text: what looks like HTML is shown, and lines break where the model broke them."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


_PARSER: Final = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class MarkdownLines:
    """One answer: `add` text, take `lines`. Each line stands for itself and is no wider than `width`."""

    def __init__(self, width: int, *, colors: bool = True) -> None:
        self.width = width
        self._colors = colors
        self._done: list[str] = []
        self._live = ""

    def add(self, text: str) -> None:
        """What has come of the answer; steering characters are left out."""
        self._live += printable(text).replace("\t", _TAB)

    def resize(self, width: int) -> None:
        """From here on `lines` has that width, and leaves out the blocks that were over before."""
        self.width = width
        self._done = []

    def lines(self) -> list[str]:
        """All lines as of now."""
        self._settle()
        live = self._render(self._live)
        return [*self._done, *live]

    def live_lines(self) -> int:
        """How many lines of the text are rendered again by the next `lines`."""
        return self._live.count("\n") + 1

    def _settle(self) -> None:
        """Blocks before the last one change no more, nor do lines of code that are far above its end."""
        blocks = [
            (token, token.map[0])
            for token in _PARSER.parse(self._live)
            if token.level == 0 and token.nesting >= 0 and token.map
        ]
        if not blocks:
            return
        source = self._live.split("\n")
        starts = [start for _, start in blocks]
        for begin, end in itertools.pairwise(starts):
            self._done += [*self._render("\n".join(source[begin:end])), ""]
        source = source[starts[-1] :]
        last = blocks[-1][0]
        if last.type == "fence" and len(source) > 2 * _LIVE_CODE_LINES:
            cut = len(source) - _LIVE_CODE_LINES
            while cut > 1 and not (source[cut - 1].strip() and source[cut].strip()):
                cut -= 1  # blank lines at an end would be lost
            if cut > 1:
                self._done += self._render("\n".join([*source[:cut], last.markup]))
                source = [source[0], *source[cut:]]
        self._live = "\n".join(source)

    def _render(self, text: str) -> list[str]:
        if not text.strip():
            return []
        console = Console(
            file=io.StringIO(),
            force_terminal=True,
            color_system="standard",
            width=self.width,
            legacy_windows=False,
        )
        rows = console.render_lines(_Markdown(text), pad=False)
        lines = ["".join(self._shown(segment) for segment in _trimmed(row)) for row in rows]
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            lines.pop(0)
        return lines

    def _shown(self, segment: Segment) -> str:
        if segment.style is None or segment.control:
            return segment.text
        style = segment.style if self._colors else segment.style.without_color
        return style.render(segment.text, color_system=ColorSystem.STANDARD)


def _trimmed(row: list[Segment]) -> list[Segment]:
    """Without the blanks that fill a line."""
    row = list(row)
    while row and (not row[-1].style or not row[-1].style.bgcolor or row[-1].style.bgcolor.is_default):
        last = row.pop()
        text = last.text.rstrip()
        if text:
            row.append(Segment(text, last.style))
            break
    return row


def clipped(text: str, width: int) -> str:
    """As much of a line as fits into `width` columns."""
    if cell_len(text) <= width:
        return text
    out, used = "", 0
    for char in text:
        used += cell_len(char)
        if used > max(0, width - 1):
            break
        out += char
    return out + "…"


def dim(text: str) -> str:
    """A line that is no part of an answer."""
    return f"\x1b[2m{text}\x1b[0m" if text else text
