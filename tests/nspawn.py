"""A Debian with systemd as its process 1, in systemd-nspawn: made once, booted on overlays, entered.

Needs root. Knows nothing of what is installed in it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

SUITE = "bookworm"  # the oldest Debian with Python 3.11
#: What the package depends on, as a machine without a network can't fetch it, and what tests look with.
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "libnss-systemd", "init-system-helpers", "python3", "libgmp10",
    "libstdc++6", "iproute2", "procps",
)  # fmt: skip
CACHE = Path(os.environ.get("DGN_TEST_SYSTEMD_CACHE") or "/var/cache/dgn-test-systemd")
BOOT_S, STOP_S = 90.0, 60.0
_TOOLS = {
    "systemd-nspawn": "systemd-container", "mmdebstrap": "mmdebstrap", "nsenter": "util-linux",
    "mount": "mount",
}  # fmt: skip
_SIGRTMIN = 34  # of the C library, as systemd counts
_PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"


def why_not() -> str:
    """Why nothing can be booted here, by name; empty where it can."""
    if os.geteuid() != 0:
        return "systemd-nspawn needs root"
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    if missing:
        return f"not installed: {' '.join(missing)}"
    overlays = "overlay" in Path("/proc/filesystems").read_text()
    return "" if overlays else "this kernel has no overlay file systems"


def base_system() -> Path:
    """The root file system, which is never changed; made when it is missing, which takes a minute or two."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = f"{SUITE} {' '.join(PACKAGES)}\n"
        rootfs, stamp = CACHE / "rootfs", CACHE / "stamp"
        if not stamp.exists() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(rootfs, ignore_errors=True)
            command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
            subprocess.run([*command, SUITE, rootfs], check=True)
            # Nobody configures a network there, so nothing is to wait for one.
            (rootfs / "etc/systemd/system/systemd-networkd-wait-online.service").symlink_to("/dev/null")
            stamp.write_text(wanted)
    return rootfs


class Machine:
    """One machine on layers of file systems, the uppermost its own. A context manager: boots, stops, and
    leaves nothing of it.

    `namespace`: the network namespace in /run/netns that it is in; without one it has loopback alone.
    """

    def __init__(self, name: str, directory: Path, *layers: Path, namespace: str = "") -> None:
        self.name = name
        self.upper = directory / name / "upper"
        self.root = directory / name / "root"
        self._work = directory / name / "work"
        self._layers = layers
        there = f"--network-namespace-path=/run/netns/{namespace}"
        self._network = there if namespace else "--private-network"
        self._console = directory / name / "console"
        self.leader = 0  #: its process 1, seen from here; 0: it does not run

    def __enter__(self) -> Machine:
        self.mount()
        try:
            self.boot()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.power_off()
        self.unmount()
        shutil.rmtree(self.upper.parent)

    def mount(self) -> None:
        """Its file system, in `root`."""
        for path in (self.upper, self.root, self._work):
            path.mkdir(parents=True, exist_ok=True)
        lower = ":".join(map(str, self._layers))
        options = f"lowerdir={lower},upperdir={self.upper},workdir={self._work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, self.root], check=True)
        (self.root / "etc/machine-id").write_text("uninitialized\n")
        (self.root / "etc/hostname").write_text(f"{self.name}\n")

    def unmount(self) -> None:
        """Takes it away; `upper` keeps what was written."""
        subprocess.run(["umount", "--lazy", self.root], check=False)

    def boot(self) -> None:
        """Starts process 1, in cgroups of its own, and waits until it has started everything."""
        self._join = [path / f"dgn-{os.getpid()}-{self.name}" for path in _hierarchies()]
        for path in self._join:
            path.mkdir(exist_ok=True)
            if path.parent.name == "cpuset":
                for name in ("cpuset.cpus", "cpuset.mems"):
                    (path / name).write_text((path.parent / name).read_text())
        inside = 'for group in $GROUPS_OF_DGN; do echo $$ >"$group/cgroup.procs"; done; exec "$@"'
        with self._console.open("ab") as console:
            self._nspawn = subprocess.Popen(
                [
                    "sh", "-c", inside, "sh", "systemd-nspawn", "--quiet", "--boot", "--directory", self.root,
                    "--machine", self.name, "--register=no", "--keep-unit", "--link-journal=no",
                    "--console=read-only", "--resolv-conf=off", "--timezone=off", self._network,
                ],
                env={**os.environ, "GROUPS_OF_DGN": " ".join(map(str, self._join))},
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            )  # fmt: skip
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        until = time.monotonic() + BOOT_S
        while True:
            assert self._nspawn.poll() is None, f"{self.name} did not boot:\n{self._console.read_text()}"
            self.leader = int((children.read_text().split() or ["0"])[0])
            if self.leader and self.run("systemctl", "is-system-running", check=False).stdout.strip() in (
                "running", "degraded",
            ):  # fmt: skip
                return
            assert time.monotonic() < until, f"{self.name} did not boot:\n{self._console.read_text()}"
            time.sleep(0.2)

    def power_off(self) -> None:
        """Stops it as a button would, and takes its cgroups away."""
        if self.leader:
            try:
                os.kill(self.leader, _SIGRTMIN + 4)
            except ProcessLookupError:
                pass
            self.leader = 0
            try:
                self._nspawn.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._nspawn.send_signal(signal.SIGKILL)
                self._nspawn.wait()
        for path in self._join:
            for inner in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
                _rmdir(inner)
            _rmdir(path)

    def run(
        self, *command: object, user: str = "root", check: bool = True, timeout: float = 180.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in it."""
        done = subprocess.run(
            self.inside(*command, user=user),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if check and done.returncode:
            said = f"exit {done.returncode}\n{done.stdout}{done.stderr}"
            raise AssertionError(f"{self.name}: {command}: {said}")
        return done

    def inside(self, *command: object, user: str = "root") -> list[str]:
        """The command line, seen from here, of a command in it."""
        enter = ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--"]
        clean = ["env", "-i", _PATH, "TERM=dumb", "LANG=C.UTF-8", "HOME=/tmp"]
        become = [] if user == "root" else ["runuser", "-u", user, "--"]
        return [*enter, *clean, *become, *map(str, command)]

    def property(self, name: str, unit: str = "dgnd.service") -> str:
        """One of systemd's properties of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, unit: str = "dgnd.service") -> str:
        """The lines of a unit, with their fields."""
        return self.run("journalctl", "--no-pager", "-o", "short-monotonic", "-u", unit).stdout

    def wait_for(self, condition: object, what: str, timeout: float = 120.0) -> None:
        """Waits until `condition()` is true."""
        until = time.monotonic() + timeout
        while not condition():  # type: ignore[operator]  # a callable
            assert time.monotonic() < until, f"{self.name} took too long: {what}\n{self.journal()}"
            time.sleep(0.2)


def _hierarchies() -> list[Path]:
    """Where each of the kernel's cgroup hierarchies is mounted, at the group that this process is in."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(where) for _, where, kind, *_ in mounts if kind in ("cgroup", "cgroup2")]


def _rmdir(path: Path) -> None:
    for _ in range(50):  # a group is busy for a moment after its last process
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
