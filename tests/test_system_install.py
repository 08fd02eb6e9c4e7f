"""`dgnctl system`: the units for the interpreter that runs it, written, shown and removed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_supervisor import FakeSupervisor

from dgnctl.cli import cli, run_command
from dgnctl.system import commands
from dgnctl.system.reach import hindrance, in_a_home
from dgnctl.system.units import MARK, interpreter_of, quoted
from dgnd.config import load_config
from dgnd.errors import BadRequest

ANALYZE = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
SYSTEM = ["etc/systemd/system/dgnd.service", "etc/systemd/system/dgnd.socket", "etc/sysusers.d/dgn.conf",
          "etc/tmpfiles.d/dgn.conf"]  # fmt: skip


def system(*words: object) -> Result:
    return CliRunner().invoke(cli, ["system", *map(str, words)])


def done(*words: object) -> str:
    result = system(*words)
    assert result.exception is None, result.output
    return result.output


def refused(*words: object) -> str:
    result = system(*words)
    assert isinstance(result.exception, BadRequest)
    return result.exception.message


def written(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_system_gets_its_units_and_loses_them_again(tmp_path: Path) -> None:
    done("install", "--root", tmp_path)
    assert written(tmp_path) == sorted(SYSTEM)
    text = (tmp_path / SYSTEM[0]).read_text()
    assert text.startswith(MARK)
    assert interpreter_of(text) == sys.executable
    assert "--config /etc/dgn/dgn.toml --socket /run/dgn/dgnd.sock\n" in text
    done("install", "--root", tmp_path)  # again: they are its own
    done("uninstall", "--root", tmp_path)
    assert written(tmp_path) == []
    assert "nothing that 'dgnctl system install' wrote" in refused("uninstall", "--root", tmp_path)


@pytest.mark.parametrize("user", [[], ["--user"]], ids=["system", "user"])
def test_a_dry_run_shows_everything_and_writes_nothing(
    tmp_path: Path, user: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    shown = done("install", "--root", tmp_path, "--dry-run", *user)
    assert written(tmp_path) == []
    assert "dgnd.service\n" + MARK in shown
    assert f"ExecStart={sys.executable} -P -m dgnd " in shown
    done("install", "--root", tmp_path, *user)
    before = written(tmp_path)
    assert f"would remove {tmp_path}/" in done("uninstall", "--root", tmp_path, "--dry-run", *user)
    assert written(tmp_path) == before


@pytest.mark.parametrize("name", ["dgnd.service", "dgnd.socket"])
def test_units_of_a_package_are_not_hidden(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "usr/lib/systemd/system" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("[Unit]\n")
    assert "a package brought it" in refused("install", "--root", tmp_path)
    assert written(tmp_path) == [str(theirs.relative_to(tmp_path))]
    units = json.loads(done("status", "--root", tmp_path, "--json"))
    assert {unit["name"]: unit["by"] for unit in units}[name] == "package"


def test_what_somebody_else_wrote_is_left_alone(tmp_path: Path) -> None:
    done("install", "--root", tmp_path)
    (tmp_path / SYSTEM[0]).write_text("[Service]\nExecStart=/opt/mine\n")
    assert f"{tmp_path / SYSTEM[0]} was not written by 'dgnctl system install'" in refused(
        "install", "--root", tmp_path
    )
    done("uninstall", "--root", tmp_path)
    assert written(tmp_path) == [SYSTEM[0]]
    shown = done("status", "--root", tmp_path)
    assert "somebody" in shown
    assert "/opt/mine" in shown


@pytest.mark.parametrize("kind", ["pipe", "bytes", "directory", "masked", "loop"])
def test_what_is_no_unit_is_left_alone(tmp_path: Path, kind: str) -> None:
    unit = tmp_path / SYSTEM[0]
    unit.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(unit)
    elif kind == "bytes":
        unit.write_bytes(b"\xf5\x00\xff" * 9)
    elif kind == "directory":
        unit.mkdir()
    else:
        unit.symlink_to("/dev/null" if kind == "masked" else unit)
    assert f"{unit} was not written by" in refused("install", "--root", tmp_path)
    assert "nothing that 'dgnctl system install' wrote" in refused("uninstall", "--root", tmp_path)
    shown = done("status", "--root", tmp_path)
    assert f"{unit} starts nothing" in shown
    assert "somebody" in shown


def test_what_is_left_is_only_what_is_there(tmp_path: Path) -> None:
    done("install", "--root", tmp_path)
    assert "left: " not in done("uninstall", "--root", tmp_path)
    done("install", "--root", tmp_path)
    (tmp_path / "etc/dgn").mkdir()
    (tmp_path / "etc/dgn/dgn.toml").touch()
    assert f"left: {tmp_path}/etc/dgn/dgn.toml\n" in done("uninstall", "--root", tmp_path)


def test_a_directory_that_is_relative_is_none_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    monkeypatch.setenv("HOME", "/home/ann")
    shown = done("install", "--user", "--dry-run", "--root", tmp_path)
    assert f"# {tmp_path}/home/ann/.config/systemd/user/dgnd.service" in shown
    assert 'state_dir = "/home/ann/.local/state/dgn"' in shown


def test_no_root_is_not_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = system("install", "--root", "")
    assert result.exit_code == 2
    assert "it is empty; name a directory" in result.output
    assert written(tmp_path) == []


def test_the_state_before_anything_is_installed(tmp_path: Path) -> None:
    shown = done("status", "--root", tmp_path)
    assert "not installed" in shown
    assert "dgnctl system install" in shown


@ANALYZE
@pytest.mark.parametrize("user", [[], ["--user"]], ids=["system", "user"])
def test_systemd_has_nothing_to_say_about_what_is_written(
    tmp_path: Path, user: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    done("install", "--root", tmp_path, *user)
    (service,) = tmp_path.rglob("dgnd.service")
    for unit in (service, service.with_name("dgnd.socket")):
        said = subprocess.run(
            ["systemd-analyze", *user, "verify", "--man=no", str(unit)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
    text = service.read_text()
    assert ("User=dgn" in text) == (not user)
    if user:
        assert not re.search(r"^(Protect|Private|User|StateDirectory|Capability)", text, flags=re.M)
        assert "WantedBy=default.target" in text
    else:
        level = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(service)],
            capture_output=True,
        )
        assert level.returncode == 0


def test_what_the_unit_of_a_user_starts_really_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the unit, with the configuration that was written, to READY."""
    home, run = tmp_path / "home", tmp_path / "run"
    run.mkdir()
    for name in [name for name in os.environ if name.startswith("XDG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(commands, "Manager", Nobody)
    done("install", "--user")
    config = home / ".config/dgn/dgn.toml"
    assert load_config(config).config.node.state_dir == home / ".local/state/dgn"
    config.write_text(config.read_text() + 'listen = ["/ip4/127.0.0.1/tcp/0"]\n')
    text = (home / ".config/systemd/user/dgnd.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.+)$", text, flags=re.M)
    command = shlex.split(line.replace("%t", str(run)))
    with FakeSupervisor(tmp_path) as supervisor:
        process = subprocess.Popen(
            command, env={**os.environ, **supervisor.environment}, stderr=subprocess.PIPE, text=True
        )
        try:
            end = time.monotonic() + 60
            while supervisor.first("READY") is None:
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.05)
            assert (run / "dgn/dgnd.sock").is_socket()
        finally:
            process.terminate()
            process.communicate(timeout=90)
    done("install", "--user")  # again: the configuration is the user's now
    assert "tcp/0" in config.read_text()
    done("uninstall", "--user")
    assert config.exists()


class Nobody:
    """A machine without systemd."""

    runs = False

    def __init__(self, user: bool) -> None:
        self.user = user

    def systemctl(self, *words: str) -> list[str]:
        return ["systemctl", *words]

    def properties(self, unit: str, names: object) -> dict[str, str]:
        return {}


def test_without_root_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file where a directory should be")
    message = refused("install", "--root", tmp_path)
    assert message.startswith(f"{tmp_path}/etc/systemd/system/dgnd.service: can't be written: ")
    assert run_command(["system", "install", "--root", str(tmp_path)]) == 2


@pytest.mark.parametrize("command", ["install", "status", "uninstall"])
def test_a_root_that_can_not_be_looked_into_is_named(tmp_path: Path, command: str) -> None:
    loop = tmp_path / "loop"  # not even root looks through it
    loop.symlink_to(loop)
    message = refused(command, "--root", loop)
    assert message.startswith(f"{loop}/")
    assert "can't be looked at: " in message


def test_a_disk_that_is_full_is_left_as_it_was(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from dgnctl.cli import run_command; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); sys.exit(run_command(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "system", "install", "--root", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"dgnctl: {tmp_path}/{SYSTEM[0]}: can't be written: File too large\n"
    assert written(tmp_path) == []


def test_a_python_that_the_user_of_the_service_can_not_use_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python").write_text("")
    assert "temporary files" in hindrance([closed / "python"])  # below /tmp
    assert hindrance([Path("/usr/bin/env")]) == ""
    assert "No such file" in hindrance([Path("/usr/nowhere/python")])
    assert in_a_home([Path("/usr/bin/env"), Path("/home/me/venv/bin/python")])
    assert not in_a_home([Path("/usr/bin/env"), Path("/opt/dgn/bin/python")])


@pytest.mark.parametrize(
    "path",
    ["/opt/dgn/bin/python", "/opt/my dgn/python", '/opt/a"b/python', "/opt/100%/python", "/opt/$x/python"],
)
def test_any_path_is_one_word_of_the_unit(path: str) -> None:
    unit = f"[Service]\nExecStart={quoted(path)} -P -m dgnd\n"
    if '"' not in path:
        assert interpreter_of(unit) == path
    assert quoted(path).count("%") == 2 * path.count("%")
