"""llama.cpp in a process of its own, driven by lines of JSON: loads a GGUF, prefills, decodes, greedily.

    python llamacpp_side.py GGUF THREADS SEQUENCES CONTEXT

CONTEXT is positions for each sequence. One request a line: ["prefill", sequence, ids], ["rewind", sequence,
length], ["decode", [sequences], count]; the answer is a number of seconds, or for "tokens" the ids. Uses the
low-level API of llama-cpp-python; knows nothing of dgn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import llama_cpp
import numpy as np


class Llama:
    """A model and one context, with default settings but for sizes and threads."""

    def __init__(self, path: str, threads: int, sequences: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, None)
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp can't load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-context // 256) * 256
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit("llama.cpp can't make a context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.tokens: dict[int, list[int]] = {index: [] for index in range(sequences)}

    def prefill(self, sequence: int, ids: Sequence[int]) -> float:
        """Seconds to the first token, of an empty sequence."""
        self.rewind(sequence, 0)
        began = time.perf_counter()
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            rows = [(sequence, start + i, token) for i, token in enumerate(part)]
            self._run(rows, last_only=True)
        self.tokens[sequence] = [*ids, self._pick(self._batch.n_tokens - 1)]
        return time.perf_counter() - began

    def rewind(self, sequence: int, length: int) -> None:
        """Forgets ids from `length` on; the last one left is yet to be run."""
        del self.tokens[sequence][length:]
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, max(0, length - 1), -1)

    def decode(self, sequences: Sequence[int], count: int) -> float:
        """Seconds for `count` tokens of each sequence, side by side."""
        began = time.perf_counter()
        for _ in range(count):
            rows = [(s, len(self.tokens[s]) - 1, self.tokens[s][-1]) for s in sequences]
            self._run(rows, last_only=False)
            for row, sequence in enumerate(sequences):
                self.tokens[sequence].append(self._pick(row))
        return time.perf_counter() - began

    def _run(self, rows: Sequence[tuple[int, int, int]], last_only: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, token) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = not last_only or i == len(rows) - 1
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")

    def _pick(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


def main() -> None:
    """Answers requests until stdin ends; the first line says that it has loaded."""
    path, threads, sequences, context = sys.argv[1], *map(int, sys.argv[2:5])
    llama = Llama(path, threads, sequences, context)
    print(json.dumps("loaded"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer = llama.tokens[arguments[0]] if name == "tokens" else getattr(llama, name)(*arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
