"""`python -m dgnd.bench REQUEST PARENT_PID`: started by `dgnctl bench`; prints `BenchLine`s.

Ends when it is told to (SIGTERM, SIGINT) and when its parent does, and its worker with it.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import msgspec

from dgn_backends.errors import DgnError
from dgnd.bench.measure import measure
from dgnd.control.bench import BenchFailure, BenchLine, BenchProgress, BenchRequest
from dgnd.worker.process import die_with_parent


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds: the worker ends, the temporary folder goes


def _print(line: BenchLine) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Runs one request; the exit code is that of the error, if any."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _leave)
    die_with_parent(int(argv[1]), signal.SIGTERM)
    request = msgspec.json.decode(argv[0], type=BenchRequest)
    try:
        result = measure(request, lambda what: _print(BenchLine(progress=BenchProgress(what))))
    except DgnError as error:
        _print(BenchLine(failure=BenchFailure(error.kind, error.message)))
        return error.exit_code
    _print(BenchLine(result=result))
    return 0


sys.exit(main(sys.argv[1:]))
