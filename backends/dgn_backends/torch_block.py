"""One decoder block in torch, for the rows of a whole batch: linear layers see all rows at once, attention
goes sequence by sequence. Knows nothing of files, of opening sequences, or of what lies before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dgn_backends.model import BlockSpec
from dgn_backends.torch_attention import Keys, PageReader, attend, attend_newest
from dgn_backends.torch_kv import TorchKV
from dgn_backends.torch_linear import Linear
from dgn_backends.torch_rows import RowTiles

#: In f16 a product of the MLP is brought below this by a power of two for its row; f16 ends at 65504.
_F16_ROOM = 4096.0


@dataclass(frozen=True, slots=True)
class Tiles:
    """Row counts allowed for linear layers and for attention."""

    linear: RowTiles
    attention: RowTiles


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows `[first, first + count)` of a batch that belong to one sequence, at positions `start`
    onwards."""

    kv: TorchKV
    kv_block_offset: int  #: the model's block that is block 0 of `kv`
    first: int
    count: int
    start: int


@dataclass(frozen=True, slots=True)
class Rows:
    """What all blocks of a batch share: its segments, and cos and sin, f32 [rows, 1, head_dim / 2]."""

    segments: Sequence[Segment]
    cos: torch.Tensor
    sin: torch.Tensor
    tiles: Tiles
    reader: PageReader


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467) in f32; the result has the dtype of
    `x`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates heads `x`, f32 [rows, heads, head_dim]; the two halves hold the coordinates of the pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in f32. The sigmoid is built on `exp`, since torch's own silu rounds the last
    elements of a run otherwise than the rest, so that a row's bits would depend on where it lies."""
    denominator = torch.neg(gate).exp_().add_(1.0)
    return torch.div(gate, denominator).mul_(up)


@dataclass(frozen=True, slots=True, eq=False)
class TorchBlock:
    """The weights of one block; norms in f32, the rest in the model's dtype. q, k, v are one layer, gate
    and up another."""

    spec: BlockSpec
    number: int
    input_norm: torch.Tensor
    qkv: Linear
    out: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights."""
        norms = (self.input_norm, self.post_norm, self.q_norm, self.k_norm)
        layers = (self.qkv, self.out, self.gate_up, self.down)
        return sum(4 * norm.numel() for norm in norms if norm is not None) + sum(
            layer.n_bytes for layer in layers
        )

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Hidden states [rows, hidden_size] in, the same out; keys and values of the segments are
        stored."""
        x = x + self._attention(rms_norm(x, self.input_norm, self.spec.norm_eps), rows)
        normed = rms_norm(x, self.post_norm, self.spec.norm_eps)
        gate, up = self.gate_up(normed, rows.tiles.linear).chunk(2, dim=-1)
        if x.dtype == torch.float16:
            return (x.float() + self._down_f16(gate, up, rows.tiles.linear)).to(x.dtype)
        if x.dtype == torch.float32:
            return x + self.down(gated(gate, up), rows.tiles.linear)
        return x + self.down(torch.nn.functional.silu(gate) * up, rows.tiles.linear)

    def _attention(self, normed: torch.Tensor, rows: Rows) -> torch.Tensor:
        spec = self.spec
        n, heads, kv_heads = normed.shape[0], spec.n_heads, spec.n_kv_heads
        qkv = self.qkv(normed, rows.tiles.linear).view(n, heads + 2 * kv_heads, spec.head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        queries = self._placed(q, self.q_norm, rows) * spec.head_dim**-0.5
        keys = self._placed(k, self.k_norm, rows).to(qkv.dtype)
        newest = queries.to(qkv.dtype)
        mixed = torch.zeros((n, heads * spec.head_dim), dtype=qkv.dtype, device=qkv.device)
        for segment in rows.segments:
            here = slice(segment.first, segment.first + segment.count)
            block = self.number - segment.kv_block_offset
            segment.kv.write(block, segment.start, keys[here], v[here])
            over = Keys(segment.kv, block, spec.window)
            if segment.count == 1 and qkv.dtype == torch.bfloat16 and segment.kv.in_one_piece:
                mixed[segment.first] = attend_newest(newest[segment.first], over, segment.start)
                continue
            mixed[here] = attend(queries[here], over, segment.start, rows.tiles.attention, rows.reader)
        return self.out(mixed, rows.tiles.linear)

    def _placed(self, x: torch.Tensor, norm: torch.Tensor | None, rows: Rows) -> torch.Tensor:
        """Heads [rows, heads, head_dim] of queries or keys in f32, normed and rotated where the block does
        so."""
        wide = x.float()
        if norm is not None:
            wide = rms_norm(wide, norm, self.spec.norm_eps)
        return rotate(wide, rows.cos, rows.sin) if self.spec.rotary else wide

    def _down_f16(self, gate: torch.Tensor, up: torch.Tensor, tiles: RowTiles) -> torch.Tensor:
        """The MLP's last layer, f32: its input can be beyond f16 although its output is not, so each row is
        scaled by a power of two of its own, which loses nothing, and scaled back afterwards."""
        inner = gated(gate.float(), up.float())
        peak = inner.abs().amax(-1, keepdim=True)
        doublings = torch.log2(peak / _F16_ROOM).ceil().clamp_(min=0.0)
        scale = torch.ldexp(torch.ones_like(peak), -doublings)
        return self.down.scaled((inner * scale).to(torch.float16), scale, tiles)
