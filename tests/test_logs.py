"""What is logged, where it is shown, and that an answer can be followed through the nodes and never read."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Row
from user_kit import ANSWER, Dgnctl, scripted_model

from dgnd.control.api import GenerateParams, LogsParams
from dgnd.control.client import ControlClient
from dgnd.errors import BadRequest
from dgnd.logs.flood import MOST, WINDOW_S, Flood
from dgnd.logs.ring import LogRing
from dgnd.logs.setup import _AsJson, _ForJournal


@pytest.fixture
def ring() -> Iterator[LogRing]:
    found = LogRing(lines=4)
    log = logging.getLogger("test-logs")
    log.setLevel(logging.DEBUG)
    log.addHandler(found)
    yield found
    log.removeHandler(found)


def messages(ring: LogRing, **keywords: object) -> list[str]:
    page = ring.page(LogsParams(**keywords))  # type: ignore[arg-type]  # names are checked by LogsParams
    return [line.message for line in page.lines]


def test_the_ring_keeps_the_last_lines_and_says_what_is_lost(ring: LogRing) -> None:
    log = logging.getLogger("test-logs")
    for number in range(1, 7):
        log.info("line %d", number, extra={"generation": "g" if number % 2 else "h"})
    log.warning("bad\nline")
    assert messages(ring) == ["line 4", "line 5", "line 6", "bad line"]
    assert messages(ring, most=2) == ["line 6", "bad line"]
    assert messages(ring, level="warning") == ["bad line"]
    assert messages(ring, generation="g") == ["line 5"]
    page = ring.page(LogsParams(after=1, most=2))
    assert ([line.number for line in page.lines], page.after, page.lost) == ([4, 5], 5, 2)
    page = ring.page(LogsParams(after=5))
    assert ([line.number for line in page.lines], page.after, page.lost) == ([6, 7], 7, 0)
    assert messages(ring, after=7) == []
    for wrong in (LogsParams(level="loud"), LogsParams(after=-1), LogsParams(most=10_000)):
        with pytest.raises(BadRequest):
            ring.page(wrong)


def test_the_journal_gets_priorities() -> None:
    form = _ForJournal("%(name)s: %(message)s")
    for level, expected in ((10, "<7>"), (20, "<6>"), (30, "<4>"), (40, "<3>")):
        record = logging.LogRecord("dgnd", level, "", 0, "x", None, None)
        assert form.format(record) == f"{expected}dgnd: x"


def test_a_flood_becomes_a_few_lines_and_a_count() -> None:
    now = 0.0
    flood = Flood(lambda: now)

    def said(text: str, line: int) -> logging.LogRecord:
        return logging.LogRecord("dgnd", 30, "peer.py", line, "%s is wrong", (text,), None)

    assert [flood.filter(said(str(number), 7)) for number in range(MOST + 30)].count(True) == MOST
    assert flood.filter(said("other", 8))  # what another place says is another kind
    now = WINDOW_S
    record = said("again", 7)
    assert flood.filter(record)
    assert record.getMessage() == "again is wrong (and 30 lines like this were left out before)"
    record = said("again", 7)
    assert flood.filter(record)
    assert record.getMessage() == "again is wrong"


def test_what_is_below_the_level_is_not_said() -> None:
    code = """
import logging
from dgnd.logs.setup import log_to_stderr
log_to_stderr(logging.%s, "json")
logging.getLogger("dgnd.x").debug("one")
logging.getLogger("a_library").debug("two")
logging.getLogger("dgnd").warning("three")
"""
    for level, expected in (("DEBUG", ["one", "three"]), ("INFO", ["three"]), ("ERROR", [])):
        done = subprocess.run(
            [sys.executable, "-c", code % level], capture_output=True, text=True, check=True
        )
        assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == expected


def test_json_has_the_id_of_the_answer() -> None:
    record = logging.LogRecord("dgnd", 30, "", 0, 'a "quoted" %s', ("word",), None)
    record.generation = "g1"
    found = json.loads(_AsJson().format(record))
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "warning",
        "logger": "dgnd",
        "message": 'a "quoted" word',
        "generation": "g1",
    }


def test_each_answer_of_a_session_is_followed_by_an_id_of_its_own(
    two: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = Dgnctl(two.nodes["a"], capfd), Dgnctl(two.nodes["b"], capfd)
    turn = GenerateParams(prompt="x", session="lives-on", max_tokens=2, temperature=0.0)
    with ControlClient(two.nodes["a"].socket) as client:
        ids = [client.generate(turn, lambda _: None).generation for _ in range(3)]
    assert len({*ids, "lives-on"}) == 4
    for ctl in (a, b):
        said = []
        for generation in ids:
            lines = following(ctl, generation, 1)
            assert all(line["message"].startswith(f"generation {generation}") for line in lines)
            said.append("; ".join(line["message"] for line in lines))
        # The hops of the first answer stay for the others.
        assert ["opened" in each for each in said] == [True, False, False]
        assert ["goes on at" in each for each in said] == [False, True, True]


def following(ctl: Dgnctl, generation: str, least: int) -> list[dict[str, str]]:
    """The lines about an answer that a node logs, which may come a little later than the answer."""
    deadline = time.monotonic() + 30
    while True:
        _, shown, _ = ctl("logs", "--generation", generation, "--json")
        lines = [json.loads(line) for line in shown.splitlines()]
        if len(lines) >= least or time.monotonic() > deadline:
            return lines


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path = scripted_model(tmp_path_factory.mktemp("models") / "m")
    with Cluster(tmp_path_factory.mktemp("nodes"), path) as cluster:
        log = '[log]\nlevel = "debug"\nformat = "json"'
        cluster.full_mesh([Row("a", "embed,0-1,head"), Row("b", "2-3")], more=log)
        yield cluster


def test_an_answer_is_followed_through_both_nodes_and_never_read(
    two: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = two.nodes["a"], two.nodes["b"]
    ctl = Dgnctl(a, capfd)
    result = ctl.json("run", "--temperature", "0", "xyzzy-secret")
    assert result["text"] == ANSWER
    generation = result["generation"]
    _, shown, _ = ctl("logs", "--generation", generation)
    assert "begun with m" in shown
    assert f"ended: stop, {len(result['token_ids'])} tokens" in shown
    other, shown = Dgnctl(b, capfd), ""
    deadline = time.monotonic() + 30
    while "closed" not in shown and time.monotonic() < deadline:
        _, shown, _ = other("logs", "--generation", generation, "--json")
    lines = [json.loads(line) for line in shown.splitlines()]
    assert all(line["generation"] == generation for line in lines)
    assert ["opened" in line["message"] for line in lines] == [True, False]
    for node in (a, b):
        logged = [json.loads(line) for line in node.log.splitlines()]
        assert any(line.get("generation") == generation for line in logged)
        for secret in ("xyzzy", ANSWER[:8]):
            assert secret not in node.log


def test_following_shows_what_comes(two: Cluster, tmp_path: Path) -> None:
    a = two.nodes["a"]
    command = [sys.executable, "-m", "dgnctl", "--socket", str(a.socket), "logs", "-f", "-n", "0"]
    out = tmp_path / "out"
    with out.open("wb") as file, subprocess.Popen(command, stdout=file) as follower:
        deadline = time.monotonic() + 60
        while "ended: " not in out.read_text() and time.monotonic() < deadline:
            a.run("A", "--max-tokens", "1")
        follower.terminate()
    assert "ended: " in out.read_text()
