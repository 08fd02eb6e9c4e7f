"""The tensors of a Hugging Face directory: which ones a span needs, and memory-mapped access to exactly
those.

Files are opened when their first tensor is asked for, so shards that a span does not need may be absent.
Knows nothing of what is computed with the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dgn_backends.errors import ModelError
from dgn_backends.json_values import read_json_object
from dgn_backends.model import ModelConfig
from dgn_backends.safetensors_file import SafetensorsFile
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor, tensor_bytes

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Shape = tuple[int, ...]


def block_prefix(block: int) -> str:
    """What the names of the tensors of `block` begin with."""
    return f"model.layers.{block}."


def head_tensor(config: ModelConfig) -> str:
    """The name of the LM head's weights: the embedding's where they are tied."""
    return EMBEDDING if config.tied_head else HEAD


def block_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Names within a block (without its prefix) and shapes of its tensors."""
    block = config.block
    hidden, inner = block.hidden_size, block.intermediate_size
    q, kv = block.n_heads * block.head_dim, block.n_kv_heads * block.head_dim
    tensors: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    for name, out, width in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
        tensors[f"self_attn.{name}_proj.weight"] = (out, width)
        if block.o_bias if name == "o" else block.qkv_bias:
            tensors[f"self_attn.{name}_proj.bias"] = (out,)
    if block.qk_norm:
        tensors |= {f"self_attn.{name}_norm.weight": (block.head_dim,) for name in ("q", "k")}
    tensors["post_attention_layernorm.weight"] = (hidden,)
    for name, out, width in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        tensors[f"mlp.{name}_proj.weight"] = (out, width)
        if block.mlp_bias:
            tensors[f"mlp.{name}_proj.bias"] = (out,)
    return tensors


def span_tensors(config: ModelConfig, span: Span) -> dict[str, Shape]:
    """Names and shapes of exactly the tensors that `span` needs, in the order of computation."""
    tensors: dict[str, Shape] = {}
    if span.embed:
        tensors[EMBEDDING] = (config.vocab_size, config.block.hidden_size)
    for block in range(span.start, span.stop):
        tensors.update({block_prefix(block) + name: shape for name, shape in block_tensors(config).items()})
    if span.head:
        tensors[FINAL_NORM] = (config.block.hidden_size,)
        tensors[head_tensor(config)] = (config.vocab_size, config.block.hidden_size)
    return tensors


def span_bytes(config: ModelConfig, span: Span) -> int:
    """Bytes of the weights of `span` in the dtype that the config names."""
    return sum(tensor_bytes(config.dtype, shape) for shape in span_tensors(config, span).values())


def whole_model(config: ModelConfig) -> Span:
    """The span that is the whole model."""
    return Span(0, config.n_blocks, embed=True, head=True)


def has_weights(path: Path) -> bool:
    """Whether `path` has weights at all: a node that serves no block may have only config and tokenizer."""
    return (path / SINGLE_FILE).exists() or (path / INDEX_FILE).exists()


def file_identity(path: Path) -> list[int]:
    """What tells that a file is still the one it was: size, modification and change time, inode, device.

    The change time can't be set: tools that restore the other one after writing in place are found out.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


class ModelFiles:
    """The weights in one directory: `model.safetensors`, or shards named by `model.safetensors.index.json`.

    Making it reads the index alone. Every method raises ModelError, one line naming the file and the tensor.
    `copies`: tensors are copied, into memory of the process's own.
    """

    def __init__(self, path: Path, *, copies: bool = False) -> None:
        self.path = path
        self.copies = copies
        self._open: dict[str, SafetensorsFile] = {}
        self._index: Mapping[str, str] | None = None  # None: a single file holds all
        if not has_weights(path):
            raise ModelError(f"{path}: has neither {SINGLE_FILE} nor {INDEX_FILE}", file=str(path))
        if not (path / SINGLE_FILE).exists():
            self._index = _read_index(path / INDEX_FILE)

    def file_of(self, name: str) -> str:
        """The name of the file that holds tensor `name`."""
        if self._index is None:
            return SINGLE_FILE
        try:
            return self._index[name]
        except KeyError:
            raise ModelError(
                f"{self.path / INDEX_FILE}: tensor {name} is missing",
                file=str(self.path / INDEX_FILE),
                tensor=name,
            ) from None

    def file_names(self) -> frozenset[str]:
        """The names of all files that hold tensors, present or not."""
        return frozenset([SINGLE_FILE] if self._index is None else self._index.values())

    def is_present(self, name: str) -> bool:
        """Whether the file that should hold tensor `name` is there."""
        return (self.path / self.file_of(name)).exists()

    def span_files(self, config: ModelConfig, span: Span) -> tuple[str, ...]:
        """The names of the files that `span` needs, present or not."""
        return tuple(dict.fromkeys(self.file_of(name) for name in span_tensors(config, span)))

    def tensor(self, name: str, shape: Shape) -> Tensor:
        """Tensor `name`, whose shape must be `shape`: a read-only view of the mapped file, without a copy.

        The view is not necessarily aligned in memory; it stays valid for as long as it is held. With
        `copies` it is a copy, which is aligned.
        """
        tensor = self._file(name).tensor(name, shape)
        if not self.copies:
            return tensor
        copy = Tensor(tensor.dtype, tensor.shape, bytearray(tensor.data))
        self.release(name)
        return copy

    def release(self, name: str) -> None:
        """Gives back the memory that reading tensor `name` took; reading it again takes it again."""
        self._file(name).release(name)

    def check(self, config: ModelConfig, span: Span) -> None:
        """Checks that every tensor of `span` is there with its shape and a usable dtype.

        Reads headers only, except where a file of a model with a tied head also holds a head of its own: the
        two must then be equal.
        """
        for name, shape in span_tensors(config, span).items():
            self._file(name).check(name, shape)
        if span.head and config.tied_head:
            self._check_tied_head(config)

    def _check_tied_head(self, config: ModelConfig) -> None:
        if self._index is not None and HEAD not in self._index:
            return
        file = self._file(HEAD)
        if HEAD not in file.names():
            return
        shape = (config.vocab_size, config.block.hidden_size)
        head, embedding = file.tensor(HEAD, shape), self.tensor(EMBEDDING, shape)
        if head.dtype != embedding.dtype or head.data != embedding.data:
            raise ModelError(
                f"{file.path}: tensor {HEAD} differs from {EMBEDDING}, but config.json ties them; "
                "set its tie_word_embeddings to false",
                file=str(file.path),
                tensor=HEAD,
            )

    def _file(self, name: str) -> SafetensorsFile:
        file_name = self.file_of(name)
        file = self._open.get(file_name)
        if file is None:
            path = self.path / file_name
            if not path.exists():
                raise ModelError(f"{path}: is missing, and holds tensor {name}", file=str(path), tensor=name)
            file = self._open[file_name] = SafetensorsFile(path)
        return file


def _read_index(path: Path) -> dict[str, str]:
    """Which file holds which tensor. Files must lie in the directory itself."""
    weight_map = read_json_object(path).object("weight_map")
    if weight_map is None:
        raise ModelError(f"{path}: weight_map is missing or empty", file=str(path))
    index: dict[str, str] = {}
    for name in weight_map.values:
        file_name = weight_map.string(name, default="")
        if (
            not file_name
            or file_name != Path(file_name).name
            or file_name.startswith(".")
            or "\0" in file_name
        ):
            raise weight_map.error(
                name, f"must be the name of a file in the same directory, not {file_name!r}"
            )
        index[name] = file_name
    return index
