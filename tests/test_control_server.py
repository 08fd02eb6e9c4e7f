"""The control server on a real socket: who may have it, concurrency, cancelling, clients that misbehave."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from echo_service import FLOOD_WORDS, LONG, EchoDaemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgnd.control import api, connection, jsonrpc, server
from dgnd.control.client import ControlClient, GenerateStream
from dgnd.control.listener import control_socket
from dgnd.control.lock import LockFile
from dgnd.control.service import SERVICE_METHODS, ControlService
from dgnd.errors import (
    AlreadyRunning,
    BadRequest,
    BlocksMissing,
    Cancelled,
    ConfigError,
    InternalError,
    NoDaemon,
    ShuttingDown,
)

SLOW = api.GenerateParams(prompt="slow")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[EchoDaemon]:
    with EchoDaemon(tmp_path / "s.sock") as running:
        yield running


@pytest.fixture
def client(daemon: EchoDaemon) -> Iterator[ControlClient]:
    with ControlClient(daemon.path) as connected:
        yield connected


class Raw:
    """A client that can send what no client should."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()

    def ask(self, line: bytes) -> dict[str, Any]:
        self.sock.sendall(line + b"\n")
        return self.answer()

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.readline())
        return found


def until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def to_the_end(stream: GenerateStream) -> api.GenerateResult:
    while not isinstance(last := stream.wait()[-1], api.GenerateResult):
        pass
    return last


# --- who has the socket ---


def test_the_socket_is_for_owner_and_group_and_goes_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with EchoDaemon(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["s.sock", "s.sock.lock"]
    assert not path.exists()


def test_nobody_sees_the_socket_before_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.sock"
    seen = []
    listen = socket.socket.listen

    def watched(self: socket.socket, backlog: int) -> None:
        seen.append(path.exists())
        listen(self, backlog)
        assert stat.S_IMODE((tmp_path / ".s.sock.new").stat().st_mode) == 0o660

    monkeypatch.setattr(socket.socket, "listen", watched)
    with control_socket(path):
        assert seen == [False]
        assert path.exists()


def test_a_second_daemon_is_told_the_pid_of_the_first(daemon: EchoDaemon) -> None:
    with pytest.raises(AlreadyRunning) as caught, control_socket(daemon.path):
        pass
    assert caught.value.data["pid"] == os.getpid()
    assert f"pid {os.getpid()}" in caught.value.message
    with ControlClient(daemon.path) as client:
        assert client.call("status").name == "desk"


def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    program = Path(__file__).with_name("echo_service.py")
    for _ in range(3):
        with subprocess.Popen([sys.executable, program, path]) as first:
            until(lambda: _answers(path, first.pid), 30)
            os.kill(first.pid, signal.SIGKILL)
        assert path.exists()
        with EchoDaemon(path), ControlClient(path) as client:
            assert client.call("status").name == "desk"
        path.unlink(missing_ok=True)


def _answers(path: Path, pid: int) -> bool:
    try:
        with ControlClient(path) as client:
            client.call("status")
    except NoDaemon:
        return False
    return path.with_name("s.sock.lock").read_text() == f"{pid}\n"


def test_something_else_at_the_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match=r"s\.sock: there is something else"), control_socket(path):
        pass
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["x" * 120, "no/such/directory"])
def test_a_path_that_cannot_be_used_is_a_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="can't create"), control_socket(tmp_path / name):
        pass


