"""The package for tests: the one that `make deb` made, and a newer one with the same contents."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from nspawn import Machine

ROOT = Path(__file__).resolve().parent.parent
#: What the tests of the package say when they are skipped; `make test-systemd` sets the variable.
WHY_SKIPPED = "minutes long: `make test-systemd` runs it"


def copy_of_the_checkout(place: Path) -> Path:
    """What git knows of it and what it would add, with other times than here."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
            target.chmod(0o600)
    return place


def made_package() -> Path:
    """Of this checkout."""
    (found,) = (ROOT / "dist").glob("dgn_*.deb")
    return found


def newer_package(old: Path, directory: Path, revision: str = "+newer") -> Path:
    """The same with `revision` behind its own; what it installs is that of the old one, byte for byte."""
    work = directory / "newer"
    control = work / "control"
    work.mkdir()
    subprocess.run(["dpkg-deb", "--control", old, control], check=True)
    text = (control / "control").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("Version: ")]
    (control / "control").write_text(text.replace(line, line + revision))
    made = directory / "dgn_newer.deb"
    subprocess.run(["tar", "-czf", "control.tar.gz", "-C", control, "."], cwd=work, check=True)
    members = _members(old.read_bytes())
    data = next(name for name in members if name.startswith("data.tar"))
    parts = {
        "debian-binary": members["debian-binary"],
        "control.tar.gz": (work / "control.tar.gz").read_bytes(),
        data: members[data],
    }
    made.write_bytes(b"!<arch>\n" + b"".join(_member(name, body) for name, body in parts.items()))
    shutil.rmtree(work)
    return made


def _members(archive: bytes) -> dict[str, bytes]:
    """Of an ar archive, which a package is."""
    found, at = {}, 8
    while at < len(archive):
        header = archive[at : at + 60]
        size = int(header[48:58])
        found[header[:16].decode().strip().rstrip("/")] = archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    return found


def _member(name: str, body: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode()
    return header + body + b"\n" * (len(body) % 2)


def quick_dpkg(root: Path) -> None:
    """A machine that is thrown away needs no fsync of each file."""
    (root / "etc/dpkg/dpkg.cfg.d/quick").write_text("force-unsafe-io\n")


def install(machine: Machine, package: Path) -> str:
    """With apt, which looks after dependencies; what it printed."""
    shutil.copy(package, machine.root / "var/tmp/dgn.deb")
    apt = ["apt-get", "install", "-q", "-y", "-o", "Dpkg::Use-Pty=0", "/var/tmp/dgn.deb"]
    done = machine.run("env", "DEBIAN_FRONTEND=noninteractive", *apt, timeout=600.0)
    (machine.root / "var/tmp/dgn.deb").unlink()
    return done.stdout + done.stderr
