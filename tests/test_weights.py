"""The tensors of a span: which ones, from which files, and how many bytes are really touched."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llama_cases import CASES
from safetensors.numpy import load_file
from tiny_llama import TinyLlama, make_tiny_llama, random_weights, write_weights

from dgn_backends.api import LoadRequest, Step
from dgn_backends.errors import ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.reference import ReferenceBackend
from dgn_backends.safetensors_file import SafetensorsFile
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor, f32_to_bf16
from dgn_backends.weights import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    ModelFiles,
    block_prefix,
    span_bytes,
    span_tensors,
    whole_model,
)

BLOCK_TENSORS = {
    "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.weight",
    "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight",
    "mlp.up_proj.weight", "mlp.down_proj.weight",
}  # fmt: skip


def test_a_span_needs_exactly_its_tensors(tmp_path: Path) -> None:
    config = read_config(make_tiny_llama(tmp_path))

    def names(span: Span) -> set[str]:
        return set(span_tensors(config, span))

    def of_blocks(*blocks: int) -> set[str]:
        return {block_prefix(block) + name for block in blocks for name in BLOCK_TENSORS}

    assert names(Span(1, 3)) == of_blocks(1, 2)
    assert names(Span(0, 1, embed=True)) == {EMBEDDING} | of_blocks(0)
    assert names(Span(0, 0, embed=True)) == {EMBEDDING}
    assert names(Span(4, 4, head=True)) == {FINAL_NORM, HEAD}
    assert names(whole_model(config)) == {EMBEDDING, FINAL_NORM, HEAD} | of_blocks(0, 1, 2, 3)


def test_a_tied_head_needs_the_embedding(tmp_path: Path) -> None:
    config = read_config(make_tiny_llama(tmp_path, tied=True))
    assert set(span_tensors(config, Span(4, 4, head=True))) == {FINAL_NORM, EMBEDDING}
    assert HEAD not in span_tensors(config, whole_model(config))


@pytest.mark.parametrize("name", CASES)
def test_the_whole_model_is_what_transformers_saves(name: str, tmp_path: Path) -> None:
    """Names and shapes against the state of transformers' own model."""
    import torch
    import transformers

    config = read_config(make_tiny_llama(tmp_path, CASES[name]))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tied_head:
        del theirs[HEAD]
    assert span_tensors(config, whole_model(config)) == theirs


