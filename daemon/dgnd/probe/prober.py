"""What is installed, and whether it works: one bounded child for each entry.

A child imports one backend and no other, so what is wrong with it is its own. Nothing is remembered: the
answer is about now. Knows nothing of how a backend is looked at.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass, field
from typing import Final

import trio

from dgn_backends.errors import BackendUnavailable
from dgn_backends.registry import BackendEntry, choose_backend, claimed_by, duplicates, list_backends
from dgnd.children import module_command
from dgnd.control.api import BackendInfo
from dgnd.errors import one_line
from dgnd.probe.report import MAX_REPORT_BYTES, ProbeReport, read_report

#: A backend that takes longer to be imported, at low priority, is called broken.
DEADLINE_S: Final = 60.0
#: What a backend may print meanwhile.
MAX_PRINTED_BYTES: Final = 64 * 1024
#: Children at once.
AT_ONCE: Final = 2

_POLL_S = 0.02
_GRACE_S = 0.5  #: for what the child wrote last, where a process that it left behind holds its pipes
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(slots=True)
class Prober:
    """Looks at every entry when asked; whoever asks meanwhile waits for the turn."""

    deadline_s: float = DEADLINE_S
    _turn: trio.Lock = field(default_factory=trio.Lock)

    async def look(self) -> list[BackendInfo]:
        """All entries, sorted by name. Cancelling ends the children."""
        async with self._turn:
            entries = await trio.to_thread.run_sync(list_backends)
            try:
                auto = choose_backend()
            except BackendUnavailable:
                auto = ""
            twice = duplicates(entries)
            found: dict[BackendEntry, ProbeReport] = {}
            limit = trio.CapacityLimiter(AT_ONCE)

            async def one(entry: BackendEntry) -> None:
                if entry.name in twice:
                    found[entry] = ProbeReport(reason=f"its name {claimed_by(twice[entry.name])}")
                    return
                async with limit:
                    found[entry] = await self._probe(entry)

            async with trio.open_nursery() as nursery:
                for entry in set(entries):
                    nursery.start_soon(one, entry)
        return [
            BackendInfo(
                name=one_line(entry.name),
                distribution=one_line(entry.distribution),
                version=one_line(entry.version),
                state="broken" if found[entry].reason else "usable",
                devices=found[entry].devices,
                reason=one_line(found[entry].reason),
                auto=entry.name == auto,
            )
            for entry in entries
        ]

    async def _probe(self, entry: BackendEntry) -> ProbeReport:
        child = _Child(entry.name)
        try:
            with trio.move_on_after(self.deadline_s) as patience:
                await child.wait()
        finally:
            with trio.CancelScope(shield=True):
                await child.end()
        if patience.cancelled_caught:
            return ProbeReport(reason=f"it gave no answer within {self.deadline_s:.0f} s")
        if child.printed.full:
            return ProbeReport(reason=f"it printed more than {MAX_PRINTED_BYTES // 1024} KiB when imported")
        return child.judged()


class _Sink:
    """What came out of a pipe, up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.full = False
        self._limit = limit

    async def fill(self, fd: int) -> None:
        """Reads to the end or to the limit; closes `fd`."""
        async with trio.lowlevel.FdStream(fd) as stream:
            while not self.full and (data := await stream.receive_some(1 << 16)):
                self.data += data
                self.full = len(self.data) > self._limit


class _Child:
    """The process that imports one backend, a session of its own, so that all it starts ends with it."""

    def __init__(self, name: str) -> None:
        self.printed = _Sink(MAX_PRINTED_BYTES)
        self._said = _Sink(MAX_REPORT_BYTES)
        report, theirs = os.pipe()
        output, their_output = os.pipe()
        try:
            # Not trio's open_process, for the reason given in `dgnd.workers.handle`.
            self._process = subprocess.Popen(
                module_command("dgnd.probe.child", name, str(theirs), str(os.getpid())),
                pass_fds=[theirs],
                stdin=subprocess.DEVNULL,
                stdout=their_output,
                stderr=their_output,
                env={**os.environ, **_ONE_THREAD},
                start_new_session=True,
            )
        except BaseException:
            os.close(report)
            os.close(output)
            raise
        finally:
            os.close(theirs)
            os.close(their_output)
        self._pipes = (report, output)

    async def wait(self) -> None:
        """Until it has ended, or has said too much."""
        report, output = self._pipes
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._said.fill, report)
            nursery.start_soon(self.printed.fill, output)
            # The end of a process gives no event.
            while not (self._has_ended() or self.printed.full or self._said.full):  # noqa: ASYNC110
                await trio.sleep(_POLL_S)
            self._kill()
            nursery.cancel_scope.deadline = trio.current_time() + _GRACE_S

    async def end(self) -> None:
        """It is gone when this returns, and with it all that it has started in its session."""
        self._kill()
        while self._process.poll() is None:  # noqa: ASYNC110 - the end of a process gives no event
            await trio.sleep(_POLL_S)

    def judged(self) -> ProbeReport:
        """What it reported, or how it ended without that."""
        code = self._process.returncode
        report = read_report(bytes(self._said.data))
        if report is not None and (code == 0 or report.reason):
            return report
        if code == 0 and self._said.data:
            return ProbeReport(reason="it wrote to a file that is not its own, the pipe to dgnd")
        words = bytes(self.printed.data).decode(errors="replace").strip().splitlines()
        last = f" ({words[-1].strip()[:300]})" if words else ""
        if code < 0 and -code in set(signal.Signals):
            return ProbeReport(reason=f"it crashed when imported: {signal.Signals(-code).name}{last}")
        return ProbeReport(reason=f"it ended the process when imported, with exit code {code}{last}")

    def _has_ended(self) -> bool:
        """Whether it has, without reaping it: until then its number is no other process's."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # its session is not made yet, or all are gone
                os.killpg(self._process.pid, signal.SIGKILL)
