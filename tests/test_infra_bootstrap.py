"""scripts/bootstrap.sh: what it finds missing, and when it installs.

Its decisions are tested with an interpreter whose pip only writes down that it was called; that the real pip
installs the real versions is what every run of `make test` in a fresh checkout shows.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP_LOG = "pip.log"

#: Stands in for python3: the real one, but with a venv and a pip of our own, slow while a file says so.
FAKE_PYTHON = f"""#!/bin/sh
case "$*" in
"-c import ensurepip, venv") exit 0 ;;
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip "*)
    echo "$*" >>{PIP_LOG}
    while [ -e slow ]; do sleep 0.02; done
    [ ! -e fail ] || exit 1 ;;
-c*Python.h*) exit 0 ;;
"-c import pip") exit 0 ;;
*) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """The files that bootstrap.sh reads, in a directory of its own, and a PATH of its own."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkout"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/bootstrap.sh"):
            shutil.copy(ROOT / name, self.root / name)
        self.commands = directory / "bin"
        self.commands.mkdir()
        for tool in (
            "sh",
            "cat",
            "cp",
            "cut",
            "dirname",
            "flock",
            "mkdir",
            "rm",
            "sed",
            "sha256sum",
            "sleep",
        ):
            (self.commands / tool).symlink_to(str(shutil.which(tool)))
        self.command("id", 'echo "1000"')
        self.command("gcc", "cat >/dev/null")
        self.command("make", "")
        self.python = self.command("fake-python", FAKE_PYTHON.partition("\n")[2])

    def command(self, name: str, script: str) -> Path:
        """Puts a command on the PATH."""
        path = self.commands / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def start(self, kind: str = "demo") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.commands / "sh", self.root / "scripts/bootstrap.sh", kind],
            env={"PATH": str(self.commands), "PYTHON": str(self.python)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def run(self, kind: str = "demo") -> tuple[int, str]:
        """Exit code and stderr; stdout belongs to what comes after."""
        process = self.start(kind)
        out, err = process.communicate(timeout=120)
        assert out == ""
        return process.returncode, err

    @property
    def installs(self) -> list[str]:
        """The calls of pip that installed the project, since the last look."""
        log = self.root / PIP_LOG
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line for line in lines if "--constraint" in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_installs_once_and_is_then_fast(checkout: Checkout) -> None:
    code, err = checkout.run()
    assert code == 0, err
    assert "creating .venv" in err
    (install,) = checkout.installs
    assert "--constraint constraints.txt --build-constraint constraints.txt -e .[onnx]" in install
    assert "torch" not in install
    assert checkout.run() == (0, "")
    assert checkout.installs == []


def test_the_tests_need_more_and_hold_what_the_demo_needs(checkout: Checkout) -> None:
    checkout.run("demo")
    checkout.run("test")
    assert ["-e .[all] --group dev" in install for install in checkout.installs] == [False, True]
    assert checkout.run("demo") == (0, "")
    assert checkout.run("test") == (0, "")
    assert checkout.installs == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_installs_again_into_the_same_venv(checkout: Checkout, name: str) -> None:
    checkout.run()
    kept = checkout.root / ".venv/kept"
    kept.touch()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert checkout.run()[0] == 0
    assert len(checkout.installs) == 2
    assert kept.exists()


def test_an_interrupted_install_starts_over(checkout: Checkout) -> None:
    (checkout.root / "slow").touch()
    process = checkout.start()
    until = time.monotonic() + 20
    while not (checkout.root / PIP_LOG).exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (checkout.root / "slow").unlink()
    half_made = checkout.root / ".venv/half-made"
    half_made.touch()
    code, err = checkout.run()
    assert code == 0, err
    assert "interrupted" in err
    assert not half_made.exists()
    assert checkout.run() == (0, "")


def test_a_failed_install_fails_and_the_next_run_installs(checkout: Checkout) -> None:
    (checkout.root / "fail").touch()
    assert checkout.run()[0] != 0
    (checkout.root / "fail").unlink()
    assert checkout.run()[0] == 0
    assert len(checkout.installs) == 1


def test_a_venv_that_does_not_work_is_made_anew(checkout: Checkout) -> None:
    (checkout.root / ".venv/bin").mkdir(parents=True)
    (checkout.root / ".venv/bin/python").write_text("")
    code, err = checkout.run()
    assert code == 0
    assert "making .venv anew: it does not work" in err


def test_a_moved_checkout_gets_a_new_venv(checkout: Checkout) -> None:
    checkout.run()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    code, err = checkout.run()
    assert code == 0
    assert "the checkout was moved" in err


def test_two_at_once_install_once(checkout: Checkout) -> None:
    (checkout.root / "slow").touch()
    first = checkout.start()
    until = time.monotonic() + 20
    while not (checkout.root / PIP_LOG).exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    second = checkout.start()
    assert second.stderr is not None
    assert "waiting for another run" in second.stderr.readline()
    (checkout.root / "slow").unlink()
    for process in (first, second):
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert len(checkout.installs) == 1


def test_what_is_missing_is_one_line_to_run(checkout: Checkout) -> None:
    (checkout.commands / "gcc").unlink()
    code, err = checkout.run()
    assert code == 1
    assert err.splitlines() == [
        "dgn: this system lacks: gcc libgmp-dev",
        "dgn: as root, run:  apt-get install -y python3-venv python3-dev gcc make libgmp-dev",
    ]
    assert not (checkout.root / ".venv").exists()


def test_headers_of_gmp_are_looked_for(checkout: Checkout) -> None:
    checkout.command("gcc", "exit 1")
    assert "dgn: this system lacks: libgmp-dev\n" in checkout.run()[1]


def test_root_on_debian_installs_what_is_missing_and_says_so(checkout: Checkout) -> None:
    (checkout.commands / "gcc").unlink()
    (checkout.commands / "make").unlink()
    checkout.command("id", "echo 0")
    log = checkout.root / "apt.log"
    bin_dir = checkout.commands
    made = "; ".join(
        f"printf '#!/bin/sh\\n' >{bin_dir / name}; chmod +x {bin_dir / name}" for name in ("gcc", "make")
    )
    (checkout.commands / "chmod").symlink_to(str(shutil.which("chmod")))
    checkout.command("apt-get", f'echo "$*" >>{log}; [ "$1" = update ] || {{ {made}; }}')
    code, err = checkout.run()
    assert code == 0, err
    assert "dgn: installing what is missing on this system: gcc libgmp-dev make" in err
    assert log.read_text().splitlines() == [
        "update -q",
        "install -q -y --no-install-recommends gcc libgmp-dev make",
    ]


def test_usage(checkout: Checkout) -> None:
    code, err = checkout.run("all")
    assert code == 2
    assert err.startswith("usage: ")
