"""Digests of a model, their cache, and the command that makes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llama import TinyLlama, make_tiny_llama, random_weights, write_weights

from dgn_backends.errors import ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.manifest import (
    Manifest,
    compare,
    config_digest,
    digest_tensors,
    make_manifest,
    tokenizer_digest,
)
from dgn_backends.manifest_cache import load_or_make, manifest_from_json
from dgn_backends.span import Span
from dgn_backends.weights import EMBEDDING, ModelFiles, span_tensors, whole_model

UP = "model.layers.1.mlp.up_proj.weight"


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


class Counting:
    """Progress that remembers how much there was to read."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))

    @property
    def total(self) -> int:
        assert self.calls[-1][0] == self.calls[-1][1]
        assert self.calls == sorted(self.calls)
        return self.calls[-1][1]


def replace_tensor(path: Path, tiny: TinyLlama, name: str, index: int = 0) -> None:
    """Writes the model's weights again with one number of one tensor changed."""
    weights = random_weights(path, tiny)
    weights[name].reshape(-1)[index] += 1.0
    write_weights(path, weights, tiny.dtype, tiny.shards)


def test_a_manifest_names_every_tensor(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    config = read_config(tmp_path)
    counting = Counting()
    manifest = make_manifest(tmp_path, counting)
    assert manifest.complete
    assert manifest.tensors.keys() == span_tensors(config, whole_model(config)).keys()
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in manifest.tensors.values())
    assert len(set(manifest.tensors.values())) == len(manifest.tensors)
    assert manifest.config_digest == config_digest(config)
    raw = (tmp_path / "tokenizer.json").read_bytes()
    assert manifest.tokenizer_digest == hashlib.blake2b(raw, digest_size=16).hexdigest()
    assert counting.calls[0][0] == 0
    assert counting.total == sum(
        4 * _items(shape) for shape in span_tensors(config, whole_model(config)).values()
    )


