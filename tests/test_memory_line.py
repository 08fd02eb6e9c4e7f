"""Who waits for memory: in which order, for how long, and what each is told."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from dgnd.errors import DgnError, NoRoomNow
from dgnd.sessions.memory_line import NEWS_S, RETRY_S, MemoryLine, lacks_memory

LACK = NoRoomNow("9 positions need 90 bytes, 40 are free", needed=90, free=40)


class Guest:
    """One answer in the line, and what it is told."""

    def __init__(self, line: MemoryLine, name: str, *, begun: bool = False, others: bool = False) -> None:
        self.line, self.name, self.begun, self.others = line, name, begun, others
        self.told: list[tuple[str, float]] = []
        self.news: list[str] = []
        self.turns = 0
        self.refused: NoRoomNow | None = None

    async def wait(self, error: DgnError = LACK) -> None:
        def tell(what: DgnError, deadline: float) -> None:
            assert lacks_memory(what)
            self.told.append((what.message, deadline - trio.current_time()))

        try:
            await self.line.wait(
                "m",
                self.name,
                error,
                begun=self.begun,
                tell=tell,
                news=self.news.append,
                others=lambda: self.others,
            )
            self.turns += 1
        except NoRoomNow as refused:
            self.refused = refused


def on_virtual_time(run: Any, *arguments: Any) -> None:
    trio.run(run, *arguments, clock=trio.testing.MockClock(autojump_threshold=0))


def test_first_come_first_served_and_each_is_told_its_place() -> None:
    async def run() -> None:
        line = MemoryLine(8, 100.0)
        guests = [Guest(line, name) for name in "abc"]
        async with trio.open_nursery() as nursery:
            for guest in guests:
                nursery.start_soon(guest.wait)
                await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(2 * RETRY_S)
            assert [guest.turns for guest in guests] == [1, 0, 0]
            assert [guest.news[-1] for guest in guests] == [
                f"waiting for memory: {ahead} ahead" for ahead in range(3)
            ]
            assert line.error("m") is LACK
            line.leave("a")  # it got what it waited for
            await trio.sleep(0.2)  # less than to its next try: the next in the line tries at once
            assert [guest.turns for guest in guests] == [1, 1, 0]
            assert guests[2].news == ["waiting for memory: 2 ahead", "waiting for memory: 1 ahead"]
            line.leave("c")  # it hung up
            line.leave("b")
        assert [guest.refused for guest in guests] == [None, None, None]
        assert line.error("m") is None

    on_virtual_time(run)


def test_an_answer_that_has_begun_comes_before_those_that_have_not() -> None:
    async def run() -> None:
        line = MemoryLine(1, 100.0)  # what has begun is not refused for being too many
        new, begun = Guest(line, "new"), Guest(line, "begun", begun=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(new.wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(begun.wait)
            await trio.sleep(2 * RETRY_S)
            assert (begun.turns, begun.news) == (1, ["waiting for memory: 0 ahead"])
            assert new.news[-1] == "waiting for memory: 1 ahead"
            line.leave("begun")
        assert new.turns == 1

    on_virtual_time(run)


def test_who_waits_too_long_is_refused_with_the_numbers() -> None:
    async def run() -> None:
        line = MemoryLine(8, 30.0)
        first, second = Guest(line, "first"), Guest(line, "second")
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(second.wait)
        assert (first.turns, second.turns) == (1, 0)
        assert trio.current_time() - begun == pytest.approx(30.0, abs=0.5)
        assert second.refused is not None
        assert second.refused.message == (
            f"{LACK.message}; it waited 30 s (wait_s in [limits]), 1 ahead of it"
        )
        assert second.refused.data == LACK.data
        assert not line.waits("second")
        await first.wait()  # it tried, and still lacks: its time goes on from when it came
        assert first.refused is not None
        assert "0 ahead of it" in first.refused.message
        assert line.error("m") is None

    on_virtual_time(run)


def test_too_many_are_refused_at_once_with_the_numbers() -> None:
    async def run() -> None:
        line = MemoryLine(1, 100.0)
        first, second = Guest(line, "first"), Guest(line, "second")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.wait)
            await trio.testing.wait_all_tasks_blocked()
            await second.wait()
        assert second.refused is not None
        assert "1 answer wait for that already, of 1 at most (waiting in [limits])" in second.refused.message
        assert second.refused.data == LACK.data
        assert second.news == []

    on_virtual_time(run)


def test_what_has_begun_waits_as_long_as_others_will_make_room() -> None:
    async def run() -> None:
        line = MemoryLine(8, 30.0)
        ahead = Guest(line, "ahead", begun=True)
        guest = Guest(line, "begun", begun=True, others=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ahead.wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(guest.wait)
            await trio.sleep(100.0)
            assert guest.refused is None
            assert guest.told[-1][1] == pytest.approx(30.0, abs=0.1)
            # The same place is news now and then: a sign of life.
            assert 100.0 // NEWS_S <= len(guest.news) <= 1 + 100.0 // NEWS_S
            guest.others = False
        assert guest.refused is not None

    on_virtual_time(run)