def test_a_socket_that_another_took_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with control_socket(path):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_a_lock_file_with_anything_in_it_does_not_name_a_wrong_pid(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for content in (b"", b"rubbish", b"4194304999\n", b"0"):
        held = LockFile.acquire(path, "x")
        path.write_bytes(content)
        with pytest.raises(AlreadyRunning) as caught:
            LockFile.acquire(path, "x")
        assert "pid" not in caught.value.data
        held.release()
        held.release()
    LockFile.acquire(path, "x").release()


# --- the methods ---


def test_every_method_is_served() -> None:
    assert set(SERVICE_METHODS) | {"cancel", "session.tie"} == set(api.METHODS)
    members = {name for name, _ in inspect.getmembers(ControlService, inspect.iscoroutinefunction)}
    assert set(SERVICE_METHODS.values()) == {name for name in members if not name.startswith("_")}
    for method, name in SERVICE_METHODS.items():
        arguments = list(inspect.signature(getattr(ControlService, name)).parameters)[1:]
        expected = [] if api.METHODS[method][0] is api.NoParams else ["params"]
        assert arguments[:1] == expected


CALLS: dict[str, api.Params] = {
    "status": api.NoParams(),
    "models.list": api.NoParams(),
    "backends.list": api.NoParams(),
    "map.show": api.NoParams(),
    "peers.list": api.NoParams(),
    "peers.connect": api.ConnectParams(addr="/ip4/10.0.0.2/tcp/1/p2p/x"),
    "peers.disconnect": api.PeerParams(peer="attic"),
    "generate": api.GenerateParams(prompt="a", session="s"),
    "cancel": api.CancelParams(request_id="none"),
    "tokenize": api.TokenizeParams(text="ab"),
    "session.tie": api.SessionTieParams(session="s"),
    "session.import": api.SessionImportParams(session="s", token_ids=[5]),
    "session.export": api.SessionParams(session="s"),
    "cache.list": api.NoParams(),
    "cache.clear": api.CacheClearParams(session="s"),
    "logs": api.LogsParams(generation="g"),
    "drain": api.DrainParams(undo=True),
    "pause": api.PauseParams(seconds=60),
    "resume": api.NoParams(),
    "reload": api.NoParams(),
    "shutdown": api.NoParams(),
}


def test_every_method_can_be_called(client: ControlClient) -> None:
    assert set(CALLS) == set(api.METHODS)
    for method, params in CALLS.items():
        result = client.call(method, params)
        kind = api.METHODS[method][1]
        assert isinstance(result, list if str(kind).startswith("list") else kind)  # type: ignore[arg-type]


def test_pieces_come_before_the_result_and_make_it_up(client: ControlClient) -> None:
    pieces: list[api.GenerateDelta] = []
    result = client.generate(api.GenerateParams(prompt="one two three"), pieces.append)
    assert "".join(piece.text for piece in pieces) == result.text == "one two three "
    assert [token for piece in pieces for token in piece.token_ids] == result.token_ids


def test_requests_of_one_connection_run_at_once(client: ControlClient) -> None:
    stream = client.start_generate(SLOW)
    stream.wait()
    assert client.call("status").name == "desk"  # answered before the generation's 10 s are over
    stream.cancel()


def test_two_generations_of_one_connection_do_not_mix(daemon: EchoDaemon) -> None:
    with Raw(daemon.path) as raw:
        for identity, prompt in (("a", "slow"), ("b", "x y")):
            params = json.dumps({"prompt": prompt}).encode()
            raw.sock.sendall(b'{"jsonrpc":"2.0","id":"%s","method":"generate","params":%s}\n' %
                             (identity.encode(), params))  # fmt: skip
        seen: dict[str, str] = {"a": "", "b": ""}
        while True:
            message = raw.answer()
            if message.get("id") == "b":
                break
            seen[message["params"]["request_id"]] += message["params"]["text"]
    assert seen["b"] == message["result"]["text"] == "x y "
    assert "x" not in seen["a"]


# --- errors ---


def test_a_fault_in_a_request_is_an_internal_error_and_the_daemon_lives(
    client: ControlClient, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InternalError) as caught:
        client.generate(api.GenerateParams(prompt="crash"), print)
    assert "secret" not in caught.value.message
    assert "secret detail" in caplog.text
    assert client.call("status").name == "desk"


def test_an_error_out_of_a_nursery_keeps_its_kind(client: ControlClient) -> None:
    with pytest.raises(BlocksMissing) as caught:
        client.generate(api.GenerateParams(prompt="group"), print)
    assert caught.value.data == {"missing": "4-7"}


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"prompt": "x", "temperature": -1.0}, "temperature"),
        ({"prompt": "x", "top_p": 1.5}, "top_p"),
        ({"prompt": "x", "top_k": -1}, "top_k"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "min_p": 2}, "min_p"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**64}, "seed"),
        ({"prompt": "x", "wait": -1}, "wait"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "stop_ids": [[]]}, "stop_ids"),
        ({"prompt": "x", "temperature": "hot"}, "$.temperature"),
        ({"prompt": "x", "temprature": 1}, "temprature"),
        ({"prompt": "x", "token_ids": [1]}, "exactly one"),
        ({}, "exactly one"),
    ],
)
def test_bad_parameters_of_generate_are_named(daemon: EchoDaemon, params: dict[str, Any], named: str) -> None:
    with Raw(daemon.path) as raw:
        line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "generate", "params": params})
        error = raw.ask(line.encode())["error"]
    assert error["code"] == BadRequest.code
    assert named in error["message"]
    assert not daemon.service.seen


