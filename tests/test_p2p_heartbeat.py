"""Silence is counted in time that this process really had: virtual time, jumps and all."""

from __future__ import annotations

import itertools

import trio
from trio.testing import MockClock

from dgnd.p2p.heartbeat import Heartbeat
from dgnd.p2p.settings import NetworkSettings

SETTINGS = NetworkSettings()


def test_a_process_that_stood_still_blames_nobody_and_silence_is_found_all_the_same() -> None:
    clock = MockClock(autojump_threshold=0)
    ended_at: list[float] = []

    async def main() -> None:
        heard = 0.0
        heart = Heartbeat(SETTINGS, lambda nonce: None, lambda: heard)

        async def watch() -> None:
            assert await heart.watch(lambda: True) == "no sign of life for 6 s"
            ended_at.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            for stood_still_s in ([3.0], [30.0], [8 * 3600.0], [2.9, 2.9, 2.9]):
                # Nothing was heard for as long as is usual between two pings, when everything stops.
                await trio.sleep(SETTINGS.ping_s - 0.01)
                for stop_s in stood_still_s:
                    clock.jump(stop_s)
                    await trio.sleep(0.05)
                await trio.sleep(0.9)  # before what came meanwhile is read
                assert not ended_at
                heard = trio.current_time()
            await trio.sleep(SETTINGS.gone_s - 0.5)
            assert not ended_at
        assert ended_at[0] - heard < SETTINGS.gone_s + 2.1

    trio.run(main, clock=clock)


def test_a_peer_that_never_says_hello_is_let_go() -> None:
    async def main() -> None:
        heart = Heartbeat(SETTINGS, lambda nonce: None, trio.current_time)
        assert await heart.watch(lambda: False) == "no Hello within 10 s"
        assert 10 < trio.current_time() <= 12

    clock = MockClock(autojump_threshold=0)
    trio.run(main, clock=clock)


def test_of_two_that_rest_one_asks_at_a_time() -> None:
    """Whoever was heard a moment ago need not be asked for a sign of life."""
    heard = {"one": 0.0, "two": 0.0}
    asked: list[tuple[float, str]] = []
    hearts: dict[str, Heartbeat] = {}

    async def main() -> None:
        for name, other in (("one", "two"), ("two", "one")):

            def ask(nonce: int, name: str = name, other: str = other) -> None:
                asked.append((trio.current_time(), name))
                heard[other] = heard[name] = trio.current_time()
                hearts[name].pong(nonce)

            hearts[name] = Heartbeat(SETTINGS, ask, lambda name=name: heard[name])  # type: ignore[misc]
        with trio.move_on_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hearts["one"].watch, lambda: True)
                await trio.sleep(0.7)
                nursery.start_soon(hearts["two"].watch, lambda: True)
        assert trio.current_time() == 60  # nobody was taken for gone

    trio.run(main, clock=MockClock(autojump_threshold=0))
    for name in hearts:
        times = [when for when, who in asked if who == name]
        assert len(times) >= 60 / (SETTINGS.ping_s * 5) - 1  # its own round trips stay fresh
    pauses = [after - before for (before, _), (after, _) in itertools.pairwise(asked)]
    assert max(pauses) <= SETTINGS.gone_s - SETTINGS.ping_s
    assert len(asked) < 45  # each of them every ping_s would be 60
