"""Whether a model's files are still those that this node announced.

A worker may start again at any time, and reads the files anew; what it then serves must be what the node's
manifest says. As long as the files' identities are the same nothing is read; where they differ, the digests
decide. Knows nothing of workers or peers.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import trio

from dgn_backends.manifest import TOKENIZER_FILE, Manifest, compare
from dgn_backends.manifest_cache import manifest_from_json
from dgn_backends.weights import INDEX_FILE, SINGLE_FILE, ModelFiles, file_identity
from dgnd.children import module_command
from dgnd.errors import ModelError
from dgnd.workers.signal_name import signal_name

log = logging.getLogger(__name__)

#: Between two tries to make digests, where the child that makes them was killed.
_FIRST_DELAY_S, _MOST_DELAY_S = 1.0, 30.0


class Seal:
    """The files of one model directory as they were when this was made; made before any of them is read."""

    def __init__(self, path: Path, cache: Path) -> None:
        """`cache`: where digests are kept."""
        self._path = path
        self._cache = cache
        self._identities = files_identity(path)
        self._manifest: Manifest | None = None
        self._made = trio.Event()
        self._refused: tuple[dict[str, list[int]], str] | None = None  #: files that are other ones, and how

    async def make(self) -> Manifest:
        """The manifest of the files, for once. Raises ModelError, also when they change meanwhile."""
        try:
            manifest = await self._digests()
            if not self.holds():
                raise ModelError(f"{self._path}: its files changed while dgnd started; restart dgnd")
            self._manifest = manifest
        finally:
            self._made.set()
        return manifest

    def holds(self) -> bool:
        """Whether no file was touched."""
        return files_identity(self._path) == self._identities

    async def check(self) -> None:
        """Makes sure that the files say what the manifest says, reading only those that were touched.

        Raises ModelError, one line that says what to do.
        """
        if self.holds():
            return
        await self._made.wait()
        now = files_identity(self._path)
        if self._refused is None or self._refused[0] != now:
            why = await self._difference()
            if not why:
                self._identities = now  # what changed after this will be found by the next check
                return
            self._refused = (now, why)
        raise ModelError(
            f"{self._path}: its files are not those that this node announced: {self._refused[1]}; "
            "put those back, or restart dgnd to serve these"
        )

    async def _difference(self) -> str:
        if self._manifest is None:
            return "they changed while dgnd started"
        try:
            difference = compare(self._manifest, await self._digests())
        except ModelError as error:
            return error.message
        return "" if difference is None else str(difference)

    async def _digests(self) -> Manifest:
        """Has the digests made in a low-priority child, which reads each state of a file once."""
        command = module_command("dgn_backends.manifest", str(self._path), "--cache", str(self._cache))
        delay_s = _FIRST_DELAY_S
        while True:
            result = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
            if result.returncode >= 0:
                break
            name = signal_name(-result.returncode)
            log.warning("digests of %s: killed by %s; again in %.0f s", self._path, name, delay_s)
            await trio.sleep(
                delay_s
            )  # whoever killed it, the kernel for lack of memory say, says nothing of it
            delay_s = min(2 * delay_s, _MOST_DELAY_S)
        if result.returncode == 0:
            try:
                return manifest_from_json(result.stdout.decode())
            except ValueError as error:
                raise ModelError(f"digests of {self._path}: {error}") from None
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise ModelError(lines[-1] if lines else f"digests of {self._path}: exit code {result.returncode}")


def files_identity(path: Path) -> dict[str, list[int]]:
    """The identities of the files in `path` that a manifest is made of, as far as they are there."""
    names = {"config.json", TOKENIZER_FILE, SINGLE_FILE, INDEX_FILE}
    with contextlib.suppress(ModelError):  # no weights here, or an index that making the manifest refuses
        names |= ModelFiles(path).file_names()
    found: dict[str, list[int]] = {}
    for name in sorted(names):
        with contextlib.suppress(OSError):
            found[name] = file_identity(path / name)
    return found
