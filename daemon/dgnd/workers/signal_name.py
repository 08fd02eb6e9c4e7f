"""How a signal is called. Knows nothing of processes."""

from __future__ import annotations

import signal


def signal_name(number: int) -> str:
    """ "SIGSEGV", or "signal 35" for one that has no name here, such as a real-time signal."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
