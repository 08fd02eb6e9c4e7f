"""`make demo` on a machine that has only make: a minimal Debian root filesystem. `make test-rootfs` runs it.

Needs root, mmdebstrap and the network; takes some minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = "bookworm"  # the oldest Debian with Python 3.11
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("DGN_TEST_ROOTFS"), reason="minutes long: `make test-rootfs` runs it"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="making a root filesystem needs root"),
    pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed"),
]


@pytest.fixture(scope="module")
def rootfs() -> Iterator[Path]:
    """A minimal Debian with make and a copy of the last commit in /src."""
    directory = Path(tempfile.mkdtemp(prefix="dgn-rootfs-", dir="/var/tmp"))
    try:
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", "--include=make", SUITE, directory], check=True
        )
        (directory / "src").mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", directory / "src"], input=archive, check=True)
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", directory / "etc" / name)
        if CA_BUNDLE.exists():  # the network may have an authority of its own, which only this machine knows
            shutil.copy(CA_BUNDLE, directory / "etc/host-ca.crt")
        yield directory
    finally:
        shutil.rmtree(directory)


def run(rootfs: Path, *command: str, user: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command in the root filesystem, in processes of its own that end with it."""
    kept = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "http_proxy", "https_proxy", "no_proxy")
    environ = {name: os.environ[name] for name in kept if name in os.environ}
    environ |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root" if user == 0 else "/tmp"}
    if (rootfs / "etc/host-ca.crt").exists():
        environ["PIP_CERT"] = "/etc/host-ca.crt"
    inside = f'mount --bind /dev "{rootfs}/dev" && exec chroot --userspec={user}:{user} "{rootfs}" "$@"'
    spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={rootfs}/proc"]
    return subprocess.run(
        [*spaces, "sh", "-c", inside, "sh", *command],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )


@pytest.mark.timeout(3600)
def test_the_demo_answers_on_a_machine_that_has_only_make(rootfs: Path) -> None:
    line = "apt-get install -y python3-venv python3-dev gcc make libgmp-dev"
    refused = run(rootfs, "make", "-C", "/src", "-s", "demo", "PROMPT=Hello", user=65534)
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert line in refused.stderr

    first = run(rootfs, "make", "-C", "/src", "-s", "demo", "PROMPT=How do I connect a peer?")
    assert first.returncode == 0, first.stderr[-4000:]
    assert (
        "installing what is missing on this system: python3-venv python3-dev gcc libgmp-dev" in first.stderr
    )
    assert first.stdout.strip()
    assert "torch" not in {path.name for path in (rootfs / "src/.venv").glob("lib/python3*/site-packages/*")}

    second = run(rootfs, "make", "-C", "/src", "-s", "demo", "PROMPT=How do I connect a peer?")
    assert second.returncode == 0, second.stderr[-4000:]
    assert "installing" not in second.stderr
    print(f"\nfirst answer: {first.stdout!r}\nsecond answer: {second.stdout!r}")
