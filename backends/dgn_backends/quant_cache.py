"""Quantised weights of a model, made from its files once and kept on disk, mapped into memory.

An entry is one weight matrix, or several that a backend joins along their rows. It is a file of its own:
what it was made from, then codes, scales and zero points, each from a page's start on, so that a compute
library can use them in place. What an entry was made from is the identity of the files (size, modification
time, inode), the tensors and the scheme; one that was made from something else, or is damaged, is made again
and never used.

    CACHE_DIR/MODEL-PATHHASH/QUANT/ENTRYHASH.q

A directory that can't be written to costs time and nothing else. Knows nothing of what computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dgn_backends.errors import ModelError
from dgn_backends.quant import Quantised, Scheme, empty, quantise_into
from dgn_backends.quant_layout import DIGEST_BYTES, PAGE, digest_of, layout, views
from dgn_backends.quant_plan import scheme_of
from dgn_backends.regular_file import open_regular
from dgn_backends.weights import ModelFiles, Shape, file_identity

log = logging.getLogger(__name__)

_MAGIC = b"dgn-quant-2\n"  # the format's version is part of it
_KEPT_SCHEMES = 2  #: of a model: those used last
_ABANDONED_S = 3600.0  #: a temporary file of this age belongs to a process that was killed


class QuantisedFiles:
    """The matrices of `files` as `quant`, which is not "none"; `shapes` has those of all tensors that may be
    asked for.

    With a `cache_dir`, entries are kept below it, and come mapped and read-only from there. Old entries of
    the same model are removed: those whose files have changed, and those of all but the last schemes used.
    """

    def __init__(
        self,
        files: ModelFiles,
        shapes: Mapping[str, Shape],
        quant: str,
        cache_dir: Path | None,
        *,
        threads: int | None = None,
    ) -> None:
        self._files = files
        self._shapes = shapes
        self._quant = quant
        self._threads = threads or os.cpu_count() or 1
        self._directory: Path | None = None
        self._writable = cache_dir is not None
        self._making = False  # said once, not for each matrix
        if cache_dir is not None:
            path = files.path.resolve()
            key = hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()
            model = cache_dir / f"{path.name}-{key}"
            try:
                _make_folder(model / quant)
                with contextlib.suppress(FileNotFoundError):  # removed by another start just now
                    os.utime(model / quant)
                _tidy(model, path)
            except OSError as error:
                self._give_up(model, error)
            self._directory = model / quant  # what is there may still be read

    @property
    def are_kept(self) -> bool:
        """Whether what is made is kept on disk, and comes mapped from there, as far as is known."""
        return self._writable

    def get(self, *names: str) -> Quantised:
        """The tensors `names` [out, in], one below the other; all are of one scheme.

        Raises ModelError, naming the file and the tensor, for values that can't be quantised, and when a file
        changes while it is read.
        """
        scheme = self._scheme(names)
        sources = self._sources(names)
        target_shape = (sum(self._shapes[name][0] for name in names), self._shapes[names[0]][1])
        if self._directory is None:
            return self._make(names, sources, target_shape, scheme)
        entry = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
        path = self._directory / f"{entry}.q"
        header = _header(scheme, sources)
        kept = _read(path, header, target_shape, scheme)
        if kept is not None:
            return kept
        if not self._making:
            self._making = True
            log.info("%s: making %s weights of %s", self._directory, self._quant, self._files.path)
        made = self._make(names, sources, target_shape, scheme)
        if self._writable:
            try:
                _make_folder(path.parent)
                return _write(path, header, made, target_shape[1])
            except FileNotFoundError:
                pass  # another start, of other schemes, removes the folder; the next entry makes it anew
            except OSError as error:
                self._give_up(path.parent, error)
        return made

    def _make(
        self, names: Sequence[str], sources: list[object], shape: tuple[int, int], scheme: Scheme
    ) -> Quantised:
        target = empty(*shape, scheme)
        row = 0
        for name in names:
            out = self._shapes[name][0]
            tensor = self._files.tensor(name, self._shapes[name])
            try:
                quantise_into(target.rows(slice(row, row + out)), tensor, threads=self._threads)
            except ValueError as error:
                path = self._files.path / self._files.file_of(name)
                raise ModelError(f"{path}: tensor {name} {error}", file=str(path), tensor=name) from error
            self._files.release(name)
            row += out
        if self._sources(names) != sources:
            path = self._files.path / self._files.file_of(names[0])
            raise ModelError(f"{path}: changed while it was read", file=str(path))
        return target

    def _sources(self, names: Sequence[str]) -> list[object]:
        """What an entry is made from: for each tensor its name, shape and file, and the file's identity."""
        return [
            [name, list(self._shapes[name]), file, *file_identity(self._files.path / file)]
            for name in names
            for file in [self._files.file_of(name)]
        ]

    def _scheme(self, names: Sequence[str]) -> Scheme:
        schemes = {scheme_of(self._quant, name) for name in names}
        (scheme,) = schemes
        assert scheme is not None
        return scheme

    def _give_up(self, directory: Path, error: OSError) -> None:
        self._writable = False
        log.warning(
            "%s: quantised weights can't be kept here (%s); each start makes them again",
            directory,
            error.strerror or error,
        )


