"""What holds for every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from echo_service import EchoDaemon

# Two cores are shared by the tests, their daemons and their workers: one thread each is the fastest for all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing of the caller's own daemon, nor of a make around us, may leak into a test.
for name in ("DGN_SOCKET", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)
# A shell starts background jobs with SIGINT ignored, and the processes of tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A deadline per example measures the machine and not the code.
settings.register_profile("dgn", deadline=None, print_blob=True)
settings.load_profile("dgn")


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EchoDaemon]:
    """The real control server over a service that echoes, where dgnctl looks for it."""
    from echo_service import EchoDaemon  # most tests need none of what it imports

    path = tmp_path / "s.sock"
    monkeypatch.setenv("DGN_SOCKET", str(path))
    with EchoDaemon(path) as running:
        yield running


#: Begun first, the longest at the head: a worker that takes one of them last is waited for by all others.
LONGEST = (
    "test_failover",
    "test_mixed_backends",
    "test_churn",
    "test_full_pipes",
    "test_drain",
    "test_faults",
    "test_plugin_example",
    "test_autospan",
    "test_auto",
    "test_gapfill",
    "test_infra_demo",
    "test_hostile_peers",
    "test_torch_backend",
    "test_onnx_backend",
    "test_demo_model",
    "test_user_run",
    "test_user_peers",
    "test_two_pcs",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first; else all stays as it is."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(Path(item.path).stem, len(place)))
