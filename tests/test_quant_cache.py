"""Quantised weights on disk: the same as fresh ones, made again whenever they might not be, and done without
where there is no room for them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import make_tiny_llama

from dgn_backends import quant_cache
from dgn_backends.errors import ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.quant import Quantised, quantise
from dgn_backends.quant_cache import QuantisedFiles
from dgn_backends.quant_plan import SCHEMES, scheme_of
from dgn_backends.testing_memory_meter import MemoryMeter
from dgn_backends.weights import EMBEDDING, ModelFiles, block_prefix, span_tensors, whole_model

_QKV = tuple(f"{block_prefix(1)}self_attn.{name}_proj.weight" for name in "qkv")
_MIB = 1 << 20
ARRAYS = ("packed", "scales", "zeros")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model", dtype="bf16", tokenizer=False)


def opened(model: Path, cache: Path | None, scheme: str = "int4") -> QuantisedFiles:
    config = read_config(model)
    shapes = span_tensors(config, whole_model(config))
    return QuantisedFiles(ModelFiles(model), shapes, scheme, cache, threads=1)


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def same(one: Quantised, other: Quantised) -> bool:
    return all(np.array_equal(getattr(one, part), getattr(other, part)) for part in ARRAYS)


@pytest.fixture
def no_making(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment it is called, weights must come from the disk."""

    def refuse(*_arguments: object, **_named: object) -> None:
        raise AssertionError("was quantised again")

    monkeypatch.setattr(quant_cache, "quantise_into", refuse)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("names", [(EMBEDDING,), _QKV], ids=["one", "joined"])
