"""What a model is, by digests: of its normalised config, of its tokenizer, and of each tensor.

Two nodes that share a model compare these before they compute together: same tensor, other digest is another
model. A manifest is made from the files once, by a child of low priority (`python -m dgn_backends.manifest
DIR --cache DIR`), and kept on disk for as long as the files stay the same (see `manifest_cache`). Knows
nothing of peers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dgn_backends.hf_config import normalised_config_bytes, read_config
from dgn_backends.model import ModelConfig
from dgn_backends.tensor import Tensor
from dgn_backends.weights import ModelFiles, Shape, has_weights, span_tensors, whole_model

#: Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]

_DIGEST_BYTES = 16
_READ_BYTES = 4 << 20
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Digests in hex. `tensors` may lack some, where files are absent; `complete` says that none lacks.

    `tokenizer_digest` is None where the directory has no tokenizer.json: a node that serves blocks needs
    none.
    """

    config_digest: str
    tokenizer_digest: str | None
    tensors: Mapping[str, str]
    complete: bool

    @property
    def digest(self) -> str:
        """One digest for the config and all tensors here. The tokenizer is left out: it does not change what
        a span computes, and not every node has it."""
        lines = [self.config_digest, *(f"{name} {self.tensors[name]}" for name in sorted(self.tensors))]
        return _digest("\n".join(lines).encode())


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that two manifests disagree on: "config", "tokenizer", or the name of a tensor."""

    what: str
    digest_a: str
    digest_b: str

    def __str__(self) -> str:
        return f"{self.what} differs ({self.digest_a} and {self.digest_b})"


def compare(a: Manifest, b: Manifest) -> Difference | None:
    """The first difference in what both have: config, tokenizer, then the tensors in the order of their
    names."""
    if a.config_digest != b.config_digest:
        return Difference("config", a.config_digest, b.config_digest)
    if a.tokenizer_digest and b.tokenizer_digest and a.tokenizer_digest != b.tokenizer_digest:
        return Difference("tokenizer", a.tokenizer_digest, b.tokenizer_digest)
    for name in sorted(a.tensors.keys() & b.tensors.keys()):
        if a.tensors[name] != b.tensors[name]:
            return Difference(name, a.tensors[name], b.tensors[name])
    return None


def config_digest(config: ModelConfig) -> str:
    """The digest of what nodes must agree on of a config; spelling, eos and bos do not matter."""
    return _digest(normalised_config_bytes(config))


def tokenizer_digest(model_dir: Path) -> str | None:
    """The digest of the bytes of tokenizer.json, or None where there is none."""
    path = model_dir / TOKENIZER_FILE
    return _digest(path.read_bytes()) if path.is_file() else None


def digest_tensor(tensor: Tensor, advance: Callable[[int], None] = lambda _: None) -> str:
    """The digest of dtype, shape and bytes; `advance` is told the bytes of each part read."""
    hasher = hashlib.blake2b(f"{tensor.dtype}{list(tensor.shape)}".encode(), digest_size=_DIGEST_BYTES)
    data = memoryview(tensor.data)
    for begin in range(0, len(data), _READ_BYTES):
        part = data[begin : begin + _READ_BYTES]
        hasher.update(part)
        advance(len(part))
    return hasher.hexdigest()


def digest_tensors(files: ModelFiles, names: Mapping[str, Shape], progress: Progress) -> dict[str, str]:
    """The digests of `names` (names and shapes, as `span_tensors` gives them), reading each once."""
    tensors = {name: files.tensor(name, shape) for name, shape in names.items()}
    total = sum(len(tensor.data) for tensor in tensors.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    progress(0, total)
    return {name: digest_tensor(tensor, advance) for name, tensor in tensors.items()}


def present_tensors(files: ModelFiles, names: Mapping[str, Shape]) -> dict[str, Shape]:
    """Those of `names` whose file is there."""
    return {name: shape for name, shape in names.items() if files.is_present(name)}


def make_manifest(model_dir: Path, progress: Progress = lambda _done, _total: None) -> Manifest:
    """The manifest of all that is in `model_dir`, reading everything; without tensors where it has no
    weights.

    Raises ModelError for broken files.
    """
    config = read_config(model_dir)
    wanted = span_tensors(config, whole_model(config))
    if not has_weights(model_dir):
        return assemble(model_dir, config, wanted, {})
    files = ModelFiles(model_dir)
    present = present_tensors(files, wanted)
    return assemble(model_dir, config, wanted, digest_tensors(files, present, progress))


def assemble(
    model_dir: Path, config: ModelConfig, wanted: Iterable[str], tensors: Mapping[str, str]
) -> Manifest:
    """A manifest of digests that are known already; complete when they cover `wanted`."""
    return Manifest(
        config_digest=config_digest(config),
        tokenizer_digest=tokenizer_digest(model_dir),
        tensors=dict(tensors),
        complete=all(name in tensors for name in wanted),
    )


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


if __name__ == "__main__":
    # Imported here: that module builds on this one.
    from dgn_backends.manifest_cache import main

    raise SystemExit(main())
