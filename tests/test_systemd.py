"""The package on a Debian with a real systemd, from installation to purge. `make test-systemd` runs it.

One machine lives through all tests, in their order.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deb_kit import WHY_SKIPPED, install, made_package, newer_package, quick_dpkg
from nspawn import Machine, base_system, why_not

pytestmark = [
    pytest.mark.skipif(not os.environ.get("DGN_TEST_SYSTEMD"), reason=WHY_SKIPPED),
    pytest.mark.skipif(bool(reason := why_not()), reason=reason),
    pytest.mark.timeout(1800),
]

QUESTION = "How do I connect a peer?"
CONFIG = "etc/dgn/dgn.toml"
#: Where others than the package write: systemd, dpkg, apt, those who add users.
NOT_OURS = re.compile(
    r"^/(var/(log|cache|tmp)|var/lib/(dpkg|apt|systemd|dbus)|run|tmp|dev|proc|sys|home)(/|$)"
    r"|^/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$|^/etc/\.pwd\.lock$|^/etc/machine-id$"
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """It has two users, alice, who is to be a member of the group, and bob, and no network."""
    base = base_system()
    with Machine("pc", tmp_path_factory.mktemp("pc"), base) as machine:
        quick_dpkg(machine.root)
        for name in ("alice", "bob"):
            machine.run("useradd", "--create-home", name)
        machine.files_before = all_files(machine)  # type: ignore[attr-defined]  # for the last test
        install(machine, made_package())
        machine.run("usermod", "-aG", "dgn", "alice")
        yield machine


def all_files(machine: Machine) -> set[str]:
    """All paths that belong to the machine itself."""
    paths = machine.run("find", "/", "-xdev").stdout.splitlines()
    return {path for path in paths if not NOT_OURS.match(path)}


def answer(machine: Machine) -> str:
    """Of a member of the group, at once."""
    said: str = machine.run("dgnctl", "run", QUESTION, user="alice").stdout
    return said


def pid(machine: Machine) -> int:
    return int(machine.property("MainPID"))


def active(machine: Machine) -> bool:
    return machine.property("ActiveState") == "active"


def in_service_again(machine: Machine, old: int) -> None:
    """Waits for another process that serves."""
    machine.wait_for(lambda: pid(machine) not in (0, old) and active(machine), "another process in service")
    assert "dgnctl connect" in answer(machine)


def test_an_installed_package_serves(machine: Machine) -> None:
    assert active(machine)
    assert machine.property("StatusText") == "ready: serves dgn-demo embed,0-7,head; 0 sessions"
    for unit in ("dgnd.service", "dgnd.socket"):
        assert machine.property("UnitFileState", unit) == "enabled"
        assert machine.property("FragmentPath", unit).endswith(f"/lib/systemd/system/{unit}")
    assert "dgnctl connect" in answer(machine)
    assert machine.run("systemctl", "--failed", "--plain", "--no-legend").stdout == ""
    assert machine.run("dpkg", "--verify", "dgn").stdout == ""
    by = json.loads(machine.run("dgnctl", "system", "status", "--json").stdout)
    assert {unit["by"] for unit in by if unit["name"] in ("dgnd.service", "dgnd.socket")} == {"package"}


def test_bash_completes_what_the_service_knows(machine: Machine) -> None:
    script = "source /usr/share/bash-completion/completions/dgnctl; COMP_WORDS=(%s ''); COMP_CWORD=%d; "
    for words, offered in (("dgnctl run --model", "dgn-demo"), ("dgnctl system", "install status uninstall")):
        line = script % (words, len(words.split())) + '_dgnctl_completion dgnctl; echo "${COMPREPLY[@]}"'
        assert machine.run("bash", "-c", line, user="alice").stdout == f"{offered}\n"
    for page in ("man1/dgnctl.1", "man5/dgn.toml.5", "man8/dgnd.8"):
        assert machine.run("zcat", f"/usr/share/man/{page}.gz").stdout.startswith(".TH ")


def test_the_socket_is_for_members_of_the_group_alone(machine: Machine) -> None:
    socket = "/run/dgn/dgnd.sock"
    assert machine.run("stat", "-c", "%U %G %a", socket).stdout == "dgn dgn 660\n"
    assert machine.run("dgnctl", "status").returncode == 0
    assert machine.run("dgnctl", "status", user="alice").returncode == 0
    for mode in ("660", "666"):  # the mode is not what keeps others out
        machine.run("chmod", mode, socket)
        for user in ("bob", "nobody"):
            refused = machine.run("dgnctl", "status", user=user, check=False)
            assert (refused.returncode, refused.stdout) == (4, "")
            assert "may not use dgnd's control socket" in refused.stderr
    machine.run("chmod", "660", socket)


def test_it_is_active_only_when_it_serves(machine: Machine) -> None:
    machine.run("systemctl", "stop", "dgnd.service")
    machine.run("systemctl", "start", "--no-block", "dgnd.service")
    seen = set()
    until = time.monotonic() + 120.0
    while "active" not in {state for state, _ in seen}:
        state = machine.property("ActiveState")
        seen.add((state, json.loads(machine.run("dgnctl", "status", "--json").stdout)["state"]))
        assert time.monotonic() < until
    assert {serves for state, serves in seen if state == "active"} == {"ready"}
    assert {state for state, _ in seen} >= {"activating", "active"}
    machine.run("systemctl", "restart", "dgnd.service")
    assert "dgnctl connect" in answer(machine)  # without --wait


def test_a_killed_one_is_back(machine: Machine) -> None:
    old, before = pid(machine), int(machine.property("NRestarts"))
    machine.run("kill", "-KILL", old)
    in_service_again(machine, old)
    assert int(machine.property("NRestarts")) == before + 1


def test_a_stopped_one_is_ended_by_the_watchdog(machine: Machine) -> None:
    drop_in = machine.root / "etc/systemd/system/dgnd.service.d"
    drop_in.mkdir()
    (drop_in / "short.conf").write_text("[Service]\nWatchdogSec=6\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "dgnd.service")
    old = pid(machine)
    time.sleep(9.0)  # longer than the watchdog's patience: it is fed
    assert pid(machine) == old
    machine.run("kill", "-STOP", old)
    in_service_again(machine, old)
    journal = machine.journal()
    assert "Watchdog timeout" in journal
    assert "Fatal Python error: Aborted" in journal  # and where it was
    (drop_in / "short.conf").unlink()
    drop_in.rmdir()
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "dgnd.service")


def test_who_connects_starts_it(machine: Machine) -> None:
    machine.run("systemctl", "stop", "dgnd.service")
    assert (active(machine), machine.property("ActiveState", "dgnd.socket")) == (False, "active")
    assert machine.run("dgnctl", "run", "--wait", "60", QUESTION, user="alice").stdout
    machine.wait_for(lambda: active(machine), "active")


def test_a_reload_takes_what_is_right_and_refuses_what_is_wrong(machine: Machine) -> None:
    config, old = machine.root / CONFIG, pid(machine)
    text = config.read_text()
    config.write_text(text.replace("idle_s = 600.0", "idle_s = 300.0"))
    machine.run("systemctl", "reload", "dgnd.service")
    machine.wait_for(lambda: active(machine), "active again")
    assert (pid(machine), "idle_s" in machine.journal()) == (old, True)
    config.write_text(text.replace("idle_s = 600.0", "idel_s = 300.0"))
    machine.run("systemctl", "reload", "dgnd.service", check=False)
    wrong = f"/{CONFIG}:{text[: text.index('idle_s')].count(chr(10)) + 1}:"
    machine.wait_for(lambda: wrong in machine.property("StatusText"), wrong)
    assert wrong in machine.journal()
    assert (pid(machine), "dgnctl connect" in answer(machine)) == (old, True)
    config.write_text(text)
    machine.run("systemctl", "reload", "dgnd.service")


def test_the_journal_says_what_it_does_and_nothing_of_what_is_said(machine: Machine) -> None:
    said = answer(machine)
    lines = machine.journal()
    for words in ("control socket /run/dgn/dgnd.sock", "listening on /ip4/0.0.0.0/tcp/4001", "serving"):
        assert words in lines
    assert QUESTION not in lines
    assert said.strip() not in lines


def test_the_journal_has_the_id_of_an_answer_as_a_field(machine: Machine) -> None:
    result = json.loads(machine.run("dgnctl", "run", "--json", QUESTION, user="alice").stdout)
    generation = result["generation"]
    found = machine.run("journalctl", "-u", "dgnd", "-o", "json", f"DGN_GENERATION={generation}").stdout
    entries = [json.loads(line) for line in found.splitlines()]
    said = "\n".join(entry["MESSAGE"] for entry in entries)
    assert "begun with dgn-demo" in said
    assert f"ended: {result['finish_reason']}" in said
    assert {(entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"], entry["DGN_SESSION"]) for entry in entries} == {
        ("6", "dgnd", generation)
    }


def test_the_sandbox_is_there(machine: Machine) -> None:
    verified = machine.run("systemd-analyze", "verify", "--man=no", "dgnd.service", "dgnd.socket")
    assert (verified.stdout, verified.stderr) == ("", "")
    shown = machine.run("systemd-analyze", "security", "--no-pager", "dgnd.service").stdout
    found = re.search(r"Overall exposure level for dgnd.service: ([0-9.]+)", shown)
    assert found is not None
    assert float(found[1]) <= 2.0
    daemon = pid(machine)
    workers = machine.run("pgrep", "-P", daemon).stdout.split()
    assert workers
    for process in (daemon, *workers):
        status = machine.run("cat", f"/proc/{process}/status").stdout
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert (fields["NoNewPrivs"], fields["Seccomp"], int(fields["CapEff"], 16)) == ("1", "2", 0)
        assert fields["Uid"].split()[0] == machine.run("id", "-u", "dgn").stdout.strip()
        assert machine.run("ps", "-o", "ni=", "-p", process).stdout.strip() == "19"
    inside = ["nsenter", "-t", daemon, "-m", "--"]
    for path in ("/usr/new", "/etc/new", "/var/lib/new"):  # not even root could
        refused = machine.run(*inside, "touch", path, check=False)
        assert "Read-only file system" in refused.stderr, path
    refused = machine.run(*inside, "runuser", "-u", "dgn", "--", "touch", f"/{CONFIG}", check=False)
    assert "Permission denied" in refused.stderr
    assert machine.run(*inside, "ls", "-A", "/home", check=False).stdout == ""
    machine.run(*inside, "touch", "/var/lib/dgn/new")
    machine.run("rm", "/var/lib/dgn/new")


def test_an_upgrade_restarts_the_service_and_never_the_socket(machine: Machine, tmp_path: Path) -> None:
    config = machine.root / CONFIG
    config.write_text(config.read_text() + "# mine\n")
    old, since = pid(machine), machine.property("ActiveEnterTimestampMonotonic", "dgnd.socket")
    identity = machine.run("sha256sum", "/var/lib/dgn/identity.key").stdout
    install(machine, newer_package(made_package(), tmp_path))
    assert machine.run("dpkg-query", "-W", "-f", "${Version}", "dgn").stdout.endswith("+newer")
    assert active(machine)
    assert pid(machine) != old
    assert machine.property("ActiveEnterTimestampMonotonic", "dgnd.socket") == since
    assert machine.run("sha256sum", "/var/lib/dgn/identity.key").stdout == identity
    assert config.read_text().endswith("# mine\n")
    assert "dgnctl connect" in answer(machine)


def test_what_the_administrator_disabled_stays_so(machine: Machine) -> None:
    machine.run("systemctl", "disable", "--now", "dgnd.service", "dgnd.socket")
    machine.run("dpkg-reconfigure", "-f", "noninteractive", "dgn")
    assert (active(machine), machine.property("UnitFileState")) == (False, "disabled")
    machine.run("systemctl", "enable", "--now", "dgnd.socket", "dgnd.service")
    assert active(machine)


def test_a_removal_leaves_what_is_yours(machine: Machine) -> None:
    kept = machine.run("sha256sum", "/var/lib/dgn/identity.key", f"/{CONFIG}").stdout
    machine.run("apt-get", "remove", "-q", "-y", "dgn", timeout=600.0)
    assert not active(machine)
    gone = ("/usr/bin/dgnd", "/usr/lib/dgn", "/run/dgn/dgnd.sock", "/usr/lib/systemd/system/dgnd.service")
    for path in gone:
        assert machine.run("test", "-e", path, check=False).returncode == 1, path
    assert machine.run("pgrep", "-u", "dgn", check=False).stdout == ""
    assert machine.run("sha256sum", "/var/lib/dgn/identity.key", f"/{CONFIG}").stdout == kept
    install(machine, made_package())
    assert active(machine)
    assert machine.run("sha256sum", "/var/lib/dgn/identity.key", f"/{CONFIG}").stdout == kept
    assert "dgnctl connect" in answer(machine)


def test_a_purge_leaves_nothing(machine: Machine) -> None:
    machine.run("apt-get", "purge", "-q", "-y", "dgn", timeout=600.0)
    assert all_files(machine) == machine.files_before  # type: ignore[attr-defined]  # of the fixture
    for place in ("/var/lib", "/var/cache", "/run", "/etc"):
        assert machine.run("find", place, "-name", "*dgn*", "-not", "-path", "/etc/.git/*").stdout == ""
    assert machine.run("getent", "passwd", "dgn", check=False).returncode == 2
    assert machine.run("getent", "group", "dgn", check=False).returncode == 2
    assert machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "dgn*").stdout == ""
