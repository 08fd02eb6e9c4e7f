"""Manifests kept on disk, and the command that makes one in the background.

A digest is kept with the identity of the file that it was read from (path, size, times, inode),
file by file: a shard that was added or replaced is read again, the others are not. Knows nothing of what
manifests are for.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dgn_backends.errors import ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.manifest import Manifest, Progress, assemble, digest_tensors, present_tensors
from dgn_backends.weights import ModelFiles, Shape, file_identity, has_weights, span_tensors, whole_model
from dgn_backends.whole_file import write_whole

_FORMAT = 2
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
_IOPRIO_IDLE = 3 << 13

#: Of one file: its identity as it was, and the digests of the tensors read from it.
_Known = dict[str, tuple[list[int], dict[str, str]]]


def load_or_make(
    model_dir: Path, cache_dir: Path, progress: Progress = lambda _done, _total: None
) -> Manifest:
    """The manifest of `model_dir`, reading only the tensors of files that are new or changed since the last
    time.

    `cache_dir` is made if need be. A damaged cache is made again. Raises ModelError for broken model files,
    and when a file changes while it is read. A cache that can't be written is done without.
    """
    model_dir = model_dir.resolve()
    config = read_config(model_dir)
    wanted = span_tensors(config, whole_model(config))
    if not has_weights(model_dir):
        return assemble(model_dir, config, wanted, {})
    files = ModelFiles(model_dir)
    by_file: dict[str, dict[str, Shape]] = {}
    for name, shape in present_tensors(files, wanted).items():
        by_file.setdefault(files.file_of(name), {})[name] = shape
    cache_path = _cache_path(cache_dir, model_dir)
    kept = _read_cache(cache_path)
    identities = {file_name: file_identity(model_dir / file_name) for file_name in by_file}
    known = {
        file_name: kept[file_name]
        for file_name, names in by_file.items()
        if file_name in kept
        and kept[file_name][0] == identities[file_name]
        and kept[file_name][1].keys() >= names.keys()
    }
    new = {
        name: shape for file, names in by_file.items() if file not in known for name, shape in names.items()
    }
    digests = digest_tensors(files, new, progress)
    for file_name, names in by_file.items():
        if file_name in known:
            continue
        if file_identity(model_dir / file_name) != identities[file_name]:
            raise ModelError(f"{model_dir / file_name}: changed while it was read", file=file_name)
        known[file_name] = (identities[file_name], {name: digests[name] for name in names})
    if known != kept:
        with contextlib.suppress(OSError):  # only a cache: without it the files are read again next time
            _write_cache(cache_path, known)
    tensors = {name: known[file][1][name] for file, names in by_file.items() for name in names}
    return assemble(model_dir, config, wanted, tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the manifest of a model directory as one line of JSON; 2 and a line on stderr when it can't."""
    parser = argparse.ArgumentParser(prog="python -m dgn_backends.manifest", description=main.__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where digests are kept")
    options = parser.parse_args(arguments)
    _lower_priority()
    try:
        manifest = load_or_make(options.model_dir, options.cache)
    except (ModelError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({**dataclasses.asdict(manifest), "digest": manifest.digest}))
    return 0


def manifest_from_json(text: str) -> Manifest:
    """What `main` printed, as a value. Raises ValueError when it is something else."""
    match json.loads(text):
        case {
            "config_digest": str(config),
            "tokenizer_digest": str() | None as tokenizer,
            "tensors": dict(tensors),
            "complete": bool(complete),
        }:
            return Manifest(config, tokenizer, tensors, complete)
    raise ValueError("not a manifest")


def _cache_path(cache_dir: Path, model_dir: Path) -> Path:
    key = hashlib.blake2b(os.fsencode(model_dir), digest_size=8).hexdigest()
    return cache_dir / f"manifest-{model_dir.name}-{key}.json"


def _read_cache(path: Path) -> _Known:
    """What is kept, or nothing where there is none or it can't be understood."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    known: _Known = {}
    match value:
        case {"format": int(form), "files": dict(entries)} if form == _FORMAT:
            for file_name, entry in entries.items():
                match entry:
                    case {"identity": list(identity), "tensors": dict(tensors)}:
                        if all(isinstance(digest, str) for digest in tensors.values()):
                            known[file_name] = (identity, tensors)
    return known


def _write_cache(path: Path, known: Mapping[str, tuple[list[int], dict[str, str]]]) -> None:
    """Replaces the cache at once, so that a reader or a crash never sees half of it."""
    files = {name: {"identity": identity, "tensors": tensors} for name, (identity, tensors) in known.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"format": _FORMAT, "files": files}).encode())


def _lower_priority() -> None:
    """Takes only the processor and disk time that nobody else wants, as far as the system lets us."""
    os.nice(19)
    number = _IOPRIO_SET.get(platform.machine())
    if sys.platform == "linux" and number is not None:
        ctypes.CDLL(None).syscall(
            number, 1, 0, _IOPRIO_IDLE
        )  # 1: a process, 0: this one; failing does no harm
