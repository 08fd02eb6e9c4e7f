"""Every command of `dgnctl chat` at a terminal, in two sizes, with real daemons, answers from two nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from seat import Seat
from user_kit import ANSWER, IM_END, byte_ids, chat_ids, readable_model, scripted_model

from dgnctl.token_file import read_ids

SIZES = [(80, 24), (200, 60)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """a and b share `long`, whose answers never end, and `talk`, which always says the same."""
    folder = tmp_path_factory.mktemp("models")
    paths = {
        "long": readable_model(folder / "long", max_positions=4096),
        "talk": scripted_model(folder / "talk"),
    }
    models = {name: {"path": str(path), "backend": "reference"} for name, path in paths.items()}
    rows = [row for name in paths for row in (Row("a", "embed,0-1", name), Row("b", "2-3,head", name))]
    with Cluster(tmp_path_factory.mktemp("nodes"), None) as cluster:
        cluster.full_mesh(rows, models=models)
        yield cluster


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def seated(node: TestNode, *options: str, columns: int = 80, rows: int = 24) -> Seat:
    return Seat("chat", "--socket", str(node.socket), *options, columns=columns, rows=rows)


def ids_of(seat: Seat, name: str) -> list[int]:
    """The conversation's token ids, by /save."""
    assert "token ids written" in seat.say(f"/save {name}.csv")
    return read_ids(Path(f"{name}.csv"))


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_all_commands(cluster: Cluster, columns: int, rows: int) -> None:
    a, b = cluster.nodes["a"], cluster.nodes["b"]
    with seated(a, "--model", "talk", columns=columns, rows=rows) as seat:
        seat.prompt()
        assert "/regenerate" in seat.say("help")
        assert "no route yet" in seat.say("/route")
        assert "no system message" in seat.say("/system")
        assert ANSWER in seat.say("hello")
        assert ANSWER in seat.say("connect the dots")
        shown = seat.say("/route")
        assert re.search(r"^a +\S+ +\S+ +embed,0-1$", shown, re.MULTILINE)
        assert re.search(r"^b +\S+ +\S+ +2-3,head$", shown, re.MULTILINE)
        seat.shows(r"^talk · a → b · [\d.]+ tok/s · \d+/\d+ tokens \(\d+ %\)$")
        shown = seat.say("/stats")
        assert re.search(r"answer +28 tokens in [\d.]+ s, [\d.]+ tok/s", shown)
        assert "a → b" in shown
        assert "exact" in shown
        assert "b: connected, " in seat.say("peers")
        assert "connected: b offers" in "".join(seat.say(f"connect {b.address}").split("\n"))
        assert "/connect takes" in seat.say("/connect nowhere")
        # settings
        assert "the model's own" in seat.say("/set")
        seat.say("/set temperature 0")
        assert re.search(r"temperature +0$", seat.say("/set"), re.MULTILINE)
        assert "temperature takes a number from 0 to 100" in seat.say("/set temperature hot")
        assert "from 0 to 18,446,744,073,709,551,615" in " ".join(seat.say("/set seed -1").split())
        assert 'end before "klm"' in seat.say("/stop klm")
        assert seat.say("hello").endswith("abcdefghij")
        assert "where the model ends them" in seat.say("/stop")
        # asking again
        shown = seat.say("/regenerate")
        assert ANSWER in shown
        ids = ids_of(seat, "regenerated")
        said = ("user", "hello"), ("assistant", ANSWER), ("user", "connect the dots"), ("assistant", ANSWER)
        assert ids == [*chat_ids(*said, ("user", "hello")), *byte_ids(ANSWER), IM_END]
        seat.keys("/edit\r")
        seat.shows("^> hello$")
        seat.keys(" again\r")
        seat.until(lambda: seat.at_prompt() and "> hello again" in seat.rows(), "answer")
        assert ids_of(seat, "edited") == [
            *chat_ids(*said, ("user", "hello again")),
            *byte_ids(ANSWER),
            IM_END,
        ]
        assert ANSWER in seat.say("/edit in other words")
        assert "counts from the next answer on" in seat.say("/system be brief")
        assert ANSWER in seat.say("and?")
        expected = [
            ("system", "be brief"),
            *said,
            ("user", "in other words"),
            ("assistant", ANSWER),
            ("user", "and?"),
        ]
        assert ids_of(seat, "system") == [*chat_ids(*expected), *byte_ids(ANSWER), IM_END]
        # another model
        assert re.search(r"^\* +talk", seat.say("/model"), re.MULTILINE)
        assert "no model 'nosuch'" in seat.say("/model nosuch")
        seat.say("/set max_tokens 12")
        assert "reads the conversation" in seat.say("/model long")
        seat.say("say")
        assert ids_of(seat, "model")[: len(chat_ids(*expected))] == chat_ids(*expected)
        seat.shows("^long · a → b")
        assert "messages written" in seat.say("/save x.json")
        assert "forgotten" in seat.say("clear")
        assert "nothing was said" in seat.say("/regenerate")
        assert "messages read" in seat.say("/load x.json")
        assert "no command /hlep" in seat.say("/hlep")
        assert [row for row in seat.rows() if len(row) >= columns] == []
        seat.keys("exit\r")
        assert seat.ends() == 0
    saved = json.loads(Path("x.json").read_text())
    assert saved["messages"][0] == {"role": "system", "content": "be brief"}
    assert saved["model"] == "long"
    assert re.fullmatch("[0-9a-f]{32}", saved["fingerprint"])
    assert (saved["sampling"]["temperature"], saved["sampling"]["max_tokens"]) == (0.0, 12)


@pytest.mark.parametrize("name", ["half.json", "half.csv"])
def test_save_clear_load_gives_the_same_next_ids(cluster: Cluster, name: str) -> None:
    """Also of a sampled answer that was stopped, whose ids its text does not tell."""
    with seated(cluster.nodes["a"], "--model", "long", "--temperature", "0.9", "--top-k", "20") as seat:
        seat.prompt()
        seat.keys("tell me\r")
        seat.shows(r"\S{30}")
        seat.keys(" ")
        seat.shows(r"^\(stopped\)$")
        seat.prompt()
        seat.say("/set max_tokens 25")
        seat.say(f"/save {name}")
        first = seat.say("more").split("\n")[1:]
        whole = ids_of(seat, "whole")
        assert "forgotten" in seat.say("clear")
        seat.say("something else")
        assert "goes on from there" in seat.say(f"/load {name}")
        assert seat.say("more").split("\n")[1:] == first
        assert ids_of(seat, "again") == whole


def test_a_file_is_taken_up_by_another_chat(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    options = ("--model", "long", "--max-tokens", "25", "--top-k", "20")
    with seated(a, *options, "--temperature", "0.9", "--seed", "4") as seat:
        seat.prompt()
        seat.say("tell me")
        seat.say("/save x.json")
        seat.say("more")
        whole = ids_of(seat, "whole")
    with seated(a, "--model", "long") as seat:
        seat.prompt()
        seat.say("/load x.json")
        seat.say("more")
        assert ids_of(seat, "again") == whole
    Path("y.json").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    Path("z.json").write_text("nonsense")
    with seated(a, "--model", "talk") as seat:
        seat.prompt()
        assert "messages are read again" in seat.say("/load x.json")  # of another model
        assert "in turns" in seat.say("/load y.json")
        assert "z.json: is no saved conversation" in seat.say("/load z.json")
        assert "can't be read" in seat.say("/load nosuch.json")
        assert "can't be written" in seat.say("/save nosuch/x.json")
        seat.say("/set max_tokens none")
        assert ANSWER in seat.say("hello")