def test_what_is_no_request_is_answered_with_the_right_code(daemon: EchoDaemon) -> None:
    with Raw(daemon.path) as raw:
        assert raw.ask(b"nonsense")["error"]["code"] == -32700
        assert raw.ask(b"[]")["error"]["code"] == -32600
        assert raw.ask(b'{"jsonrpc":"2.0","id":1,"method":"nope"}')["error"]["code"] == -32601
        assert (
            raw.ask(b'{"jsonrpc":"2.0","id":1,"method":"status","params":{"a":1}}')["error"]["code"] == -32602
        )
        assert raw.ask(b'{"jsonrpc":"2.0","id":1,"result":{}}')["error"]["code"] == -32600
        assert raw.ask(b"x" * (jsonrpc.MAX_REQUEST_BYTES + 1))["error"]["code"] == -32600
        raw.sock.sendall(b'{"jsonrpc":"2.0","method":"status"}\n{"jsonrpc":"2.0","method":"cancel"}\n\n \n')
        assert raw.ask(b'{"jsonrpc":"2.0","id":"after","method":"status"}\r')["id"] == "after"


def test_an_id_in_use_is_refused(daemon: EchoDaemon) -> None:
    line = b'{"jsonrpc":"2.0","id":1,"method":"generate","params":{"prompt":"slow"}}'
    with Raw(daemon.path) as raw:
        raw.ask(line)
        raw.sock.sendall(line + b"\n")
        while "error" not in (answer := raw.answer()):
            pass
        assert answer["error"]["code"] == -32600
        assert "in use" in answer["error"]["message"]


# --- cancelling and hanging up ---


def test_cancel_returns_what_came(daemon: EchoDaemon, client: ControlClient) -> None:
    stream = client.start_generate(SLOW)
    stream.wait()
    stream.cancel()
    last = to_the_end(stream)
    assert last.finish_reason == "cancelled"
    assert 0 < len(last.token_ids) <= 3
    assert daemon.service.cancelled == [len(last.token_ids)]


def test_cancel_as_a_request_answers_whether_there_was_one(client: ControlClient) -> None:
    stream = client.start_generate(SLOW)
    stream.wait()
    assert client.call("cancel", api.CancelParams(request_id=1)).ok
    assert not client.call("cancel", api.CancelParams(request_id=99)).ok
    assert not client.call("cancel", api.CancelParams(request_id="1")).ok


def test_other_requests_are_cancelled_at_once(daemon: EchoDaemon, client: ControlClient) -> None:
    client.send("peers.connect", api.ConnectParams(addr="/ip4/10.0.0.98/tcp/1"))
    client.notify("cancel", api.CancelParams(request_id=1))
    answer = client.receive()
    assert isinstance(answer, jsonrpc.ErrorResponse)
    assert isinstance(jsonrpc.error_of(answer.error), Cancelled)
    assert daemon.service.cut == ["peers.connect"]


def test_hanging_up_cancels_within_a_token(daemon: EchoDaemon) -> None:
    with ControlClient(daemon.path) as client:
        client.start_generate(SLOW).wait()
    until(lambda: daemon.service.cancelled)
    assert daemon.service.cancelled[0] <= 3


def test_a_client_that_only_stopped_sending_gets_its_answers(daemon: EchoDaemon) -> None:
    with Raw(daemon.path) as raw:
        raw.sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"status"}\n')
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.answer()["result"]["name"] == "desk"
        assert raw.file.readline() == b""


HALF = b'{"jsonrpc":"2.0","id":1,"method":"generate","params":{"prompt":"slow","session":"s"}}\n'


