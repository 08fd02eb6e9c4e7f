"""Keeps the conversation of a chat while it goes on."""

from __future__ import annotations

from dgnctl.chat_commands import snapshot
from dgnctl.chat_conversation import Conversation
from dgnctl.chat_store import ChatStore
from dgnd.errors import BadRequest


class Keeper:
    """Writes it after every answer. Implements `dgnctl.chat_conversation.Kept`."""

    def __init__(self, store: ChatStore, name: str | None = None) -> None:
        self._store = store
        self.name = name or store.new_id()
        self._written = name is not None
        self._failed = False

    def changed(self, chat: Conversation) -> None:
        """Something was answered. What can't be kept is said once, and tried again with the next answer."""
        if chat.talk.earlier:  # its words are not all known
            return
        try:
            if chat.model is None or not chat.model.digest:
                chat.look_at_models()
            self._store.write(self.name, snapshot(chat))
            self._written, self._failed = True, False
        except BadRequest as error:
            if not self._failed:
                chat.screen.note(f"(this conversation is not kept: {error.message})")
            self._failed = True

    def ended(self) -> str:
        """Another conversation begins; returns the id under which the old one is kept, or nothing."""
        before = self.name if self._written else ""
        self.name, self._written = self._store.new_id(), False
        return before
