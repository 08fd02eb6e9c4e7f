"""dgnctl's commands but run and chat: views, JSON, the socket, errors, imports, start time's causes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import click
import msgspec
import pytest
from echo_service import PEER, EchoDaemon

from dgnctl.cli import COMMANDS, LazyGroup, cli, run_command
from dgnctl.multiaddress import is_multiaddress
from dgnctl.output import printable, size
from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.control.socket_path import candidates, client_socket, daemon_socket
from dgnd.errors import ConfigError, DgnError, NoDaemon, SocketDenied, StaleSocket

ADDRESS = f"/ip4/10.0.0.2/tcp/4001/p2p/{PEER}"
READING = [
    ["status"], ["peers"], ["peers", "--refused"], ["map"], ["models"], ["backends"], ["cache", "list"],
    ["version"], ["cache", "clear"], ["connect", ADDRESS], ["disconnect", "attic"], ["run", "hello"],
]  # fmt: skip


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_every_command_for_people_and_as_json(
    daemon: EchoDaemon, capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    daemon.service.sessions["s1"] = [1, 2, 3]
    assert run_command(command) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for line in out.splitlines():
        assert len(line) <= 80 or "/p2p/" in line  # an address is one word, to be copied
    assert run_command([*command, "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.endswith("\n")
    assert out.count("\n") == 1
    json.loads(out)


def test_the_json_of_status_and_peers_has_the_fixed_keys(
    daemon: EchoDaemon, capfd: pytest.CaptureFixture[str]
) -> None:
    run_command(["status", "--json"])
    status = json.loads(capfd.readouterr().out)
    fixed = {"version", "pid", "peer_id", "name", "state", "workers", "missing", "sessions"}
    assert fixed <= set(status)
    worker = {"model", "spans", "pid", "state", "backend", "weights_bytes", "kv_bytes", "kv_budget_bytes"}
    assert worker <= set(status["workers"][0])
    assert {"id", "model", "origin", "position", "route_number", "route"} <= set(status["sessions"][0])
    assert status["missing"] == {"tiny": "4-7,head"}
    run_command(["peers", "--json"])
    peers = json.loads(capfd.readouterr().out)
    assert {"id", "name", "state", "addrs", "rtt_ms", "offers"} <= set(peers[0])


def test_what_status_shows(daemon: EchoDaemon, capfd: pytest.CaptureFixture[str]) -> None:
    run_command(["status"])
    out = capfd.readouterr().out
    for part in (
        "desk: degraded",
        PEER,
        "123 MB",
        "4-7,head",
        "desk embed,0-3 > attic 4-7,head",
        "unverified",
        "tiny   desk  embed,0-3  12.3      0.12       1.5    4096     1.2",
    ):
        assert part in out
    run_command(["map"])
    out = capfd.readouterr().out
    assert "tiny   desk   embed,0-3   embed,0-3  12.3      ready" in out
    assert "tiny   attic  4-7,head    -          -         unreachable" in out
    run_command(["peers"])
    out = capfd.readouterr().out
    assert "embed,0-3: 12.3 ms a token, 0.12 ms a prompt position, 1.5 sessions at work\n" in out
    assert "round trips: desk 1.2 ms, hall 130 ms\n" in out
    run_command(["peers", "--refused"])
    assert "[peers.x]\nid = 1\n" in capfd.readouterr().out


def test_text_of_peers_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31m\x07b\x9b\x7f\n\tc") == "a[31mb\n\tc"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (99_960, "100 KB"), (999_600, "1.0 MB"),
     (2_500_000_000, "2.5 GB"), (7 * 10**15, "7000 TB")],
)  # fmt: skip
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


# --- failures ---

FAILING = [
    (["status", "--socket", "/nonexistent/s"], "no_daemon", 3),
    (["peers", "--jsn"], "bad_request", 2),
    (["bogus"], "bad_request", 2),
    (["run"], "bad_request", 2),
    (["run", "--temperature", "warm", "x"], "bad_request", 2),
    (["run", "--temperature", "nan", "x"], "bad_request", 2),
    (["run", "--presence-penalty", "inf", "x"], "bad_request", 2),
    (["run", "--top-p", "1.5", "x"], "bad_request", 2),
    (["run", "--stop-ids", "1,,2", "x"], "bad_request", 2),
    (["run", "--stop", "", "x"], "bad_request", 2),
    (["run", "--seed", "-1", "x"], "bad_request", 2),
    (["disconnect", "nobody"], "not_found", 2),
    (["connect", "the dots"], "bad_request", 2),
    (["connect", "/ip4/10.0.0.2/tcp/4001"], "bad_request", 2),
    (["connect", ADDRESS.replace("0.2", "0.99")], "peer_refused", 7),
    (["cache", "clear", "nosuch"], "not_found", 2),
    (["cache"], "bad_request", 2),
]


@pytest.mark.parametrize(
    ("command", "kind", "code"), FAILING, ids=lambda v: v if isinstance(v, str) else None
)
def test_failures_are_one_line_and_an_exit_code(
    daemon: EchoDaemon, capfd: pytest.CaptureFixture[str], command: list[str], kind: str, code: int
) -> None:
    assert run_command([*command, "--json"]) == code
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    error = json.loads(out)["error"]
    assert list(error) == ["code", "kind", "message", "data"]
    assert error["kind"] == kind
    assert run_command(command) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err


def test_json_after_two_dashes_is_no_option(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "--socket", "/nonexistent/s", "--", "--json"]) == 3
    assert capfd.readouterr().out == ""


# --- the socket ---


def test_socket_before_or_after_the_subcommand(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with EchoDaemon(tmp_path / "s.sock") as daemon:
        path = str(daemon.path)
        for command in (
            ["--socket", path, "status"],
            ["status", "--socket", path],
            ["--socket", "/nonexistent", "status", "--socket", path],
            ["--socket", path, "cache", "list"],
            ["cache", "--socket", path, "list"],
            ["cache", "list", "--socket", path],
        ):
            assert run_command(command) == 0
            assert capfd.readouterr().err == ""


def test_the_search_order(tmp_path: Path) -> None:
    run, system = tmp_path / "run", tmp_path / "system" / "dgnd.sock"
    environ = {"XDG_RUNTIME_DIR": str(run), "DGN_SOCKET": "/env.sock"}
    assert candidates(Path("/given"), environ, system) == (Path("/given"),)
    assert candidates(None, environ, system) == (Path("/env.sock"),)
    del environ["DGN_SOCKET"]
    mine = run / "dgn" / "dgnd.sock"
    assert candidates(None, environ, system) == (mine, system)
    assert candidates(None, {"XDG_RUNTIME_DIR": "relative", "DGN_SOCKET": ""}, system) == (system,)

    with pytest.raises(NoDaemon) as caught:
        client_socket(None, environ, system)
    assert str(mine) in caught.value.message
    assert str(system) in caught.value.message
    system.parent.mkdir()
    system.touch()
    assert client_socket(None, environ, system) == system
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert client_socket(None, environ, system) == mine


def test_the_daemon_takes_the_first_place_it_can_use(tmp_path: Path) -> None:
    run, system = tmp_path / "run", tmp_path / "system" / "dgnd.sock"
    environ = {"XDG_RUNTIME_DIR": str(run)}
    assert daemon_socket(None, environ, system) == system  # there is no such runtime directory
    run.mkdir()
    assert daemon_socket(None, environ, system) == run / "dgn" / "dgnd.sock"
    assert (run / "dgn").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no place for the control socket"):
        daemon_socket(tmp_path / "file" / "x.sock", environ, system)


def as_nobody(path: Path) -> DgnError | None:
    """What a user without rights gets when connecting."""
    import grp  # noqa: F401 - that user may not be allowed to read the standard library of this interpreter

    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                ControlClient(path).close()
            except DgnError as error:
                os.write(write_fd, msgspec.json.encode((error.kind, error.message)))
        finally:
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as file:
        said = file.read()
    os.waitpid(pid, 0)
    if not said:
        return None
    kind, message = msgspec.json.decode(said, type=tuple[str, str])
    return {"permission_denied": SocketDenied}.get(kind, DgnError)(message)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_permission_denied_says_how_to_get_it() -> None:
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as listener:
        directory = Path(name)
        directory.chmod(0o755)
        path = directory / "s.sock"
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o660)
        denied = as_nobody(path)
        assert isinstance(denied, SocketDenied)
        assert "usermod -aG root" in denied.message
        directory.chmod(0o700)
        denied = as_nobody(path)
        assert isinstance(denied, SocketDenied)
        assert "group" in denied.message


def test_no_daemon_and_a_stale_socket_are_different_messages(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with pytest.raises(NoDaemon) as none:
        ControlClient(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(StaleSocket) as stale:
        ControlClient(path)
    assert "no dgnd is running" in none.value.message
    assert "dgnd has died" in stale.value.message
    for error in (none, stale):
        assert "start" in error.value.message
        assert error.value.exit_code == 3
    (tmp_path / "file").touch()
    with pytest.raises(NoDaemon, match="is no socket"):
        ControlClient(tmp_path / "file")
    with pytest.raises(DgnError, match="too long"):
        ControlClient(tmp_path / ("x" * 200))


def test_a_daemon_that_speaks_something_else(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with ControlClient(path) as client:
            other, _ = listener.accept()
            with other:
                other.sendall(b"SSH-2.0-OpenSSH\r\n")
                with pytest.raises(DgnError, match="does not speak"):
                    client.call("status")
        with ControlClient(path) as client:
            other, _ = listener.accept()
            with other:
                with pytest.raises(DgnError, match="did not answer in time"):
                    client.call("status", timeout_s=0.05)
                other.sendall(b'{"jsonrpc":"2.0","id":2,"result":{"name":5}}\n')
                with pytest.raises(DgnError, match="another version"):
                    client.call("status")
        with ControlClient(path) as client:
            other, _ = listener.accept()
            other.close()
            with pytest.raises(NoDaemon, match="closed the connection"):
                client.call("status")


# --- the program ---


def test_the_table_of_commands_is_right() -> None:
    group = cli
    assert isinstance(group, LazyGroup)
    context = click.Context(group)
    for name, (_, line) in COMMANDS.items():
        command = group.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(200) == line
    assert group.get_command(context, "nosuch") is None


def imported(*args: str) -> set[str]:
    """Modules that a dgnctl command line imports, by importing time's own list."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dgnctl", *args], capture_output=True, text=True
    )
    return {
        line.rsplit("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
    }


HEAVY = {
    "torch", "onnxruntime", "transformers", "libp2p", "trio", "numpy", "rich", "prompt_toolkit", "tokenizers",
    "safetensors", "jinja2", "cryptography", "asyncio", "hypothesis",
}  # fmt: skip


@pytest.mark.parametrize(
    "args", [("--help",), ("status",), ("run", "hello"), ("run", "--json", "hello"), ("chat",)], ids=" ".join
)
def test_dgnctl_imports_nothing_heavy(daemon: EchoDaemon, args: tuple[str, ...]) -> None:
    modules = imported(*args)
    assert "dgnctl.cli" in modules
    assert not HEAVY & {name.partition(".")[0] for name in modules}
    ours = {name for name in modules if name.startswith(("dgnd.", "dgn_backends."))}
    allowed = {"api", "client", "connecting", "jsonrpc", "socket_path"}
    assert ours <= {"dgnd.errors", "dgn_backends.errors", "dgnd.control"} | {
        f"dgnd.control.{n}" for n in allowed
    }


def test_the_version_as_an_option(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capfd.readouterr().out == f"dgnctl {version('distributed-gpt-node')}\n"


def test_help_needs_little_more_than_click() -> None:
    modules = imported("--help")
    assert not {"msgspec", "socket", "dgnctl.run", "dgnctl.chat", "readline"} & modules


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (ADDRESS, True),
        (f"/dns4/attic.lan/tcp/4001/p2p/{PEER}", True),
        (f"/ip6/::1/tcp/4001/p2p/{PEER}", True),
        ("/ip4/10.0.0.2/tcp/4001", False),
        ("the dots", False),
        (f"{ADDRESS} please", False),
        (f"/ip4/10.0.0.2/udp/4001/p2p/{PEER}", False),
        (f"/ip4//tcp/4001/p2p/{PEER}", False),
        ("", False),
    ],
)
def test_what_is_a_multiaddress(text: str, is_one: bool) -> None:
    assert is_multiaddress(text) is is_one


def test_every_method_has_a_use_or_is_known_to_have_none() -> None:
    source = "".join(path.read_text() for path in Path(sys.modules["dgnctl"].__path__[0]).glob("*.py"))
    unused = {method for method in api.METHODS if f'"{method}"' not in source}
    assert unused == {
        "generate",
        "cancel",
        "tokenize",
        "shutdown",
    }  # the first two are of dgnd.control.client