def test_a_client_that_only_stopped_sending_gets_its_whole_answer(daemon: EchoDaemon) -> None:
    with Raw(daemon.path) as raw:
        raw.sock.sendall(HALF)
        raw.sock.shutdown(socket.SHUT_WR)
        while "result" not in (last := raw.answer()):
            pass
        assert last["result"]["finish_reason"] == "stop"
        assert len(last["result"]["token_ids"]) == LONG
        assert raw.file.readline() == b""
    assert daemon.service.cancelled == []


def test_a_client_that_stopped_sending_and_is_then_gone_is_noticed(daemon: EchoDaemon) -> None:
    with Raw(daemon.path) as raw:
        raw.sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"generate","params":{"prompt":"silent"}}\n')
        raw.sock.shutdown(socket.SHUT_WR)
        until(lambda: daemon.service.seen)
    until(lambda: daemon.service.cancelled)


def test_a_tied_session_ends_with_the_connection_that_tied_it_last(daemon: EchoDaemon) -> None:
    mine, kept = (api.SessionTieParams(session=name) for name in ("mine", "kept"))
    with ControlClient(daemon.path) as after:
        with ControlClient(daemon.path) as client:
            for params in (mine, kept, api.SessionTieParams(session="never")):
                assert client.call("session.tie", params).ok
            client.call("session.import", api.SessionImportParams(session="mine", token_ids=[1]))
            client.call("session.import", api.SessionImportParams(session="kept", token_ids=[2]))
            after.call("session.tie", kept)
        until(lambda: "mine" not in daemon.service.sessions)
        assert list(daemon.service.sessions) == ["kept"]
        with pytest.raises(BadRequest, match="session"):
            after.call("session.tie", api.SessionTieParams(session=""))
    until(lambda: not daemon.service.sessions)


def test_the_client_is_told_when_the_daemon_ends(tmp_path: Path) -> None:
    with EchoDaemon(tmp_path / "s.sock") as daemon, ControlClient(daemon.path) as client:
        stream = client.start_generate(SLOW)
        stream.wait()
        with ControlClient(daemon.path) as other:
            assert other.call("shutdown").ok
        with pytest.raises(ShuttingDown):
            to_the_end(stream)
    assert not daemon.path.exists()


