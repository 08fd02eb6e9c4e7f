"""Lines that change at the end of a terminal, as a terminal shows them."""

from __future__ import annotations

import pyte
from hypothesis import given
from hypothesis import strategies as st

from dgnctl.painter import Painter

COLUMNS, ROWS = 20, 6


def painted(steps: list[list[str]], rows: int = ROWS) -> tuple[list[str], int, list[str]]:
    """The lines on the screen down to the cursor, its column, what was written."""
    screen = pyte.Screen(COLUMNS, rows)
    stream = pyte.Stream(screen)
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        stream.feed(text)

    painter = Painter(write, lambda: rows)
    for lines in steps:
        painter.paint(lines)
    shown = [row.rstrip() for row in screen.display[: screen.cursor.y + 1]]
    assert all(not row.strip() for row in screen.display[screen.cursor.y + 1 :])
    return shown, screen.cursor.x, written


LINES = st.lists(st.text("abc", max_size=COLUMNS - 1), min_size=1, max_size=ROWS - 1)


@given(st.lists(LINES, min_size=1, max_size=5))
def test_what_fits_is_shown_as_it_is_at_last(steps: list[list[str]]) -> None:
    shown, column, _ = painted(steps)
    assert shown == steps[-1]
    assert column == len(steps[-1][-1])


@given(st.lists(st.text("abc", max_size=COLUMNS - 1), min_size=1, max_size=20))
def test_what_grows_beyond_the_screen_ends_with_its_last_lines(lines: list[str]) -> None:
    steps = [[*lines[:count], "status"] for count in range(1, len(lines) + 1)]
    shown, _, _ = painted(steps)
    assert shown == [*lines, "status"][-len(shown) :]
    assert len(shown) == min(ROWS, len(lines) + 1)


def test_only_what_differs_is_written() -> None:
    _, _, written = painted(
        [["one", "two", "status 1"], ["one", "two", "status 1"], ["one", "two", "status 2"]]
    )
    assert len(written) == 2
    assert "one" not in written[1]
    assert "two" not in written[1]


def test_a_line_that_left_the_screen_is_not_touched() -> None:
    many = [f"line {i}" for i in range(10)]
    shown, _, _ = painted([many, ["changed", *many[1:], "more"]])
    assert shown == [*many, "more"][-ROWS:]
