"""The sessions of a span: one for all of it, until somebody wants a part alone.

A part can't be run out of a session, and a second session for it would hold its weights twice. So the span is
cut where parts begin and end, and its sessions are made anew around the cuts. A span whose weights lie in no
mapped file is cut too: ONNX Runtime packs all of a session's weights before any can be given back, and both
would be there of the whole span. Where it is cut makes no difference to what is computed. Knows nothing of
sequences.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from dgn_backends.api import LoadRequest
from dgn_backends.onnx_batch import cut, grid
from dgn_backends.onnx_block import add_block, add_end, add_head, declare_inputs, padded_head_dim
from dgn_backends.onnx_device import Device
from dgn_backends.onnx_graph import GraphBuilder
from dgn_backends.onnx_kv import SlotPool
from dgn_backends.onnx_load import SpanFiles
from dgn_backends.onnx_release import comes_back, release
from dgn_backends.onnx_rope import RopeTables
from dgn_backends.onnx_session import Place, Segment, SpanSession, session_options
from dgn_backends.quant import Quantised, dequantise
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor

F32 = npt.NDArray[np.float32]

#: Enough for every kernel that weights are packed for.
_PROBE_ROWS = 17
#: Weights of so many bytes may always be there twice for a while: a small model is not cut.
_SMALL_BYTES = 1 << 26


class Segments:
    """The loaded weights of the request's span, as sessions in the order of computation, and the embedding,
    whose rows are picked straight from its mapped file."""

    def __init__(self, request: LoadRequest, files: SpanFiles, device: Device) -> None:
        """Raises MemoryError, and BackendUnavailable where the device can't do what is needed."""
        self.span = request.span
        self.config = request.config
        self.device = device
        self.weights_bytes = 0
        self._threads = request.threads
        self._files = files
        self._embedding = files.embedding() if request.span.embed else None
        # Places of the span's units in a line: block i at i, the head behind the last block.
        self._line = range(request.span.start, request.span.stop + request.span.head)
        self._cuts: set[int] = set()
        self._sessions: list[SpanSession] = []
        self._make()
        if self._embedding is not None and not (request.span.head and request.config.tied_head):
            held = self._embedding
            self.weights_bytes += held.n_bytes if isinstance(held, Quantised) else len(held.data)

    def separate(self, part: Span) -> None:
        """Makes `part` a run of sessions of its own, unless it is one already."""
        needed = {part.start, part.stop + part.head} & set(self._line[1:])
        if needed <= self._cuts:
            return
        self._cuts |= needed
        self._make()

    def sessions(self, part: Span) -> list[SpanSession]:
        """The sessions of a part that was separated."""
        first, last = part.start, part.stop + part.head
        return [
            session
            for session in self._sessions
            if first <= session.segment.start and session.segment.stop + session.segment.has_head <= last
        ]

    def embed(self, ids: npt.NDArray[np.integer]) -> F32:
        """Hidden states [n, hidden_size] of token ids [n]."""
        assert self._embedding is not None
        if isinstance(self._embedding, Quantised):
            return dequantise(self._embedding.rows(ids), self.config.block.hidden_size)
        return Tensor.from_numpy(self._embedding.to_numpy()[ids], self._embedding.dtype).to_f32()

    def _make(self) -> None:
        self._sessions.clear()  # frees the weights before they are loaded again
        weights_bytes = 0
        borders = sorted({self._line.start, *self._cuts, self._line.stop})
        for between in itertools.pairwise(borders):
            for start, stop in itertools.pairwise(self._pieces(*between)):
                blocks = range(start, min(stop, self.span.stop))
                session, n_bytes = self._session(blocks, has_head=stop > self.span.stop)
                self._sessions.append(session)
                weights_bytes += n_bytes
        if not self.weights_bytes:
            self.weights_bytes = weights_bytes

    def _pieces(self, start: int, stop: int) -> list[int]:
        """Where sessions between two cuts begin and end: what is in memory twice while one is made is no more
        than the largest unit, or little."""
        head = self.span.stop
        made = [
            self._files.made_bytes(Span(min(unit, head), min(unit + 1, head), embed=False, head=unit == head))
            for unit in range(start, stop)
        ]
        allowed = max(_SMALL_BYTES, *made)
        borders, held = [start], 0
        for unit, n_bytes in zip(range(start, stop), made, strict=True):
            if held and held + n_bytes > allowed and not self.device.is_apart:
                borders.append(unit)
                held = 0
            held += n_bytes
        return [*borders, stop]

    def _session(self, blocks: range, has_head: bool, *, keep: bool = False) -> tuple[SpanSession, int]:
        """The session of some blocks and perhaps the head, and the bytes of its weights. Unless `keep`, the
        weights of which it has made its own copy are given back."""
        graph = GraphBuilder(self.device.numbers)
        config = self.config
        x = declare_inputs(graph, config.block, bool(blocks), has_head, is_inner=blocks.start > 0)
        for number in blocks:
            x = add_block(graph, number, config.blocks[number], self._files.block(number), x)
        if has_head:
            norm, head = self._files.final_norm(), self._files.head()
            add_head(graph, config.block, norm, head, config.vocab_size, x)
        else:
            add_end(graph, config.block, x)
        kv_blocks = range(blocks.start - self.span.start, blocks.stop - self.span.start)
        segment = Segment(blocks.start, blocks.stop, has_head, kv_blocks)
        n_bytes = sum(array.nbytes for array in graph.external_weights().values())
        session = SpanSession(segment, graph, session_options(self._threads), self.device)
        if self.device.is_apart:
            # It has copies of all of them. What was made for it stays with us, what is mapped need not.
            release(array for array in graph.weights.values() if not array.flags.writeable)
        elif not keep:
            release(filter(comes_back, graph.packed))
            made = [array for array in graph.packed if not comes_back(array)]
            if made:
                before = self._probe(session)
                if release(made) and not np.array_equal(before, self._probe(session)):
                    return self._session(blocks, has_head, keep=True)
        return session, n_bytes

    def _probe(self, session: SpanSession) -> F32:
        """What a session computes for some rows in slots of their own."""
        block = self.config.block
        random = np.random.default_rng(0)
        hidden = random.standard_normal((_PROBE_ROWS, block.hidden_size)).astype(np.float32)
        n_blocks = self.span.stop - self.span.start
        pool = SlotPool(n_blocks, block.n_kv_heads, padded_head_dim(block.head_dim), _PROBE_ROWS)
        place = Place(pool, RopeTables(block.rope, block.head_dim).table(_PROBE_ROWS))
        layout = grid(cut(0, pool.take(), 0, _PROBE_ROWS))
        return session.run(hidden, layout, place, range(_PROBE_ROWS))
