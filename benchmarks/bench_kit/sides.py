"""The two sides of a comparison behind one interface: a worker of dgn, and llama.cpp in its own process.

Each has sequences 0 to N-1; every method returns seconds. Knows nothing of rounds or figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dgnd.bench.direct_worker import DirectSession, DirectWorker, decode
from dgnd.bench.measure import start_worker
from dgnd.bench.memory import memory_of
from dgnd.bench.plan import Plan


class Side(Protocol):
    """One that is measured."""

    name: str
    load_s: float

    def prefill(self, sequence: int, ids: Sequence[int]) -> float:
        """Runs a prompt through an empty sequence, up to its first token."""

    def rewind(self, length: int) -> None:
        """Every sequence that has been used goes back to its first `length` ids."""

    def decode(self, sequences: Sequence[int], count: int) -> float:
        """Makes `count` more tokens of each sequence, side by side."""

    def memory(self) -> dict[str, float]:
        """MB: `resident`, `anonymous`, and `weights` where it says."""

    def close(self) -> None:
        """Ends its process."""


class OurSide:
    """A worker, driven as dgnd drives it."""

    def __init__(self, plan: Plan) -> None:
        load = plan.load
        self.name = f"{load.backend} {load.quant if load.quant != 'none' else load.dtype}"
        self._context = plan.prompt_tokens + plan.tokens
        self._worker: DirectWorker = start_worker(plan)
        self.load_s = self._worker.load_s
        self._sessions: dict[int, DirectSession] = {}

    def prefill(self, sequence: int, ids: Sequence[int]) -> float:
        """See Side."""
        old = self._sessions.pop(sequence, None)
        if old is not None:
            old.__exit__(None, None, None)
        self._sessions[sequence] = self._worker.open(self._context)
        return self._sessions[sequence].prefill(ids)

    def rewind(self, length: int) -> None:
        """See Side."""
        for session in self._sessions.values():
            session.rewind(length)

    def decode(self, sequences: Sequence[int], count: int) -> float:
        """See Side."""
        return decode([self._sessions[sequence] for sequence in sequences], count)

    def tokens(self, sequence: int) -> list[int]:
        """All ids of a sequence."""
        return self._sessions[sequence].tokens

    def memory(self) -> dict[str, float]:
        """See Side."""
        weights = self._worker.loaded.weights_bytes / 1e6
        return {**_memory(self._worker.process.pid), "weights_mb": weights}

    def close(self) -> None:
        """See Side."""
        self._worker.close()


class LlamaSide:
    """llama.cpp with one GGUF."""

    def __init__(self, name: str, path: Path, threads: int, sequences: int, context: int) -> None:
        self.name = name
        self._path = path
        script = Path(__file__).parent / "llamacpp_side.py"
        numbers = map(str, (threads, sequences, context))
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(path), *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._used: set[int] = set()
        self._answer()
        self.load_s = time.perf_counter() - began  # from the start of the process, as ours

    def prefill(self, sequence: int, ids: Sequence[int]) -> float:
        """See Side."""
        self._used.add(sequence)
        return float(self._ask("prefill", sequence, list(ids)))

    def rewind(self, length: int) -> None:
        """See Side."""
        for sequence in self._used:
            self._ask("rewind", sequence, length)

    def decode(self, sequences: Sequence[int], count: int) -> float:
        """See Side."""
        return float(self._ask("decode", list(sequences), count))

    def tokens(self, sequence: int) -> list[int]:
        """All ids of a sequence."""
        ids: list[int] = self._ask("tokens", sequence)
        return ids

    def memory(self) -> dict[str, float]:
        """See Side; the weights are the file's size, which is mapped."""
        return {**_memory(self._process.pid), "weights_mb": self._path.stat().st_size / 1e6}

    def close(self) -> None:
        """See Side."""
        self._process.communicate()  # closes stdin, which ends it

    def _ask(self, *request: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with exit code {self._process.wait()}")
        return json.loads(line)


def _memory(pid: int) -> dict[str, float]:
    memory = memory_of(pid)
    return {
        "resident_mb": memory.rss / 1e6,
        "anonymous_mb": memory.anonymous / 1e6,
        "peak_mb": memory.peak_rss / 1e6,
    }
