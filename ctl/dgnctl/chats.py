"""`dgnctl chats`: the conversations that are kept."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dgnctl.chat_file import SavedChat, encode, write_chat
from dgnctl.chat_store import ChatStore
from dgnctl.completion import kept_chats
from dgnctl.options import json_option
from dgnctl.output import emit, emit_json, table
from dgnctl.token_file import write_ids
from dgnd.errors import BadRequest


@click.group()
def chats() -> None:
    """List, show, remove or export kept conversations."""


@chats.command("list")
@json_option
def list_chats(as_json: bool) -> None:
    """List the conversations that are kept, the last one first."""
    store = ChatStore()
    found = store.entries()
    if as_json:
        emit_json(found)
    elif not found:
        emit(f"no conversation is kept in {store.directory}\n")
    else:
        rows = [(e.id, e.model, str(e.messages), e.problem or e.begins) for e in found]
        emit(table(("ID", "MODEL", "MESSAGES", "BEGINS WITH"), rows))


@chats.command()
@click.argument("id", shell_complete=kept_chats)
@json_option
def show(id: str, as_json: bool) -> None:
    """Show what was said in a conversation.

    ID is what `dgnctl chats list` shows, or the begin of it, or last.
    """
    chat = _read(id)
    if as_json:
        emit_json(chat)
        return
    for message in chat.messages:
        emit(f"{message.role}: {message.content.rstrip()}\n\n")


@chats.command()
@click.argument("id", nargs=-1, required=True, shell_complete=kept_chats)
@json_option
def rm(id: tuple[str, ...], as_json: bool) -> None:
    """Remove conversations for good."""
    store = ChatStore()
    names = list(dict.fromkeys(store.find(each) for each in id))  # all of them, before the first one goes
    for name in names:
        store.remove(name)
    if as_json:
        emit_json({"removed": names})
    else:
        emit("".join(f"{name} removed\n" for name in names))


@chats.command()
@click.argument("id", shell_complete=kept_chats)
@click.argument("file")
def export(id: str, file: str) -> None:
    """Write a conversation to FILE, as `/save` does: token ids to a .csv, else JSON. FILE of - is stdout."""
    chat = _read(id)
    if file == "-":
        sys.stdout.buffer.write(encode(chat))
        return
    path = Path(file)
    if path.suffix.lower() != ".csv":
        write_chat(path, chat)
    elif chat.token_ids:
        write_ids(path, chat.token_ids)
    else:
        raise BadRequest("its token ids are not known; export it to a .json, which /load reads")


def _read(wanted: str) -> SavedChat:
    store = ChatStore()
    return store.read(store.find(wanted))