def test_what_is_kept_is_what_was_made(
    model: Path, tmp_path: Path, scheme: str, names: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    files, config = ModelFiles(model), read_config(model)
    shapes = span_tensors(config, whole_model(config))
    joined = np.concatenate([files.tensor(name, shapes[name]).to_f32() for name in names])
    wanted_scheme = scheme_of(scheme, names[0])
    assert wanted_scheme is not None
    wanted = quantise(joined, wanted_scheme)
    assert same(opened(model, None, scheme).get(*names), wanted)
    assert same(opened(model, tmp_path / "cache", scheme).get(*names), wanted)
    request.getfixturevalue("no_making")
    again = opened(model, tmp_path / "cache", scheme).get(*names)
    assert same(again, wanted)
    for array in (getattr(again, part) for part in ARRAYS):
        assert not array.flags.writeable
        assert array.ctypes.data % 4096 == 0


def test_other_weights_are_made_again_and_the_old_ones_removed(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old = opened(model, cache).get(EMBEDDING)
    opened(model, cache).get(*_QKV)
    (entry, other) = entries(cache)
    make_tiny_llama(model, seed=9, dtype="bf16", tokenizer=False)
    files = opened(model, cache)
    assert not entry.exists()
    assert not other.exists()
    new = files.get(EMBEDDING)
    assert not same(old, new)
    assert same(new, opened(model, None).get(EMBEDDING))
    assert len(entries(cache)) == 1


def flip(at: float) -> Callable[[bytearray], None]:
    def damage(data: bytearray) -> None:
        data[int(at * (len(data) - 1))] ^= 64

    return damage


def _swap_pages(data: bytearray) -> None:
    data[8192:12288], data[12288:16384] = data[12288:16384], data[8192:12288]


def _cut(data: bytearray) -> None:
    del data[-4096:]


def _lengthen(data: bytearray) -> None:
    data += bytes(4096)


def _lose_pages(data: bytearray) -> None:
    data[8192:] = bytes(len(data) - 8192)


def _empty(data: bytearray) -> None:
    data.clear()


@pytest.mark.parametrize(
    "damage",
    [flip(0), flip(0.5), flip(1), _swap_pages, _cut, _lengthen, _lose_pages, _empty],
    ids=["magic", "middle", "last byte", "swapped", "cut", "longer", "lost", "empty"],
)
def test_a_damaged_entry_is_never_used(
    model: Path, tmp_path: Path, damage: Callable[[bytearray], None], caplog: pytest.LogCaptureFixture
) -> None:
    make_tiny_llama(model, vocab_size=1000, dtype="bf16", tokenizer=False)
    wanted = opened(model, None).get(EMBEDDING)
    opened(model, tmp_path / "cache").get(EMBEDDING)
    files = opened(model, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    whole = entry.read_bytes()
    data = bytearray(whole)
    damage(data)
    assert data != whole
    assert entry.stat().st_mode & 0o777 == 0o400  # nobody overwrites it in passing
    entry.chmod(0o600)
    entry.write_bytes(data)
    assert caplog.records == []
    assert same(files.get(EMBEDDING), wanted)
    assert entry.read_bytes() == whole
    (record,) = caplog.records
    assert str(entry) in record.getMessage()
    assert record.getMessage().endswith("it is made again")


def test_a_pipe_in_place_of_an_entry_is_not_waited_for(model: Path, tmp_path: Path) -> None:
    wanted = opened(model, tmp_path / "cache").get(EMBEDDING)
    (entry,) = entries(tmp_path / "cache")
    whole = entry.read_bytes()
    entry.unlink()
    os.mkfifo(entry)
    assert same(opened(model, tmp_path / "cache").get(EMBEDDING), wanted)
    assert entry.read_bytes() == whole


def test_where_nothing_can_be_kept_it_works_and_says_so_once(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file, not a directory")
    files = opened(model, tmp_path / "cache")
    assert same(files.get(EMBEDDING), opened(model, None).get(EMBEDDING))
    files.get(*_QKV)
    (record,) = caplog.records
    assert "quantised weights can't be kept here" in record.getMessage()
    assert str(tmp_path / "cache") in record.getMessage()


def test_a_full_disk_is_survived_and_what_is_there_still_used(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    wanted = opened(model, None).get(EMBEDDING)
    opened(model, tmp_path / "cache").get(*_QKV)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # to a writer like a full disk
    try:
        files = opened(model, tmp_path / "cache")
        assert same(files.get(EMBEDDING), wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(caplog.records) == 1
    assert len(entries(tmp_path / "cache")) == 1  # no half of one either
    request.getfixturevalue("no_making")
    files.get(*_QKV)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_entry_has_no_holes(model: Path, tmp_path: Path, scheme: str) -> None:
    """Reading one through a mapping takes room on a tmpfs, and crashes where there is none."""
    opened(model, tmp_path / "cache", scheme).get(*_QKV)
    (entry,) = entries(tmp_path / "cache")
    with entry.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == size


def test_two_processes_at_once(model: Path, tmp_path: Path) -> None:
    make_tiny_llama(model, vocab_size=4000, dtype="bf16", tokenizer=False)
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]; from pathlib import Path; import test_quant_cache as t;"
        "files = t.opened(Path(sys.argv[1]), Path(sys.argv[2])); print('ready', flush=True);"
        "sys.stdin.readline(); print(files.get(t.EMBEDDING).packed.sum(), flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "cache"), *sys.path]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    wanted = int(opened(model, None).get(EMBEDDING).packed.sum())
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            assert child.stdout is not None
            assert int(child.stdout.readline()) == wanted
    finally:
        for child in children:
            child.communicate("\n")
    assert len(entries(tmp_path / "cache")) == 1
    assert int(opened(model, tmp_path / "cache").get(EMBEDDING).packed.sum()) == wanted


def test_only_the_last_schemes_are_kept(model: Path, tmp_path: Path) -> None:
    for number, scheme in enumerate(("int8", "int4", "int8-fast")):
        opened(model, tmp_path / "cache", scheme).get(EMBEDDING)
        (folder,) = (tmp_path / "cache").glob(f"*/{scheme}")
        os.utime(folder, (number, number))
    opened(model, tmp_path / "cache", "int4-fast")
    assert {path.parent.name for path in entries(tmp_path / "cache")} == {"int8-fast"}


def test_what_another_start_removes_is_kept_again(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = opened(model, tmp_path / "cache")
    files.get(*_QKV)
    os.utime(entries(tmp_path / "cache")[0].parent, (0, 0))  # long before the others
    for scheme in ("int8", "int8-fast"):
        opened(model, tmp_path / "cache", scheme)
    assert entries(tmp_path / "cache") == []
    files.get(*_QKV)
    assert len(entries(tmp_path / "cache")) == 1
    assert not caplog.records


def test_starts_with_more_schemes_than_are_kept_hurt_none_of_each_other(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = {scheme: opened(model, None, scheme).get(*_QKV) for scheme in SCHEMES}

    def start(scheme: str) -> bool:
        return same(opened(model, tmp_path / "cache", scheme).get(*_QKV), wanted[scheme])

    with ThreadPoolExecutor(len(SCHEMES)) as pool:
        assert all(pool.map(start, [*SCHEMES] * 50))
    assert not caplog.records


def test_what_a_killed_process_left_is_removed(model: Path, tmp_path: Path) -> None:
    opened(model, tmp_path / "cache").get(EMBEDDING)
    (entry,) = entries(tmp_path / "cache")
    old, young = entry.with_suffix(".old.tmp"), entry.with_suffix(".young.tmp")
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    opened(model, tmp_path / "cache")
    assert entries(tmp_path / "cache") == sorted([entry, young])


def test_weights_that_are_not_finite_are_named(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    config = read_config(model)
    shape = span_tensors(config, whole_model(config))[EMBEDDING]
    data = path.read_bytes()
    raw = bytes(ModelFiles(model).tensor(EMBEDDING, shape).data)
    at = data.index(raw)
    path.write_bytes(data[:at] + b"\xc0\x7f" + data[at + 2 :])
    with pytest.raises(
        ModelError, match=rf"model\.safetensors: tensor {EMBEDDING} has values that are not finite"
    ):
        opened(model, tmp_path / "cache").get(EMBEDDING)
    assert not entries(tmp_path / "cache")


@pytest.mark.skipif(
    not MemoryMeter.is_usable(), reason="this system does not count a process's memory as needed"
)
@pytest.mark.parametrize("kept", [False, True], ids=["made", "kept"])
def test_loading_takes_little_beside_what_is_loaded(model: Path, tmp_path: Path, kept: bool) -> None:
    make_tiny_llama(
        model, hidden_size=512, intermediate_size=2048, vocab_size=32000, dtype="bf16", tokenizer=False
    )
    if kept:
        names = [name for name, shape in opened(model, tmp_path / "cache")._shapes.items() if len(shape) == 2]
        for name in names:
            opened(model, tmp_path / "cache").get(name)
    files = opened(model, tmp_path / "cache")
    with MemoryMeter() as meter:
        loaded = [files.get(name) for name, shape in files._shapes.items() if len(shape) == 2]
        taken = meter.peak()
    size = sum(weight.n_bytes for weight in loaded)
    largest = 32000 * 512 * 2
    assert taken <= size + largest + 4 * _MIB
    assert size > 16 * _MIB
