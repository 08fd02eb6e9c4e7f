"""Markdown as lines while it grows."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from dgnctl.markdown_view import MarkdownLines, clipped

TEXT = """\
# A title

One *word* and `code`,
on two lines.

- first
- second, which is so long that it does not fit into a line of forty columns

```python
def f(x):
    return "日本" * x
```

| a | b |
|---|---|
| 1 | 2 |

> quoted

<b>not HTML</b> [link](http://x.org) 😀"""


def plain(lines: list[str]) -> list[str]:
    """Without colours."""
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def shown(text: str, pieces: int = 1, width: int = 40, *, colors: bool = True) -> list[str]:
    """The lines of a text that comes in pieces of so many characters."""
    view = MarkdownLines(width, colors=colors)
    lines: list[str] = []
    for begin in range(0, len(text), pieces):
        view.add(text[begin : begin + pieces])
        lines = view.lines()
    return lines


def test_a_whole_answer() -> None:
    lines = plain(shown(TEXT))
    assert lines[:5] == ["A title", "", "One word and code,", "on two lines.", ""]
    assert "  def f(x):" in lines
    assert '      return "日本" * x' in lines
    assert lines[-1] == "<b>not HTML</b> link (http://x.org) 😀"
    assert "▌ quoted" in lines


@pytest.mark.parametrize("pieces", [2, 7, 50, len(TEXT)])
def test_how_it_comes_does_not_matter(pieces: int) -> None:
    assert shown(TEXT, pieces) == shown(TEXT)


@pytest.mark.parametrize("fence", ["```", "~~~~"])
def test_long_code_is_not_coloured_again_and_loses_no_line(fence: str) -> None:
    code = [f"x{i} = {i}" if i % 3 else "" for i in range(1, 300)]
    text = "\n".join(["so:", "", f"{fence}python", *code, fence, "", "done"])
    view = MarkdownLines(40)
    for begin in range(0, len(text), 11):
        view.add(text[begin : begin + 11])
        view.lines()
        assert view.live_lines() < 60
    assert [line.strip() for line in plain(view.lines())] == ["so:", "", *code, "", "done"]


@given(st.text(st.characters(codec="utf-8"), max_size=200), st.integers(8, 60))
def test_any_text_gives_lines_that_fit_and_steer_nothing(text: str, width: int) -> None:
    for line in plain(shown(text, 20, width)):
        assert "\x1b" not in line
        assert "\n" not in line
        assert cell_len(line) <= max(width, 8)


@given(st.lists(st.from_regex(r"[a-z]{1,12}", fullmatch=True), min_size=1, max_size=40))
def test_no_word_is_lost(words: list[str]) -> None:
    lines = plain(shown(" ".join(words), 5, 20))
    assert " ".join(lines).split() == words


def test_colours_only_where_they_are_wanted() -> None:
    code = "```python\nreturn 'x'\n```"
    assert re.search(r"\x1b\[[0-9;]*3[0-7]", "".join(shown(code)))
    assert not re.search(r"\x1b\[([0-9]*;)*[349][0-7]", "".join(shown(code + "\n\n**bold**", colors=False)))
    assert "\x1b[1m" in "".join(shown("**bold**", colors=False))


def test_lines_are_clipped_by_columns() -> None:
    assert clipped("abc", 3) == "abc"
    assert clipped("abcd", 3) == "ab…"
    assert clipped("日本語", 5) == "日本…"