def _header(scheme: Scheme, sources: list[object]) -> bytes:
    return json.dumps([[scheme.bits, scheme.group], sources]).encode()


def _read(path: Path, header: bytes, shape: tuple[int, int], scheme: Scheme) -> Quantised | None:
    """The entry in `path`, or None where there is none, or it was made from something else or is damaged,
    which the log says."""
    codes, *_, size = layout(shape, scheme)
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                return _unusable(path, f"has {found:,} of {size:,} bytes")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, ModelError) as error:
        return _unusable(path, f"can't be read ({error})")
    written, digest = _parse_header(mapped[:codes])
    if written != header:
        return _unusable(path, "was made from something else")
    if digest != digest_of(np.frombuffer(mapped, np.uint8, size - codes, codes)):
        return _unusable(path, "is damaged: its bytes are not those that were written")
    return views(mapped, shape, scheme)


def _unusable(path: Path, what: str) -> Quantised | None:
    log.warning("%s: this cache of quantised weights %s; it is made again", path, what)
    return None


def _write(path: Path, header: bytes, made: Quantised, in_features: int) -> Quantised:
    """Puts an entry in its place at once, so that nobody ever sees half of it; returns it as it is mapped."""
    shape, scheme = (made.packed.shape[0], in_features), made.scheme
    codes, scales, zeros, size = layout(shape, scheme)
    if len(_MAGIC) + DIGEST_BYTES + 4 + len(header) > codes:
        raise OSError(f"what an entry is made from takes {len(header)} bytes")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w+b") as file:
            # Without holes: tmpfs finds room for one when it is first read, and ends the reader if it can't.
            file.write(bytes(codes))
            for part, end in ((made.packed, scales), (made.scales, zeros), (made.zeros, size)):
                file.write(part.data)
                file.write(bytes(end - file.tell()))
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            digest = digest_of(np.frombuffer(mapped, np.uint8, size - codes, codes))
            file.seek(0)
            file.write(_MAGIC + digest + len(header).to_bytes(4, "little") + header)
            os.fchmod(file.fileno(), 0o400)  # who cuts or overwrites it ends the workers that have it mapped
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return views(mapped, shape, scheme)


def _parse_header(data: bytes) -> tuple[bytes, bytes]:
    """What the entry was made from and its digest; empty where it has no header."""
    if not data.startswith(_MAGIC):
        return b"", b""
    digest, rest = data[len(_MAGIC) :][:DIGEST_BYTES], data[len(_MAGIC) + DIGEST_BYTES :]
    return rest[4 : 4 + int.from_bytes(rest[:4], "little")], digest


def _tidy(model: Path, files: Path) -> None:
    """Removes what nobody will use from the folder of one model, whose files lie in `files`."""
    schemes = sorted(filter(Path.is_dir, model.iterdir()), key=_last_used, reverse=True)
    for folder in schemes[_KEPT_SCHEMES:]:
        shutil.rmtree(folder, ignore_errors=True)  # what is mapped from there stays mapped
    identities: dict[str, list[int] | None] = {}
    for entry in _entries(schemes[:_KEPT_SCHEMES]):
        with contextlib.suppress(OSError, ModelError):  # another process removed it, or it is no file
            if entry.suffix == ".tmp":
                if entry.stat().st_mtime < time.time() - _ABANDONED_S:
                    entry.unlink()
            elif not _is_current(entry, files, identities):
                entry.unlink()


def _make_folder(folder: Path) -> None:
    """It may be gone at once: others remove the folders of schemes that are not among the last used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if folder.exists() and not folder.is_dir():
            raise


def _last_used(folder: Path) -> float:
    """0 where another process has removed it."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _entries(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            yield from folder.iterdir()


def _is_current(entry: Path, files: Path, identities: dict[str, list[int] | None]) -> bool:
    """Whether the files that `entry` was made from are as they were then."""
    with open_regular(entry) as file:
        header, _ = _parse_header(file.read(2 * PAGE))
    try:
        _, sources = json.loads(header)
        for _, _, name, *identity in sources:
            if name not in identities:
                path = files / Path(name).name
                identities[name] = file_identity(path) if path.exists() else None
            if identities[name] != identity:
                return False
    except (ValueError, TypeError):
        _unusable(entry, "has a damaged head")
        return False
    return True
