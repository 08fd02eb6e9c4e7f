"""Conversations over HTTP go on in the session that answered their beginning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from http_kit import HttpNode, http_node
from user_kit import readable_model

from dgnd.control import api
from dgnd.http.kept import KeptSessions

MOST = 2


def asked(*texts: str, model: str = "m") -> api.GenerateParams:
    """Users and assistants in turns."""
    roles: Any = ["user", "assistant"]
    messages = [api.ChatMessage(roles[index % 2], text) for index, text in enumerate(texts)]
    return api.GenerateParams(model=model, messages=messages)


def answered(kept: KeptSessions, *texts: str) -> str:
    name = kept.take(asked(*texts))
    assert name is not None
    kept.keep(name, asked(*texts))
    return name


def test_who_answered_the_beginning_goes_on() -> None:
    kept = KeptSessions(8)
    first = answered(kept, "a")
    assert answered(kept, "b") != first
    assert answered(kept, "a", "any answer", "c") == first
    assert answered(kept, "a", "any answer", "c") == first  # asked again
    assert answered(kept, "a", "any answer", "c", "x", "d") == first
    assert kept.take(asked("a", "any answer", "c", "x", "d", "y", "e", model="other")) != first
    assert kept.take(asked("a", "another answer", "c", "x", "d", "y", "e")) != first
    assert kept.take(asked("a", "any answer", "c", "x", "d", "y", "e")) == first
    assert kept.take(asked("a", "any answer", "c", "x", "d", "y", "e")) != first  # it is taken


def test_no_more_are_kept_than_may_be() -> None:
    kept = KeptSessions(MOST)
    first, second = answered(kept, "a"), answered(kept, "b")
    assert kept.keep("third", asked("c")) == [first]
    assert kept.keep("fourth", asked("c")) == ["third"]
    assert kept.take(asked("b")) == second
    assert KeptSessions(0).take(asked("a")) is None
    assert kept.take(api.GenerateParams(prompt="bare", raw=True)) is None


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpNode]:
    directory = tmp_path_factory.mktemp("kept")
    model = readable_model(directory / "m", max_positions=4096)
    models = {"m": {"path": str(model), "backend": "reference"}}
    with http_node(directory / "nodes", models, {"m": "embed,0-3,head"}, f"conversations = {MOST}") as node:
        yield node


@pytest.fixture(scope="module")
def client(http: HttpNode) -> Iterator[openai.OpenAI]:
    with http.openai() as client:
        yield client


def sessions(http: HttpNode) -> dict[str, int]:
    return {session.id: session.position for session in http.node.status().sessions}


def test_a_conversation_keeps_its_session_and_its_answers(http: HttpNode, client: openai.OpenAI) -> None:
    talk: list[Any] = [{"role": "user", "content": "hello"}]
    names = set()
    for stream in (False, True, False):
        wanted: dict[str, Any] = {"model": "m", "messages": talk, "max_tokens": 9}
        fresh = client.chat.completions.create(**wanted, n=2).choices[0].message.content
        if stream:
            pieces = client.chat.completions.create(**wanted, stream=True)
            said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        else:
            said = client.chat.completions.create(**wanted).choices[0].message.content or ""
        assert said == fresh
        found = sessions(http)
        names |= set(found)
        assert len(found) == 1
        talk += [{"role": "assistant", "content": said}, {"role": "user", "content": "and then?"}]
    assert len(names) == 1  # the same one in all turns

    for number in range(2 * MOST):
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": str(number)}], max_tokens=2
        )
        http.node.wait_for(lambda: len(sessions(http)) <= MOST, what="an end of old sessions")
    assert not names & set(sessions(http))


def test_a_client_that_hangs_up_leaves_no_session(http: HttpNode) -> None:
    before = set(sessions(http))
    with http.plain() as plain:
        body = {"model": "m", "messages": [{"role": "user", "content": "gone"}], "stream": True}
        with plain.stream("POST", "/v1/chat/completions", json=body) as response:
            pieces = response.iter_bytes()  # kept: when it goes, so does the connection
            next(pieces)
            (new,) = set(sessions(http)) - before
    http.node.wait_for(lambda: new not in sessions(http), what="an end of the session")
    assert set(sessions(http)) <= before
