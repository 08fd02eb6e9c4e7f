"""The package itself: made again elsewhere it is the same file, and lintian has nothing to say that is not
explained. `make test-systemd` runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deb_kit import ROOT, WHY_SKIPPED, copy_of_the_checkout, made_package

pytestmark = [
    pytest.mark.skipif(not os.environ.get("DGN_TEST_SYSTEMD"), reason=WHY_SKIPPED),
    pytest.mark.timeout(1800),
]


@pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian is not installed")
def test_lintian_has_nothing_to_say() -> None:
    command = ["lintian", "--fail-on", "error,warning", "--allow-root", made_package()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_every_override_is_used_and_explained() -> None:
    lines = (ROOT / "packaging/deb/lintian-overrides").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all(line.startswith(("# ", "dgn: ")) for line in lines)


def test_the_same_sources_give_the_same_package(tmp_path: Path) -> None:
    copy = copy_of_the_checkout(tmp_path / "elsewhere")
    command = [sys.executable, copy / "packaging/deb/build.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = copy / "dist" / made_package().name
    assert made.read_bytes() == made_package().read_bytes()
