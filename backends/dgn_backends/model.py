"""What a model is, as data: the configuration of a Llama-family model, the description of one block.

Every backend builds from these; none reads config.json itself. Knows nothing of files or of how to compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dgn_backends.tensor import DType

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split as Hugging Face stores it.

    `factor` and the rest apply to the kinds that use them; `original_positions` is the window the model was
    trained with before scaling.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles depend on the length that a session is opened with."""
        return self.kind == "dynamic"


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One pre-norm decoder block: x += o(attention(norm(x))); x += down(act(gate(norm(x))) * up(norm(x))).

    Weight shapes are [out, in]; q is [n_heads * head_dim, hidden], k and v [n_kv_heads * head_dim, hidden].
    With `qk_norm`, each head of q and of k is normalised (RMSNorm, weights [head_dim]) before the rotation.
    With a `window`, position p attends to positions p - window + 1 to p alone.
    """

    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    qkv_bias: bool = False  #: q, k and v have a bias
    o_bias: bool = False  #: o has one
    mlp_bias: bool = False  #: gate, up and down have a bias
    qk_norm: bool = False  #: q and k are normalised by head (Qwen3)
    window: int | None = None  #: sliding window of attention, in positions (Mistral)
    rotary: bool = True  #: q and k are rotated; a block without has no notion of position (SmolLM3)
    activation: Literal["silu"] = "silu"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole model. Its blocks have the same shapes; only `window` and `rotary` may differ between them."""

    blocks: tuple[BlockSpec, ...]
    vocab_size: int
    max_positions: int  #: the context: prompt and answer together
    tied_head: bool  #: the head uses the embedding's weights
    dtype: DType  #: in which the weights were saved
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    @property
    def n_blocks(self) -> int:
        """How many blocks."""
        return len(self.blocks)

    @property
    def block(self) -> BlockSpec:
        """The first block: what is asked of it holds for all, but for `window` and `rotary`."""
        return self.blocks[0]

    @property
    def unit_weights(self) -> tuple[float, ...]:
        """What a decode step takes in each unit, [n_blocks + 2], where a block is 1: as the weights that it
        reads, since reading them is most of it. Of the embedding that is one row."""
        block = self.block
        attention = block.hidden_size * block.head_dim * 2 * (block.n_heads + block.n_kv_heads)
        size = attention + 3 * block.hidden_size * block.intermediate_size
        head = self.vocab_size * block.hidden_size / size
        return (block.hidden_size / size, *(1.0 for _ in self.blocks), head)

    @property
    def kv_bytes_per_position(self) -> int:
        """Of one block, for two-byte items; multiply by 2 for f32."""
        return 2 * self.block.n_kv_heads * self.block.head_dim * 2
