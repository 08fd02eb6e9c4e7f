"""Processes that dgnd starts take no module from the directory that it was started in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dgnctl.system.places import Places
from dgnctl.system.units import files
from dgnd.workers.launch import worker_command


@pytest.mark.parametrize("module", ["nt", "json", "dgnd"])
def test_a_file_of_the_current_directory_is_no_module(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("open('ran', 'w')")
    subprocess.run(worker_command(0, 0), cwd=tmp_path, check=False, capture_output=True, timeout=120)
    assert not (tmp_path / "ran").exists()


def test_the_service_takes_none_from_the_home_directory() -> None:
    texts = files(Places.of_user(Path("/")), "/usr/bin/python3", home=False)
    service = next(text for path, text in texts.items() if path.name == "dgnd.service")
    assert "ExecStart=/usr/bin/python3 -P -m dgnd " in service
