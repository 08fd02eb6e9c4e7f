"""A TOML file to a `Config`, or one clear line that begins with file:line:column.

Relative paths in the file are relative to the file's own directory. Knows nothing of peers, of models on
disk or of who asks. What the values must be is in `dgnd.config.check`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec
import tomli

from dgn_backends.registry import list_backends
from dgnd.config.build import KeyProblem, build
from dgnd.config.check import check_values
from dgnd.config.locate import KeyPath, Position, locate_keys
from dgnd.config.schema import Config
from dgnd.config.syntax import explained, one_line
from dgnd.errors import ConfigError

MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration and the text it came from, so that later findings can name a line of it."""

    config: Config
    path: Path
    text: str = ""

    def error_at(self, key_path: KeyPath, message: str) -> ConfigError:
        """An error about a key, such as `("blocks", 1, "span")`; points to the nearest place there is."""
        return _error_at(self.path, self.text, key_path, message)


def load_config(path: Path, backends: Collection[str] | None = None) -> LoadedConfig:
    """Reads and checks the file at `path`. An empty file is valid. Raises ConfigError.

    `backends` are the names that a model may give as its backend; by default those that are installed.
    """
    text = _read(path)
    try:
        values = tomli.loads(text)
    except (RecursionError, ValueError) as error:  # ValueError: no TOML, or an integer of thousands of digits
        at, what = explained(text, error)
        message = f"{path}:{at.line}:{at.column}: {what}"
        raise ConfigError(message, file=str(path), line=at.line, column=at.column) from None
    try:
        config = build(values)
        check_values(config, _installed() if backends is None else backends)
    except KeyProblem as problem:
        raise _error_at(path, text, problem.key_path, problem.message) from None
    return LoadedConfig(_resolve_paths(config, path.absolute().parent), path, text)


def _installed() -> set[str]:
    return {entry.name for entry in list_backends()}


def _error_at(path: Path, text: str, key_path: KeyPath, message: str) -> ConfigError:
    try:
        places = locate_keys(text)
    except RecursionError:  # deeper than this scanner goes; no key of ours is there
        places = {}
    here = key_path
    while here and here not in places:
        here = here[:-1]
    at = places.get(here, Position(1, 1))
    return ConfigError(
        f"{path}:{at.line}:{at.column}: {one_line(message)}", file=str(path), line=at.line, column=at.column
    )


def _read(path: Path) -> str:
    try:
        with open(path, "rb", opener=_at_once) as file:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: is a pipe; name a configuration file", file=str(path))
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file", file=str(path)) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: is a directory; name the configuration file in it", file=str(path)
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{path}: can't be read: {reason}", file=str(path)) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{path}: is larger than {MAX_BYTES} bytes; that is no configuration", file=str(path)
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", "replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigError(
            f"{path}:{line}:{column}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8",
            file=str(path), line=line, column=column,
        ) from None  # fmt: skip
    return text.replace("\r\n", "\n")


def _at_once(path: str, flags: int) -> int:
    """A pipe that nobody writes to is not waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def _resolve_paths(config: Config, base: Path) -> Config:
    """`~` and relative paths made absolute."""
    replace = msgspec.structs.replace
    models = {
        name: replace(model, path=model.path and _absolute(base, model.path))
        for name, model in config.models.items()
    }
    return replace(
        config,
        node=replace(config.node, state_dir=_absolute(base, config.node.state_dir)),
        control=replace(
            config.control, socket=config.control.socket and _absolute(base, config.control.socket)
        ),
        http=replace(config.http, keys_file=config.http.keys_file and _absolute(base, config.http.keys_file)),
        models=models,
    )


def _absolute(base: Path, path: Path) -> Path:
    try:
        path = path.expanduser()
    except RuntimeError:  # no home directory for that user: the name stands as it is written
        pass
    return base / path