def test_a_service_that_ignores_cancel_is_cut_off(
    daemon: EchoDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CANCEL_GRACE_S", 0.1)

    async def deaf(*_: object) -> api.GenerateResult:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(daemon.service, "generate", deaf)
    with ControlClient(daemon.path) as client:
        stream = client.start_generate(SLOW)
        stream.cancel()
        with pytest.raises(Cancelled):
            stream.wait()


# --- clients that misbehave ---


FLOOD = b'{"jsonrpc":"2.0","id":1,"method":"generate","params":{"prompt":"flood"}}\n'
#: What the kernel holds for a client, at most.
KERNEL_BYTES = 2**20


def stalled(daemon: EchoDaemon) -> int:
    """How many words came before the answer paused."""

    def pauses() -> bool:
        before = daemon.service.words
        time.sleep(0.3)
        return 0 < before == daemon.service.words

    until(pauses, 30)
    return daemon.service.words


def test_an_answer_waits_for_a_client_that_does_not_read_and_hurts_nobody(daemon: EchoDaemon) -> None:
    with Raw(daemon.path) as deaf, ControlClient(daemon.path) as other:
        deaf.sock.sendall(FLOOD)
        assert stalled(daemon) * 1024 < connection.ANSWER_WAITS_BYTES + KERNEL_BYTES
        assert other.call("status").name == "desk"
        came = 0
        while "result" not in (message := deaf.answer()):
            came += len(message["params"]["token_ids"])
        assert came == len(message["result"]["token_ids"]) == FLOOD_WORDS
    assert daemon.service.cancelled == []


def test_a_cancel_reaches_an_answer_that_waits_for_its_client(daemon: EchoDaemon) -> None:
    with Raw(daemon.path) as deaf:
        deaf.sock.sendall(FLOOD)
        words = stalled(daemon)
        deaf.sock.sendall(b'{"jsonrpc":"2.0","method":"cancel","params":{"request_id":1}}\n')
        while "result" not in (message := deaf.answer()):
            pass
        assert message["result"]["finish_reason"] == "cancelled"
        assert len(message["result"]["token_ids"]) < words + 2000


def test_a_client_that_hangs_up_while_its_answer_waits_ends_it(daemon: EchoDaemon) -> None:
    with Raw(daemon.path) as deaf:
        deaf.sock.sendall(FLOOD)
        stalled(daemon)
    until(lambda: daemon.service.cancelled)


def test_requests_wait_for_a_client_that_reads_no_answers(daemon: EchoDaemon) -> None:
    line = b'{"jsonrpc":"2.0","id":1,"method":"nope"}\n'
    with Raw(daemon.path) as deaf:
        deaf.sock.settimeout(1)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 100 * KERNEL_BYTES:
                sent += deaf.sock.send(line * 1000)
        assert sent < 10 * KERNEL_BYTES
        deaf.sock.settimeout(20)
        whole = sent // len(line)
        for _ in range(whole):
            assert deaf.answer()["error"]["code"] == -32601


def test_a_client_that_reads_slowly_gets_everything(daemon: EchoDaemon) -> None:
    with ControlClient(daemon.path) as client:
        count = 0

        def slowly(delta: api.GenerateDelta) -> None:
            nonlocal count
            count += 1
            if count % 100 == 0:
                time.sleep(0.01)

        result = client.generate(api.GenerateParams(prompt="w " * 3000), slowly)
    assert count == len(result.token_ids) == 3000


def test_requests_at_once_are_limited(daemon: EchoDaemon) -> None:
    line = b'{"jsonrpc":"2.0","id":%d,"method":"peers.connect","params":{"addr":"/ip4/10.0.0.98"}}\n'
    with Raw(daemon.path) as raw:
        for identity in range(connection.MAX_REQUESTS + 1):
            raw.sock.sendall(line % identity)
        answer = raw.answer()
        assert answer["id"] == connection.MAX_REQUESTS
        assert answer["error"]["data"]["kind"] == "no_room_now"
    until(lambda: len(daemon.service.cut) == connection.MAX_REQUESTS)


def test_connections_are_limited_and_the_place_of_one_that_left_is_free(daemon: EchoDaemon) -> None:
    clients = [Raw(daemon.path) for _ in range(server.MAX_CONNECTIONS)]
    try:
        for client in clients:
            assert "result" in client.ask(b'{"jsonrpc":"2.0","id":1,"method":"status"}')
        with Raw(daemon.path) as late:
            assert late.answer()["error"]["data"]["kind"] == "no_room_now"
            assert late.file.readline() == b""
        clients.pop().__exit__()
        until(lambda: _served(daemon.path))
    finally:
        for client in clients:
            client.__exit__()


def _served(path: Path) -> bool:
    with Raw(path) as raw:
        return "result" in raw.ask(b'{"jsonrpc":"2.0","id":1,"method":"status"}')


def test_ten_thousand_random_strings_leave_the_daemon_answering(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    program = Path(__file__).with_name("echo_service.py")
    chance = random.Random(7)
    with subprocess.Popen([sys.executable, program, path], stderr=subprocess.DEVNULL) as running:
        until(lambda: _answers(path, running.pid), 30)
        before = psutil.Process(running.pid).memory_info().rss
        for number in range(1000):
            with Raw(path) as raw:
                try:
                    for _ in range(10):
                        raw.sock.sendall(
                            chance.randbytes(chance.randrange(2000)) + chance.choice([b"", b"\n"])
                        )
                    if number % 10 == 0:
                        raw.sock.shutdown(socket.SHUT_WR)
                        while raw.sock.recv(65536):
                            pass
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it may hang up on us, as long as it lives
        with ControlClient(path) as client:
            assert client.call("status").name == "desk"
        assert psutil.Process(running.pid).memory_info().rss - before < 50e6
        running.terminate()


@given(st.lists(st.binary(max_size=200), max_size=20))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_after_any_bytes_the_same_connection_still_answers(daemon: EchoDaemon, chunks: list[bytes]) -> None:
    with Raw(daemon.path) as raw:
        for chunk in chunks:
            raw.sock.sendall(chunk)
        raw.sock.sendall(b'\n{"jsonrpc":"2.0","id":"end","method":"status"}\n')
        while (answer := raw.answer()).get("id") != "end":
            assert answer["error"]["code"] in (-32700, -32600)
