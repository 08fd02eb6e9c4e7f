"""Where conversations are kept: a directory of the user's own, one file each. Knows no daemon."""

from __future__ import annotations

import datetime
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from dgnctl.chat_file import SavedChat, read_chat, write_chat
from dgnd.errors import BadRequest, NotFound

LAST: Final = "last"
_ID: Final = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")
_HISTORY_BYTES: Final = 1 << 20
_CURE: Final = "see its owner and mode, or set $XDG_STATE_HOME to another directory"


class KeptChat(msgspec.Struct, frozen=True):
    """One conversation in a list. `problem`: why it can't be read."""

    id: str
    saved: str
    model: str
    messages: int
    begins: str  #: what was said first
    problem: str = ""


def state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """`$XDG_STATE_HOME/dgn`, else `~/.local/state/dgn`."""
    found = (os.environ if environ is None else environ).get("XDG_STATE_HOME", "")
    return (Path(found) if found.startswith("/") else Path.home() / ".local" / "state") / "dgn"


class ChatStore:
    """The conversations in `directory`; only its owner may read them."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or state_dir() / "chats"

    def new_id(self) -> str:
        """For a conversation that begins now; later ones sort behind it."""
        return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"

    def path(self, name: str) -> Path:
        """The file of a conversation, by its whole id."""
        return self.directory / f"{name}.json"

    def write(self, name: str, chat: SavedChat) -> None:
        """Replaces what was kept of it. Raises BadRequest."""
        _make_private(self.directory)
        write_chat(self.path(name), chat, mode=0o600)

    def ids(self) -> list[str]:
        """All, the oldest first."""
        try:
            found = (path for path in self.directory.iterdir() if path.suffix == ".json")
            names = sorted(path.stem for path in found if path.is_file())  # a pipe would be waited for
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BadRequest(f"{self.directory}: can't be read: {error.strerror}; {_CURE}") from None
        return [name for name in names if _ID.fullmatch(name)]

    def last(self) -> str:
        """The one that was held last. Raises NotFound."""
        found = [(self.path(name).stat().st_mtime_ns, name) for name in self.ids()]
        if not found:
            raise NotFound(f"no conversation is kept in {self.directory}; begin one: dgnctl chat")
        return max(found)[1]

    def find(self, wanted: str) -> str:
        """The id that begins so; `last` is the one that was held last. Raises NotFound, BadRequest."""
        if wanted == LAST:
            return self.last()
        found = [name for name in self.ids() if wanted and name.startswith(wanted)]
        if len(found) > 1:
            raise BadRequest(f"{wanted!r} is the begin of {len(found)} conversations; give more of the id")
        if not found:
            raise NotFound(f"no conversation {wanted!r} is kept; see: dgnctl chats list")
        return found[0]

    def read(self, name: str) -> SavedChat:
        """A conversation by its whole id. Raises BadRequest."""
        return read_chat(self.path(name))

    def remove(self, name: str) -> None:
        """Deletes it. Raises BadRequest."""
        try:
            self.path(name).unlink(missing_ok=True)
        except OSError as error:
            raise BadRequest(f"{self.path(name)}: can't be removed: {error.strerror}; {_CURE}") from None

    def entries(self) -> list[KeptChat]:
        """All of them in a few words each, the newest first."""
        found = []
        for name in reversed(self.ids()):
            try:
                chat = self.read(name)
            except BadRequest as error:
                found.append(KeptChat(name, "", "", 0, "", error.message))
                continue
            first = next((message.content for message in chat.messages if message.role == "user"), "")
            found.append(
                KeptChat(name, chat.saved, chat.model, len(chat.messages), " ".join(first.split())[:200])
            )
        return found


def history_file(directory: Path | None = None) -> Path:
    """What was typed in chats, for its owner alone; shortened where it has grown long. Raises BadRequest."""
    path = (directory or state_dir()) / "chat_history"
    _make_private(path.parent)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        if path.stat().st_size > _HISTORY_BYTES:
            rest = path.read_bytes()[-_HISTORY_BYTES // 2 :]
            path.write_bytes(rest[rest.find(b"\n\n") + 1 :])  # entries have an empty line before them
    except OSError as error:
        raise BadRequest(f"{path}: can't be written: {error.strerror}; {_CURE}") from None
    return path


def _make_private(directory: Path) -> None:
    try:
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{directory}: can't be made: {error.strerror}; {_CURE}") from None
