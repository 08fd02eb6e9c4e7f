"""The units in packaging/systemd, as systemd's own tools see them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parent.parent / "packaging/systemd"
_NO_ANALYZE = "systemd-analyze is not installed"
ANALYZE = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason=_NO_ANALYZE)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units with commands that exist, as `verify` wants; nothing else is changed."""
    for name in ("dgnd.service", "dgnd.socket"):
        text = (UNITS / name).read_text()
        if name == "dgnd.service":
            assert "ExecStart=/usr/bin/dgnd " in text
        (tmp_path / name).write_text(text.replace("/usr/bin/dgnd ", f"{Path(sys.executable).parent}/dgnd "))
    return tmp_path


@ANALYZE
@pytest.mark.parametrize("name", ["dgnd.service", "dgnd.socket"])
def test_systemd_has_nothing_to_say_about_the_units(installed: Path, name: str) -> None:
    done = run("systemd-analyze", "verify", "--man=no", installed / name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@ANALYZE
def test_the_service_is_not_exposed_more_than_promised(installed: Path) -> None:
    done = run("systemd-analyze", "security", "--offline=true", "--threshold=20", installed / "dgnd.service")
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    found = re.search(r"Overall exposure level for dgnd.service: ([0-9.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) <= 2.0


@ANALYZE
def test_the_drop_in_for_cuda_opens_devices_alone(installed: Path) -> None:
    drop_in = installed / "dgnd.service.d"
    drop_in.mkdir()
    shutil.copy(UNITS / "cuda.conf", drop_in)
    done = run("systemd-analyze", "verify", "--man=no", installed / "dgnd.service")
    # systemd knows the names of devices from /proc/devices, where a machine without the driver lacks them.
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_the_user_and_its_group_are_made(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("systemd-sysusers needs root")
    (tmp_path / "etc").mkdir()
    done = run("systemd-sysusers", f"--root={tmp_path}", UNITS / "dgn.sysusers")
    assert done.returncode == 0, done.stderr
    (user,) = [line for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith("dgn:")]
    assert user.split(":")[5:] == ["/var/lib/dgn", "/usr/sbin/nologin"]
    assert re.search(r"^dgn:", (tmp_path / "etc/group").read_text(), flags=re.M)


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="systemd-tmpfiles is not installed")
def test_the_directories_are_made(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("systemd-tmpfiles needs root")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\ndgn:x:4242:4242::/:/bin/false\n")
    (tmp_path / "etc/group").write_text("root:x:0:\ndgn:x:4242:\n")
    done = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", UNITS / "dgn.tmpfiles")
    assert done.returncode == 0, done.stderr
    run_dir, state = (tmp_path / name for name in ("run/dgn", "var/lib/dgn"))
    assert (run_dir.stat().st_uid, oct(run_dir.stat().st_mode & 0o777)) == (4242, "0o755")
    assert (state.stat().st_gid, oct(state.stat().st_mode & 0o777)) == (4242, "0o700")


def test_what_the_daemon_relies_on_is_in_the_unit() -> None:
    """And what people rely on whose PC this is."""
    lines = (UNITS / "dgnd.service").read_text().splitlines()
    for line in (
        "Type=notify", "NotifyAccess=main", "Restart=on-failure", "WatchdogSec=60", "User=dgn", "Group=dgn",
        "StateDirectory=dgn", "RuntimeDirectory=dgn", "RuntimeDirectoryPreserve=yes", "CPUWeight=idle",
        "IOSchedulingClass=idle", "Nice=19",
    ):  # fmt: skip
        assert line in lines
    assert not any(line.startswith("ProcSubset=") for line in lines)
    # A boot does not wait for a network that nobody manages.
    assert [line for line in lines if line.startswith(("After=", "Wants="))] == ["After=network.target"]
