"""Makes dist/dgn_VERSION_ARCH.deb from this checkout: `make deb`.

The package has a virtual environment in /usr/lib/dgn with dgn, the onnx backend and the HTTP API. No file
in it names its place, so it also works elsewhere; only the two commands in /usr/bin know where it is.
Wheels come by name from the index that pip is configured for, in the versions of constraints.txt. Knows
nothing of what the maintainer scripts beside it do.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build/deb"
TREE = BUILD / "tree"
LIB = "usr/lib/dgn"
PYTHON = Path("/usr/bin/python3")  # Debian's: the package depends on it
NEEDED = {"dpkg-deb": "dpkg", "gcc": "gcc"}
#: Extension modules that are compiled here: nothing of the place where that happened.
REPRODUCIBLE = {"CFLAGS": "-g0 -O2", "LDFLAGS": "-Wl,--build-id=none", "PYTHONHASHSEED": "0"}

CONTROL = """\
Package: dgn
Version: {version}
Architecture: {arch}
Maintainer: Distributed-GPT-Node <dgn@localhost>
Installed-Size: {size}
Depends: python3 (>= {python}~), python3 (<< {next_python}~), libc6, libgcc-s1, libgmp10, libstdc++6, \
zlib1g, passwd, systemd
Suggests: bash-completion
Section: net
Priority: optional
Description: run one language model together on a few ordinary PCs
 dgnd serves some of a model's decoder blocks to its peers, over encrypted
 connections; a prompt that is typed on any of them runs through all. dgnctl
 is its client: chat, run, status.
 .
 This package brings dgnd as a systemd service, with a small model, and with
 ONNX Runtime: a whole node on the CPU, without PyTorch.
"""


class BuildError(Exception):
    """What is wrong, and what to do."""


def run(*command: str | Path, **more: str) -> str:
    """Runs a command, with more environment; what it printed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**environ, "SOURCE_DATE_EPOCH": str(epoch()), **more},
    )  # fmt: skip
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command[:4]))} …: exit {done.returncode}, see above")
    return done.stdout


