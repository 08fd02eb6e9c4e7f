"""How many sessions an origin keeps: their KV makes room by age, their token ids stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from dgnd.errors import LimitError
from dgnd.origin import conversation
from dgnd.origin.conversation import Conversation, ConversationBook

MODEL: Any = SimpleNamespace(name="m")


class Hops:
    """What a conversation needs of its driver: whether it holds KV, and letting it go."""

    def __init__(self) -> None:
        self.session = SimpleNamespace(route=("a hop",))

    def close(self) -> None:
        self.session.route = ()


def fill(book: ConversationBook, names: list[str]) -> None:
    for age, name in enumerate(names):
        with book.use(name, new, MODEL) as item:
            item.tokens = [age]
        item.last_used = float(age)


def new(name: str, model: Any) -> Conversation:
    driver: Any = Hops()
    return Conversation(driver, model)


async def room_is_made_by_the_oldest_kv_and_no_ids_are_lost() -> None:
    book = ConversationBook()
    fill(book, ["old", "middle", "new"])
    book.make_room(3)
    held = {
        name: bool(item.driver.session.route) for name in ("old", "middle", "new") if (item := book.get(name))
    }
    assert held == {"old": False, "middle": True, "new": True}
    assert [item.tokens for item in book] == [[0], [1], [2]]


async def busy_sessions_are_never_touched() -> None:
    book = ConversationBook()
    fill(book, ["one", "two"])
    refused = pytest.raises(LimitError, match="2 sessions are answering, of 2 at most")
    with book.use("one", new, MODEL), book.use("two", new, MODEL), refused:
        book.make_room(2)
    assert all(item.driver.session.route for item in book)


async def names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "MAX_NAMED", 2)
    book = ConversationBook()
    fill(book, ["old", "new"])
    book.make_room(64)
    assert book.get("old") is None
    assert book.get("new") is not None


def test_room_is_made_by_the_oldest_kv_and_no_ids_are_lost() -> None:
    trio.run(room_is_made_by_the_oldest_kv_and_no_ids_are_lost)


def test_busy_sessions_are_never_touched() -> None:
    trio.run(busy_sessions_are_never_touched)


def test_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    trio.run(names_are_bounded, monkeypatch)
