"""What is logged, where it is shown, and that an answer can be followed through the nodes and never read."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cluster import Cluster, Row
from echo_service import EchoDaemon
from user_kit import ANSWER, Dgnctl, scripted_model

from dgnd.control.api import GenerateParams, LogsParams
from dgnd.control.client import ControlClient
from dgnd.errors import BadRequest
from dgnd.logs.flood import MOST, WINDOW_S, Flood
from dgnd.logs.journald import ForJournal
from dgnd.logs.ring import LogRing
from dgnd.logs.setup import _AsJson


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
    form = ForJournal()
    for level, expected in ((10, "<7>"), (20, "<6>"), (30, "<4>"), (40, "<3>")):
        record = logging.LogRecord("dgnd", level, "", 0, "x", None, None)
        assert form.format(record) == f"{expected}dgnd: x"


#: A child whose stderr is taken for the journal's, and the journal is at the first argument.
SERVICE = """
import logging, os, sys
from dgnd.logs import journald
journald.JournalHandler.__init__.__defaults__ = (sys.argv[1],)
found = os.fstat(2)
os.environ["JOURNAL_STREAM"] = sys.argv[2].format(found.st_dev, found.st_ino)
from dgnd.logs.fields import about
from dgnd.logs.setup import log_to_stderr
log_to_stderr(logging.DEBUG, sys.argv[3])
log = logging.getLogger("dgnd.x")
log.warning("one\\nline", extra=about("g1", "my session\\nDGN_PEER=mallory", "12D3"))
try:
    raise ValueError("wrong")
except ValueError:
    log.exception("fails")
log.info("x" * 1_000_000)
"""


def as_service(journal: Path, stream: str = "{}:{}", form: str = "auto") -> str:
    """What it writes to stderr."""
    command = [sys.executable, "-c", SERVICE, str(journal), stream, form]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_the_journal_gets_fields(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "socket"))
        journal.settimeout(30)
        assert as_service(tmp_path / "socket") == ""
        entries = [received(journal) for _ in range(3)]
        assert "WARNING dgnd.x: one line" in as_service(tmp_path / "socket", "1:2")  # it was redirected
        assert '"generation":"g1"' in as_service(tmp_path / "socket", form="json")
        journal.setblocking(False)
        with pytest.raises(BlockingIOError):  # neither was for the journal
            journal.recv(1)
    line, failure, large = entries
    assert line == {
        "MESSAGE": "dgnd.x: one line",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "dgnd",
        "DGN_LOGGER": "dgnd.x",
        "DGN_GENERATION": "g1",
        "DGN_SESSION": "my session\nDGN_PEER=mallory",
        "DGN_PEER": "12D3",
    }
    assert failure["PRIORITY"] == "3"
    assert failure["MESSAGE"].startswith("dgnd.x: fails\nTraceback ")
    assert failure["MESSAGE"].endswith("ValueError: wrong")
    assert "DGN_GENERATION" not in failure
    assert len(large["MESSAGE"]) > 1_000_000


def test_a_journal_that_is_gone_or_does_not_read_loses_no_line(tmp_path: Path) -> None:
    shown = as_service(tmp_path / "nobody").splitlines()
    assert shown[0] == "<4>dgnd.x: one line"
    assert {line[:3] for line in shown} == {"<4>", "<3>", "<6>"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, suppress(BlockingIOError):
            filler.setblocking(False)
            while True:
                filler.sendto(b"x", str(tmp_path / "deaf"))
        assert as_service(tmp_path / "deaf").splitlines() == shown


def received(journal: socket.socket) -> dict[str, str]:
    """The next entry's fields, by the protocol's description: https://systemd.io/JOURNAL_NATIVE_PROTOCOL"""
    data, files, _, _ = socket.recv_fds(journal, 1 << 20, 1)
    if files:
        assert data == b""
        with os.fdopen(files[0], "rb") as file:
            all_seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            assert fcntl.fcntl(file, fcntl.F_GET_SEALS) == all_seals
            file.seek(0)
            data = file.read()
    fields = {}
    while data:
        head, _, data = data.partition(b"\n")
        name, simple, value = head.partition(b"=")
        if not simple:
            length = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + length], data[8 + length :]
            assert data[:1] == b"\n"
            data = data[1:]
        fields[name.decode()] = value.decode()
    return fields


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


def test_following_goes_on_with_the_next_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    command = [sys.executable, "-u", "-m", "dgnctl", "--socket", str(path), "logs"]
    with EchoDaemon(path):
        follower = subprocess.Popen(
            [*command, "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert "something" in follower.stdout.readline()
    with follower:
        try:
            while "its next start is waited for" not in (said := follower.stderr.readline()):
                assert said
            with EchoDaemon(path):
                while "something" not in (said := follower.stdout.readline()):
                    assert said
        finally:
            follower.kill()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "no dgnd is running" in done.stderr) == (3, True)


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