def _items(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def test_what_a_digest_is_made_of(tmp_path: Path) -> None:
    """Dtype, shape and bytes: so that it can be made again by others."""
    make_tiny_llama(tmp_path, dtype="bf16")
    files = ModelFiles(tmp_path)
    data = bytes(files.tensor(UP, (48, 32)).data)
    expected = hashlib.blake2b(b"bf16[48, 32]" + data, digest_size=16).hexdigest()
    assert digest_tensors(files, {UP: (48, 32)}, quiet) == {UP: expected}


def test_sharding_and_spelling_do_not_matter(tmp_path: Path) -> None:
    one = make_manifest(make_tiny_llama(tmp_path / "one"))
    other = make_manifest(make_tiny_llama(tmp_path / "other", shards=3, spelling="old", eos=[2, 4]))
    assert one == other
    assert one.digest == other.digest
    assert compare(one, other) is None


def test_differences_are_named(tmp_path: Path) -> None:
    tiny = TinyLlama()
    path = make_tiny_llama(tmp_path, tiny)
    good = make_manifest(path)
    replace_tensor(path, tiny, UP, index=-1)
    other = make_manifest(path)
    found = compare(good, other)
    assert found is not None
    assert (found.what, found.digest_a, found.digest_b) == (UP, good.tensors[UP], other.tensors[UP])
    assert str(found) == f"{UP} differs ({good.tensors[UP]} and {other.tensors[UP]})"
    assert good.digest != other.digest
    config = dataclasses.replace(other, config_digest="0")
    assert compare(good, config).what == "config"  # type: ignore[union-attr]
    tokenizer = dataclasses.replace(good, tokenizer_digest="0")
    assert compare(good, tokenizer).what == "tokenizer"  # type: ignore[union-attr]
    assert compare(good, dataclasses.replace(good, tokenizer_digest=None)) is None


def test_only_what_both_have_is_compared() -> None:
    a = Manifest("c", "t", {"x": "1", "y": "2"}, complete=False)
    assert compare(a, Manifest("c", "t", {"y": "2", "z": "3"}, complete=False)) is None
    assert compare(a, Manifest("c", "t", {}, complete=False)) is None
    assert compare(a, Manifest("c", "t", {"y": "3", "x": "0"}, complete=False)).what == "x"  # type: ignore[union-attr]


def test_a_node_with_some_shards_has_part_of_a_manifest(tmp_path: Path) -> None:
    whole = make_manifest(make_tiny_llama(tmp_path, shards=4, n_blocks=6))
    config, files = read_config(tmp_path), ModelFiles(tmp_path)
    needed = files.span_files(config, Span(2, 4))
    for path in tmp_path.glob("model-*.safetensors"):
        if path.name not in needed:
            path.unlink()
    (tmp_path / "tokenizer.json").unlink()
    part = make_manifest(tmp_path)
    assert not part.complete
    assert span_tensors(config, Span(2, 4)).keys() <= part.tensors.keys()
    assert part.tensors.items() < whole.tensors.items()
    assert part.tokenizer_digest is None
    assert tokenizer_digest(tmp_path) is None
    assert compare(part, whole) is None


def test_a_node_without_weights_has_a_manifest_without_tensors(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "m")
    whole = make_manifest(model)
    (model / "model.safetensors").unlink()
    for manifest in (make_manifest(model), load_or_make(model, tmp_path / "cache", quiet)):
        assert manifest == dataclasses.replace(whole, tensors={}, complete=False)
        assert compare(manifest, whole) is None


def test_the_cache_spares_reading(tmp_path: Path) -> None:
    model, cache = make_tiny_llama(tmp_path / "m", shards=3), tmp_path / "cache"
    first, second = Counting(), Counting()
    made = load_or_make(model, cache, first)
    assert made == make_manifest(model)
    assert load_or_make(model, cache, second) == made
    assert first.total > 0
    assert second.total == 0
    # another way to the same directory
    again = Counting()
    (tmp_path / "link").symlink_to(model)
    assert load_or_make(tmp_path / "link", cache, again) == made
    assert again.total == 0


def test_only_a_changed_file_is_read_again(tmp_path: Path) -> None:
    tiny = TinyLlama(shards=3)
    model, cache = make_tiny_llama(tmp_path / "m", tiny), tmp_path / "cache"
    load_or_make(model, cache, quiet)
    file_name = ModelFiles(model).file_of(UP)
    other = make_tiny_llama(tmp_path / "other", tiny)
    replace_tensor(other, tiny, UP)
    shutil.copyfile(other / file_name, model / file_name)
    counting = Counting()
    manifest = load_or_make(model, cache, counting)
    assert manifest == make_manifest(model)
    config = read_config(model)
    of_file = [
        4 * _items(shape)
        for name, shape in span_tensors(config, whole_model(config)).items()
        if ModelFiles(model).file_of(name) == file_name
    ]
    assert counting.total == sum(of_file)


def test_same_size_and_time_but_another_file_is_read_again(tmp_path: Path) -> None:
    tiny = TinyLlama()
    model, cache = make_tiny_llama(tmp_path / "m", tiny), tmp_path / "cache"
    load_or_make(model, cache, quiet)
    path = model / "model.safetensors"
    status = path.stat()
    path.rename(tmp_path / "old")
    replace_tensor(model, tiny, UP)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert load_or_make(model, cache, quiet) == make_manifest(model)


def test_a_file_overwritten_in_place_with_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    tiny = TinyLlama()
    model, cache = make_tiny_llama(tmp_path / "m", tiny), tmp_path / "cache"
    old = load_or_make(model, cache, quiet)
    path = model / "model.safetensors"
    status = path.stat()
    other = make_tiny_llama(tmp_path / "other", tiny)
    replace_tensor(other, tiny, UP)
    path.write_bytes((other / "model.safetensors").read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_ino) == (status.st_size, status.st_ino)
    assert load_or_make(model, cache, quiet) == make_manifest(model) != old


def test_a_shard_that_arrives_is_read(tmp_path: Path) -> None:
    model, cache = make_tiny_llama(tmp_path / "m", shards=3), tmp_path / "cache"
    shard = model / ModelFiles(model).file_of(EMBEDDING)
    shard.rename(tmp_path / "later")
    assert not load_or_make(model, cache, quiet).complete
    (tmp_path / "later").rename(shard)
    manifest = load_or_make(model, cache, quiet)
    assert manifest.complete
    assert manifest == make_manifest(model)


def test_config_and_tokenizer_are_never_cached(tmp_path: Path) -> None:
    model, cache = make_tiny_llama(tmp_path / "m"), tmp_path / "cache"
    before = load_or_make(model, cache, quiet)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    (model / "tokenizer.json").write_text("{}")
    after = load_or_make(model, cache, quiet)
    assert after.config_digest != before.config_digest
    assert after.tokenizer_digest != before.tokenizer_digest
    assert after.tensors == before.tensors


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 99, "files": {}}', '{"format": 1, "files": {"model.safetensors": 3}}',
     '{"format": 1, "files": {"model.safetensors": {"identity": [1], "tensors": {}}}}'],
)  # fmt: skip
def test_a_damaged_cache_is_made_again(content: str, tmp_path: Path) -> None:
    model, cache = make_tiny_llama(tmp_path / "m"), tmp_path / "cache"
    manifest = load_or_make(model, cache, quiet)
    (path,) = cache.iterdir()
    good = path.read_text()
    path.write_text(content)
    assert load_or_make(model, cache, quiet) == manifest
    assert path.read_text() == good
    assert [entry.name for entry in cache.iterdir()] == [path.name]  # no temporary file is left


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "m")

    def touch(done: int, total: int) -> None:
        os.utime(model / "model.safetensors", ns=(1, 1 + done))

    with pytest.raises(ModelError, match=r"model.safetensors: changed while it was read"):
        load_or_make(model, tmp_path / "cache", touch)
    assert not (tmp_path / "cache").exists()


def run_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-m", "dgn_backends.manifest", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_prints_a_manifest(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "m")
    done = run_command(model, "--cache", tmp_path / "cache")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    expected = make_manifest(model)
    assert manifest_from_json(done.stdout) == expected
    assert json.loads(done.stdout)["digest"] == expected.digest
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = run_command(tmp_path / "none", "--cache", tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"{tmp_path / 'none' / 'config.json'}: No such file or directory\n"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "m")
    (tmp_path / "file").write_text("")
    done = run_command(model, "--cache", tmp_path / "file")
    assert (done.returncode, done.stderr) == (0, "")
    assert manifest_from_json(done.stdout) == make_manifest(model)


def test_the_command_is_of_low_priority(tmp_path: Path) -> None:
    script = (
        "import os, sys; from dgn_backends.manifest_cache import main; "
        "code = main(sys.argv[1:]); print(os.nice(0), file=sys.stderr); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(make_tiny_llama(tmp_path / "m")), "--cache", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "19\n"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"config_digest": 1}'])
def test_foreign_json_is_no_manifest(text: str) -> None:
    with pytest.raises(ValueError, match=r"manifest|Expecting"):
        manifest_from_json(text)
