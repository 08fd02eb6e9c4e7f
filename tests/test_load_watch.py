"""What counts as a sign of life while a model is loaded."""

from __future__ import annotations

import threading
import time

import pytest

from dgnd.worker import load_watch
from dgnd.worker.load_watch import LoadWatch


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_watch, "PATIENCE_S", 1.0)
    monkeypatch.setattr(load_watch, "_TICK_S", 0.2)


def test_standing_still_is_noticed_once() -> None:
    hung: list[float] = []
    with LoadWatch(lambda: hung.append(1)):
        time.sleep(4)
    assert hung == [1]


def test_who_has_loaded_is_left_alone() -> None:
    hung = threading.Event()
    with LoadWatch(hung.set):
        pass
    assert not hung.wait(2.5)


def test_progress_and_work_are_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = threading.Event()
    with LoadWatch(hung.set) as watch:
        for _ in range(25):
            watch.sign()
            time.sleep(0.1)
        assert not hung.is_set()
        until = time.monotonic() + 2.5
        while time.monotonic() < until:  # computes
            pass
        assert not hung.is_set()


def test_work_without_progress_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_watch, "_BUSY_FACTOR", 2)
    hung = threading.Event()
    with LoadWatch(hung.set):
        until = time.monotonic() + 20
        while not hung.is_set() and time.monotonic() < until:
            pass
    assert hung.is_set()
