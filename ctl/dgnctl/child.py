"""A child that works for a command and writes its findings to its stdout. Knows nothing of what it does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dgnctl.terminal import ending_signals


def module_command(module: str, *arguments: str) -> list[str]:
    """The command `python -m module arguments…`. It takes no module from the current directory (`-P`), where
    anybody's file json.py may lie."""
    return [sys.executable, "-P", "-m", module, *arguments]


@contextmanager
def child_running(module: str, *arguments: str, patience_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m module arguments… PID`, where PID is this process, whose end the child is to notice. Told to
    end, killed after `patience_s`, and waited for, whatever happens here."""
    command = module_command(module, *arguments, str(os.getpid()))
    # In a session of its own a Ctrl-C doesn't reach it at an awkward moment of its start.
    with (
        ending_signals(),
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        ) as child,
    ):
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
            try:
                child.wait(patience_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
