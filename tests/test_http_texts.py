"""`/v1/completions` with the official client: bare text, whose tokens and answers are known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from http_kit import HttpNode, http_node
from slow_backend import NAME as SLOW
from slow_backend import slow_site
from user_kit import byte_ids, readable_model, scripted_model


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpNode]:
    directory = tmp_path_factory.mktemp("texts")
    model = scripted_model(directory / "scripted")
    models = {"scripted": {"path": str(model), "backend": "reference"}}
    with http_node(directory / "nodes", models, {"scripted": "embed,0-3,head"}) as node:
        yield node


@pytest.fixture(scope="module")
def client(http: HttpNode) -> Iterator[openai.OpenAI]:
    with http.openai() as client:
        yield client


def test_text_is_continued(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt="abc", max_tokens=5)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("defgh", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 5)  # BOS counts
    assert client.completions.create(model="scripted", prompt="abc").choices[0].text == "defghijklmnopqrs"
    ended = client.completions.create(model="scripted", prompt="x", max_tokens=99, stop="z")
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("y", "stop")


def test_characters_of_several_tokens_come_whole(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="scripted", prompt="A", max_tokens=20, stream=True)
    texts = [chunk.choices[0].text for chunk in stream]
    assert [text for text in texts if text] == ["😀", "日", "B"]


def test_several_prompts_in_every_notation(client: openai.OpenAI) -> None:
    def ask(prompt: Any, **more: Any) -> list[str]:
        answer = client.completions.create(model="scripted", prompt=prompt, max_tokens=2, **more)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    assert ask(["a", "k"]) == ["bc", "lm"]
    assert ask(byte_ids("ab")) == ["cd"]
    assert ask([byte_ids("a"), byte_ids("k")], n=2) == ["bc", "bc", "lm", "lm"]
    assert ask(["a", "k"], echo=True) == ["abc", "klm"]


def test_a_stream_of_several_prompts_with_counts(client: openai.OpenAI) -> None:
    texts, usage = ["", ""], None
    options: Any = {"stream_options": {"include_usage": True}}
    for chunk in client.completions.create(
        model="scripted", prompt=["a", "kl"], max_tokens=3, stream=True, echo=True, **options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["abcd", "klmno"]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (2 + 3, 6)


def test_probabilities_with_the_places_of_tokens(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        (choice,) = client.completions.create(
            model="scripted", prompt="abc", max_tokens=3, logprobs=2, **more
        ).choices
        return choice.logprobs

    told = ask()
    assert (told.tokens, told.text_offset) == (["d", "e", "f"], [0, 1, 2])
    assert [max(each, key=each.get) for each in told.top_logprobs] == told.tokens
    best = [each[token] for each, token in zip(told.top_logprobs, told.tokens, strict=True)]
    assert best == told.token_logprobs
    assert ask(echo=True).text_offset == [3, 4, 5]
    pieces = client.completions.create(model="scripted", prompt="abc", max_tokens=3, logprobs=0, stream=True)
    offsets = [chunk.choices[0].logprobs.text_offset for chunk in pieces if chunk.choices[0].logprobs]
    assert offsets == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1], "echo": True}, "echo"),
        ({"prompt": ["a"] * 60, "n": 16}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, wrong: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "scripted", "prompt": "a", **wrong})
    body: Any = caught.value.body
    assert body["param"] == param


def test_a_token_id_that_is_not_of_the_vocabulary_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="token id 99999 is not in the vocabulary"):
        client.completions.create(model="scripted", prompt=[99999])


def test_an_answer_whose_client_hung_up_goes_on_for_a_step_at_most(tmp_path: Path) -> None:
    step_s = 0.25
    model = readable_model(tmp_path / "m", max_positions=4096)
    site = slow_site(tmp_path / "site", step_s)
    models = {"slow": {"path": str(model), "backend": SLOW}}
    with (
        http_node(tmp_path / "nodes", models, {"slow": "embed,0-3,head"}, env=site) as http,
        http.plain() as plain,
    ):
        asked = {"model": "slow", "prompt": "a", "stream": True, "max_tokens": 4000}
        with plain.stream("POST", "/v1/completions", json=asked) as response:
            events = response.iter_lines()
            for _ in range(6):
                next(events)
            (entry,) = _cache(http)
            at_hang_up = entry.positions
        positions = at_hang_up

        def gone() -> bool:
            nonlocal positions
            found = _cache(http)
            positions = max([positions, *(entry.positions for entry in found)])
            return not found

        http.node.wait_for(gone, what="an end of the session")
        # What the hops had begun when the news came, and what was begun while it came.
        assert positions - at_hang_up <= 2
        assert http.sessions() == 0


def _cache(http: HttpNode) -> list[Any]:
    from dgnd.control.client import ControlClient

    with ControlClient(http.node.socket) as client:
        found: list[Any] = client.call("cache.list")
    return found


def test_keys_are_asked_for_and_can_be_taken_back(tmp_path: Path) -> None:
    old, new = "k" * 32, "n" * 32
    keys = tmp_path / "keys"
    keys.write_text(f"# of the team\n{old}\n")
    keys.chmod(0o640)
    models = {"scripted": {"path": str(scripted_model(tmp_path / "m")), "backend": "reference"}}
    more = f'keys_file = "{keys}"'
    with http_node(tmp_path / "nodes", models, {"scripted": "embed,0-3,head"}, more) as http:

        def ask(key: str) -> str:
            with http.openai(key) as client:
                return client.completions.create(model="scripted", prompt="a", max_tokens=1).choices[0].text

        assert ask(old) == "b"
        for wrong in ("none", new, old[:-1]):
            with pytest.raises(openai.AuthenticationError, match="not known here"):
                ask(wrong)
        with http.plain() as plain:
            refused = plain.post("/v1/completions", json={"model": "scripted", "prompt": "a"})
            assert refused.status_code == 401
            assert "an API key is needed" in refused.json()["error"]["message"]
            assert plain.get("/v1/models").status_code == 401
            assert plain.get("/health").status_code == plain.get("/ready").status_code == 200
        keys.write_text(f"{new}\n")
        assert ask(new) == "b"
        with pytest.raises(openai.AuthenticationError):
            ask(old)
        keys.chmod(0o644)
        with pytest.raises(openai.AuthenticationError):
            ask(new)
        http.node.wait_for(lambda: "chmod 640" in http.node.log, what="a line in the log")
        assert old not in http.node.log


def test_a_file_of_keys_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for content, says in ((None, "can't be read"), ("", "has no API key"), ("short\n", "of less than 16")):
        if content is not None:
            keys.write_text(content)
            keys.chmod(0o600)
        folder = tmp_path / f"nodes{says[:3]}"
        with pytest.raises(AssertionError, match=says), http_node(folder, {}, {}, f'keys_file = "{keys}"'):
            pass


def test_requests_beyond_the_most_are_turned_away(http: HttpNode, tmp_path: Path) -> None:
    models = {"m": {"path": str(readable_model(tmp_path / "m", max_positions=4096)), "backend": "reference"}}
    with http_node(tmp_path / "nodes", models, {"m": "embed,0-3,head"}, "max_requests = 1") as one:
        asked = {"model": "m", "prompt": "a", "stream": True, "max_tokens": 4000}
        with one.plain() as first, one.plain() as second:
            with first.stream("POST", "/v1/completions", json=asked) as response:
                events = response.iter_lines()  # kept: when it goes, so does the connection
                next(events)
                refused = second.post("/v1/completions", json=asked)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
                assert "of 1 at most" in refused.json()["error"]["message"]
                assert second.get("/health").status_code == 200
            one.node.wait_for(lambda: one.sessions() == 0, what="an end of the session")
            asked["stream"], asked["max_tokens"] = False, 1
            assert httpx.post(f"{one.url}/v1/completions", json=asked, timeout=60).status_code == 200
