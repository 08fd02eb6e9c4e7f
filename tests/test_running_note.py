"""Whose steps ran, as read after the worker's death."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dgnd.wire.messages import HopKey
from dgnd.workers.running_note import RunningNote

KEYS = [HopKey("origin", "session", 1), HopKey("origin", "another", 2**40)]
CHILD = """
import os, signal, sys
from dgnd.workers.running_note import RunningNote
from dgnd.wire.messages import HopKey
note = RunningNote(int(sys.argv[1]))
note.write([HopKey("x", "y", 1)] * 3)
note.write([HopKey("origin", "session", 1), HopKey("origin", "another", 2**40)])
if len(sys.argv) > 2:
    note.write(())
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("arguments", "keys"), [((), KEYS), (("between batches",), [])])
def test_it_outlives_the_process_that_wrote_it(arguments: tuple[str, ...], keys: list[HopKey]) -> None:
    note = RunningNote()
    assert note.read() == frozenset()
    command = [sys.executable, "-c", CHILD, str(note.fd), *arguments]
    assert subprocess.run(command, pass_fds=[note.fd], check=False).returncode == -9
    assert note.read() == frozenset(keys)
    note.close()


JUNK = [b"\xff" * 64, (3).to_bytes(4, "little") + b"\xc1" * 3, b"\x02\0\0\0\x91\x01"]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_nobody(junk: bytes) -> None:
    note = RunningNote()
    os.pwrite(note.fd, junk, 0)
    assert note.read() == frozenset()
    note.close()


def test_more_than_fits_is_nobody() -> None:
    note = RunningNote()
    note.write(KEYS)
    note.write([HopKey("o" * 60, "s" * 1000, hop) for hop in range(100)])
    assert note.read() == frozenset()
    note.close()