def epoch() -> int:
    """The time of every file in the package: $SOURCE_DATE_EPOCH, else of the changelog's newest entry."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    (date,) = re.findall(r"^ -- .*>  (.+)$", (HERE / "changelog").read_text(), flags=re.M)[:1]
    return int(time.mktime(time.strptime(date, "%a, %d %b %Y %H:%M:%S +0000"))) - time.timezone


def version() -> str:
    """Of the package, from the changelog: the project's and a revision."""
    found = re.match(r"dgn \(([^)]+)\)", (HERE / "changelog").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if not found or found[1].rpartition("-")[0] != project:
        raise BuildError(f"packaging/deb/changelog does not begin with pyproject.toml's: dgn ({project}-1)")
    return found[1]


def check_tools() -> None:
    """Raises BuildError: what is missing, by name."""
    missing = [package for tool, package in NEEDED.items() if shutil.which(tool) is None]
    if not PYTHON.exists():
        missing.append("python3")
    if missing:
        names = " ".join(missing)
        raise BuildError(f"this system lacks: {names}; as root, run:  apt-get install -y {names}")


def make_environment() -> Path:
    """The virtual environment; its site-packages."""
    home = TREE / LIB
    python = run(PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    (home / "bin").mkdir(parents=True)
    (home / "bin/python3").symlink_to(f"/usr/bin/python{python}")
    (home / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    site = home / f"lib/python{python}/site-packages"
    site.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--python"]
    pins = ["--constraint", "constraints.txt", "--build-constraint", "constraints.txt"]
    # A cache of its own: in the user's there may be extension modules that were compiled otherwise.
    pins += ["--cache-dir", str(BUILD / "pip")]
    run(*pip, home / "bin/python3", "install", "-q", "--no-compile", *pins, ".[onnx,http]", **REPRODUCIBLE)
    shutil.rmtree(site / "trio-stubs", ignore_errors=True)  # types alone
    for path in (home / "bin").iterdir():  # scripts that name this place; ours are in /usr/bin
        if path.name != "python3":
            path.unlink()
    for info in site.glob("*.dist-info"):  # pip's notes of this installation
        for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
            (info / name).unlink(missing_ok=True)
    for name in ("include", "share", "lib64"):
        path = home / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    return site


def compile_sources(site: Path) -> None:
    """Bytecode, which the user of the service can't write; it is not compared with the time of its source."""
    run(
        TREE / LIB / "bin/python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash",
        "-s", TREE, "-p", "/", site, PYTHONHASHSEED="0",
    )  # fmt: skip


def place(path: str, text: str | bytes, mode: int = 0o644) -> None:
    """Writes a file of the package."""
    target = TREE / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.encode() if isinstance(text, str) else text)
    target.chmod(mode)


def zipped(text: str) -> bytes:
    """As documentation is kept."""
    return gzip.compress(text.encode(), 9, mtime=0)


def make_system_files(site: Path) -> None:
    """Commands, units, configuration, documentation."""
    for name, module in (("dgnd", "dgnd"), ("dgnctl", "dgnctl")):
        place(f"usr/bin/{name}", f'#!/bin/sh\nexec /usr/lib/dgn/bin/python3 -I -m {module} "$@"\n', 0o755)
    units = ROOT / "packaging/systemd"
    for name in ("dgnd.service", "dgnd.socket"):
        place(f"usr/lib/systemd/system/{name}", (units / name).read_text())
    place("usr/lib/sysusers.d/dgn.conf", (units / "dgn.sysusers").read_text())
    place("usr/lib/tmpfiles.d/dgn.conf", (units / "dgn.tmpfiles").read_text())
    place("etc/dgn/dgn.toml", (ROOT / "dgn.toml.example").read_text())
    doc = "usr/share/doc/dgn"
    place(f"{doc}/changelog.gz", zipped((ROOT / "CHANGELOG.md").read_text()))
    place(f"{doc}/changelog.Debian.gz", zipped((HERE / "changelog").read_text()))
    place(f"{doc}/copyright", copyright_text(site))
    place(f"{doc}/examples/cuda.conf", (units / "cuda.conf").read_text())
    place(f"{doc}/examples/grafana.json", (ROOT / "packaging/grafana/dgn.json").read_text())
    place("usr/share/lintian/overrides/dgn", (HERE / "lintian-overrides").read_text())
    manuals = [
        ROOT / "packaging/manuals.py",
        TREE,
        version(),
        time.strftime("%Y-%m-%d", time.gmtime(epoch())),
    ]
    run(TREE / LIB / "bin/python3", "-B", *manuals)


def copyright_text(site: Path) -> str:
    """Ours, and what each library says about itself."""
    text = (HERE / "copyright").read_text()
    for each in sorted(distributions(path=[str(site)]), key=lambda each: each.metadata["Name"].lower()):
        name = each.metadata["Name"]
        if name != "distributed-gpt-node":
            licence = licence_of(each)
            text += f" {name} {each.version}: {licence}\n"
    return text


def licence_of(library: Distribution) -> str:
    """In a few words, from its metadata."""
    meta = library.metadata
    told = meta.get("License-Expression") or meta.get("License") or ""
    if not told or "\n" in told or len(told) > 80:
        classes = [line for line in meta.get_all("Classifier") or [] if line.startswith("License")]
        told = (
            ", ".join(line.rpartition(" :: ")[2] for line in classes)
            or told.strip().partition("\n")[0]
            or "see its directory"
        )
    return " ".join(told.split())


def files() -> Iterator[Path]:
    """All of the package but its control directory."""
    yield from (path for path in sorted(TREE.rglob("*")) if path.relative_to(TREE).parts[0] != "DEBIAN")


def make_control(site: Path) -> None:
    """The control directory: what dpkg reads."""
    major, minor = re.findall(r"python(\d+)\.(\d+)$", site.parent.name)[0]
    for path in files():
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.parent == TREE / "usr/bin" else 0o644)
    size = sum(path.lstat().st_size if path.is_file() else 1024 for path in files()) // 1024
    fields = {
        "version": version(), "arch": run("dpkg", "--print-architecture").strip(), "size": size,
        "python": f"{major}.{minor}", "next_python": f"{major}.{int(minor) + 1}",
    }  # fmt: skip
    place("DEBIAN/control", CONTROL.format(**fields))
    place("DEBIAN/conffiles", "/etc/dgn/dgn.toml\n")
    for name in ("postinst", "prerm", "postrm"):
        place(f"DEBIAN/{name}", (HERE / name).read_text(), 0o755)
    for path in (TREE / "DEBIAN", *(folder for folder in TREE.rglob("*") if folder.is_dir())):
        path.chmod(0o755)


def make_sums() -> None:
    """DEBIAN/md5sums: what `dpkg --verify` compares with."""
    lines = [
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(TREE)}\n"
        for path in files()
        if path.is_file() and not path.is_symlink() and path.relative_to(TREE).parts[0] != "etc"
    ]
    place("DEBIAN/md5sums", "".join(lines))


def main() -> int:
    """Makes the package; the exit code."""
    try:
        check_tools()
        shutil.rmtree(TREE, ignore_errors=True)
        TREE.mkdir(parents=True)
        TREE.chmod(0o755)
        print("dgn: the virtual environment, with ONNX Runtime and its libraries", file=sys.stderr)
        site = make_environment()
        compile_sources(site)
        make_system_files(site)
        make_control(site)
        make_sums()
        (ROOT / "dist").mkdir(exist_ok=True)
        arch = run("dpkg", "--print-architecture").strip()
        made = ROOT / "dist" / f"dgn_{version()}_{arch}.deb"
        print("dgn: packing", file=sys.stderr)
        # zstd, which Debian 12 and newer read: a tenth of the time of xz, here and where it is installed.
        run("dpkg-deb", "--root-owner-group", "-Zzstd", "-z9", "--threads-max=2", "--build", TREE, made)
        print(made.relative_to(ROOT))
    except BuildError as error:
        print(f"dgn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