def test_bytes_of_a_span(tmp_path: Path) -> None:
    config = read_config(make_tiny_llama(tmp_path, dtype="bf16", attention_bias=True, mlp_bias=True))
    hidden, inner, kv = 32, 48, 16
    biases = 2 * hidden + 2 * kv + 2 * inner + hidden
    block = 2 * hidden + 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * inner + biases
    assert span_bytes(config, Span(0, 1)) == 2 * block
    assert span_bytes(config, Span(0, 3, embed=True)) == 2 * (3 * block + 261 * hidden)
    size = (tmp_path / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert span_bytes(config, whole_model(config)) == size - header - 8


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_views_of_the_file(dtype: str, shards: int, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, dtype=dtype, shards=shards)
    config, files = read_config(tmp_path), ModelFiles(tmp_path)
    expected = random_weights(tmp_path, TinyLlama(dtype=dtype, shards=shards))  # type: ignore[arg-type]
    for name, shape in span_tensors(config, whole_model(config)).items():
        tensor = files.tensor(name, shape)
        assert tensor.dtype == dtype
        assert isinstance(tensor.data, memoryview)
        assert isinstance(tensor.data.obj, mmap.mmap)
        assert tensor.data.readonly
        raw = tensor.to_numpy()
        assert not raw.flags.owndata
        want = f32_to_bf16(expected[name]) if dtype == "bf16" else expected[name].astype(raw.dtype)
        assert (raw == want).all()
        assert tensor.to_f32().shape == shape


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, tied=True)
    config, files = read_config(tmp_path), ModelFiles(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    shapes = span_tensors(config, whole_model(config))
    assert theirs.keys() == shapes.keys()
    for name, array in theirs.items():
        assert (files.tensor(name, shapes[name]).to_numpy() == array).all()


def test_shards_that_a_span_does_not_need_may_be_absent(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, shards=4, n_blocks=6)
    config = read_config(tmp_path)
    files = ModelFiles(tmp_path)
    span = Span(2, 4)
    needed = files.span_files(config, span)
    everything = files.span_files(config, whole_model(config))
    assert set(needed) < set(everything)
    assert len(everything) == 4
    for file_name in set(everything) - set(needed):
        (tmp_path / file_name).unlink()
    files = ModelFiles(tmp_path)
    files.check(config, span)
    runner = ReferenceBackend().load(LoadRequest(tmp_path, config, span), lambda done, total: None)
    assert runner.weights_bytes == span_bytes(config, span)
    assert not files.is_present(EMBEDDING)
    gone = files.file_of(EMBEDDING)
    with pytest.raises(ModelError, match=rf"{gone}: is missing, and holds tensor {EMBEDDING}"):
        files.check(config, Span(0, 3, embed=True))


_TOUCHED_SCRIPT = """
import re, sys
from pathlib import Path
import numpy as np
from dgn_backends.api import LoadRequest, Step
from dgn_backends.hf_config import read_config
from dgn_backends.reference import ReferenceBackend
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor

def touched(path):
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total

directory = Path(sys.argv[1])
config = read_config(directory)
loaded = 0
def progress(done, total):
    global loaded
    loaded = touched(directory / "model.safetensors")
runner = ReferenceBackend().load(LoadRequest(directory, config, Span(2, 4)), progress)
runner.open(1, runner.span, 4)
runner.forward([Step(1, 0, Tensor.from_f32(np.ones((2, config.block.hidden_size), np.float32), "f32"))])
print(loaded, touched(directory / "model.safetensors"), runner.weights_bytes)
"""


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="needs /proc/PID/smaps to count mapped pages"
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_only_the_bytes_of_the_span_are_touched(dtype: str, tmp_path: Path) -> None:
    """What the kernel mapped of the file into the process, after loading 2 of 16 blocks and running them."""
    make_tiny_llama(tmp_path, dtype=dtype, n_blocks=16, hidden_size=256, intermediate_size=1024, n_heads=8)
    config = read_config(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _TOUCHED_SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    loaded, ran, held = map(int, done.stdout.split())
    wanted = span_bytes(config, Span(2, 4))
    around = 2 * (2 << 20)  # the kernel maps up to a huge page around a page fault, at either end of the span
    read = ran if dtype == "f32" else loaded
    assert wanted <= read <= wanted + around
    assert read < (tmp_path / "model.safetensors").stat().st_size / 3
    if dtype == "f32":  # used in place: loading reads nothing yet
        assert loaded <= around
        assert held == wanted
    else:  # widened when loaded: the file is let go
        assert ran == 0
        assert held == 2 * wanted


def test_unaligned_weights_are_used_rightly(tmp_path: Path) -> None:
    """The format does not promise that tensors are aligned."""
    make_tiny_llama(tmp_path)
    config, path = read_config(tmp_path), tmp_path / "model.safetensors"
    hidden = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)

    def run() -> bytes:
        runner = ReferenceBackend().load(LoadRequest(tmp_path, config, Span(1, 3)), lambda done, total: None)
        runner.open(1, runner.span, 3)
        (output,) = runner.forward([Step(1, 0, Tensor.from_f32(hidden, "f32"))])
        assert output.hidden is not None
        return bytes(output.hidden.data)

    expected = run()
    rewrite_header(path, lambda header: None, pad=3)
    assert run() == expected


def rewrite_header(path: Path, change: Callable[[dict[str, dict[str, object]]], None], pad: int = 0) -> None:
    """Changes the header of a safetensors file in place; the data stays."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def check_whole(path: Path) -> None:
    config = read_config(path)
    ModelFiles(path).check(config, whole_model(config))


UP = "model.layers.1.mlp.up_proj.weight"
Header = dict[str, dict[str, object]]


def shift(header: Header, by: int) -> None:
    begin, end = header[UP]["data_offsets"]  # type: ignore[misc]
    header[UP]["data_offsets"] = [begin + by, end + by]


WRONG_HEADERS: list[tuple[Callable[[Header], object], str]] = [
    (lambda h: h.pop(UP), "leaves a hole after"),
    (lambda h: shift(h, -4), f"tensor {UP} overlaps "),
    (lambda h: shift(h, 4), f"tensor {UP} leaves a hole after"),
    (lambda h: shift(h, 10**9), "tensor .* leaves a hole after"),
    (lambda h: h[UP].update(data_offsets=[-4, 6140]), rf"tensor {UP} has unusable data_offsets \[-4, 6140\]"),
    (lambda h: h[UP].update(data_offsets=[8, 4]), rf"tensor {UP} has unusable data_offsets \[8, 4\]"),
    (lambda h: h[UP].update(data_offsets=[0]), f"tensor {UP} has a header entry without"),
    (lambda h: h[UP].update(data_offsets=["0", "4"]), f"tensor {UP} has a header entry without"),
    (lambda h: h[UP].pop("dtype"), f"tensor {UP} has a header entry without dtype, shape and data_offsets"),
    (lambda h: h.update({UP: 3}), f"tensor {UP} has a header entry without"),  # type: ignore[dict-item]
    (lambda h: h[UP].update(shape=[48, 31]), rf"tensor {UP} has 6144 bytes, which is not F32\[48, 31\]"),
    (
        lambda h: h[UP].update(shape=[32, 48]),
        rf"tensor {UP} has shape \[32, 48\]; config.json makes it \[48, 32\]",
    ),
    (lambda h: h[UP].update(shape=[1536]), rf"tensor {UP} has shape \[1536\]; config.json makes it"),
    (lambda h: h[UP].update(shape=[-48, -32]), f"tensor {UP} has an unusable shape"),
    (lambda h: h[UP].update(shape=[True, 1536]), f"tensor {UP} has an unusable shape"),
    (lambda h: h[UP].update(shape=[48.0, 32]), f"tensor {UP} has an unusable shape"),
    (lambda h: h[UP].update(shape=[1] * 99), f"tensor {UP} has an unusable shape"),
    (lambda h: h[UP].update(dtype="I32"), f"tensor {UP} has dtype I32; supported: F32, BF16, F16"),
    (lambda h: h[UP].update(dtype="F8_E4M3", shape=[192, 32]), f"tensor {UP} has shape"),
    (lambda h: h[UP].update(dtype="Q4_K"), f"tensor {UP} has the unknown dtype 'Q4_K'"),
    (lambda h: h.update({"x": h.pop(UP)}), f"tensor {UP} is missing"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_HEADERS, ids=range(len(WRONG_HEADERS)))
def test_wrong_headers_are_named(change: Callable[[Header], object], message: str, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    rewrite_header(path, change)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=message) as caught:
        check_whole(tmp_path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"", "is truncated: it has only 0 bytes"),
        (lambda raw: raw[:7], "is truncated: it has only 7 bytes"),
        (lambda raw: raw[:100], "is truncated: it has only 100 bytes"),
        (lambda raw: raw[:-1], r"tensor \S+ ends beyond the file, which is truncated: \d+ of \d+ bytes"),
        (lambda raw: raw[: len(raw) // 2], r"tensor \S+ ends beyond the file, which is truncated"),
        (lambda raw: raw + b"\0", "has 1 bytes after its last tensor: it is corrupt"),
        (lambda raw: b"\xff" * 8 + raw[8:], "is not a safetensors file: its header would have"),
        (lambda raw: b"<!doctype html>" * 100, "is not a safetensors file: its header would have"),
        (lambda raw: raw[:8] + b"[" + raw[9:], r":1:\d+: broken JSON"),
        (lambda raw: raw[:8] + b"\xff" + raw[9:], "is not UTF-8 text"),
        (lambda raw: (2).to_bytes(8, "little") + b"[]", r"must hold a JSON object, not \[\]"),
        (lambda raw: (2).to_bytes(8, "little") + b"{}", r"tensor \S+ is missing"),
    ],
)
def test_damaged_files_are_named(change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelError, match=message) as caught:
        check_whole(tmp_path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_any_damage_to_a_header_gives_a_model_error_or_nothing(tmp_path: Path) -> None:
    """Random bytes changed in the header: never another exception, never a view beyond the file."""
    make_tiny_llama(tmp_path, n_blocks=1, tokenizer=False)
    config, path = read_config(tmp_path), tmp_path / "model.safetensors"
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        raw = bytearray(good)
        for position in rng.integers(0, 8 + header, rng.integers(1, 4)):
            raw[position] = (
                rng.integers(0, 256) if rng.random() < 0.5 else rng.choice(list(b'0123456789[]{},:"-'))
            )
        path.write_bytes(raw)
        try:
            files = ModelFiles(tmp_path)
            for name, shape in span_tensors(config, whole_model(config)).items():
                assert len(files.tensor(name, shape).data) == 4 * np.prod(shape)
        except ModelError:
            refused += 1
    assert refused > 200


def test_the_index_is_checked(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, shards=2)
    config, index = read_config(tmp_path), tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for value, message in (
        ({}, "weight_map is missing or empty"),
        ({"weight_map": {}}, "weight_map is missing or empty"),
        ({"weight_map": [1]}, r"weight_map must be an object, not \[1\]"),
        ({"weight_map": {"a": 3}}, "weight_map.a must be a string, not 3"),
        (
            {"weight_map": {"a": "../x"}},
            "weight_map.a must be the name of a file in the same directory, not '../x'",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "weight_map.a must be the name of a file"),
        ({"weight_map": {"a": ".."}}, "weight_map.a must be the name of a file"),
        ({"weight_map": {"a": "b\0"}}, "weight_map.a must be the name of a file"),
    ):
        index.write_text(json.dumps(value))
        with pytest.raises(ModelError, match=message):
            ModelFiles(tmp_path)
    del good["weight_map"][UP]
    index.write_text(json.dumps(good))
    with pytest.raises(ModelError, match=rf"index\.json: tensor {UP} is missing"):
        ModelFiles(tmp_path).check(config, Span(1, 2))
    ModelFiles(tmp_path).check(config, Span(2, 3))
    good["weight_map"][UP] = good["weight_map"][EMBEDDING]
    index.write_text(json.dumps(good))
    wrong = re.escape(str(tmp_path / good["weight_map"][EMBEDDING]))
    if good["weight_map"]["model.layers.1.mlp.down_proj.weight"] != good["weight_map"][EMBEDDING]:
        with pytest.raises(ModelError, match=f"{wrong}: tensor {UP} is missing"):
            ModelFiles(tmp_path).check(config, Span(1, 2))


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        ModelFiles(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"model.safetensors: is no regular file"):
        SafetensorsFile(tmp_path / "model.safetensors")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_head_that_differs_from_the_embedding_is_refused(shards: int, tmp_path: Path) -> None:
    """transformers would use both; a span that has only the embedding could not know."""
    make_tiny_llama(tmp_path, shards=shards)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tied = read_config(tmp_path)
    with pytest.raises(ModelError, match=r"tensor lm_head.weight differs from model.embed_tokens.weight"):
        ModelFiles(tmp_path).check(tied, Span(4, 4, head=True))
    ModelFiles(tmp_path).check(tied, Span(0, 4, embed=True))


def test_a_tied_head_that_equals_the_embedding_is_used(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, tied=True)
    weights = random_weights(tmp_path, TinyLlama(tied=True))
    write_weights(tmp_path, {**weights, HEAD: weights[EMBEDDING]})
    check_whole(tmp_path)
