"""`dgnctl chat`: a conversation in a terminal or over pipes."""

from __future__ import annotations

import contextlib
import random
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from dgnctl.chat_commands import carry_out, take_up
from dgnctl.chat_conversation import Conversation
from dgnctl.chat_file import Sampling, SavedChat
from dgnctl.chat_keeper import Keeper
from dgnctl.chat_link import Link
from dgnctl.chat_store import LAST, ChatStore, history_file
from dgnctl.chat_talk import Talk
from dgnctl.completion import kept_chats, session_names
from dgnctl.options import connect_client, socket_option
from dgnctl.sampling import generation_options, template
from dgnctl.screen import Screen
from dgnctl.terminal import ending_signals, hang_ups, kept_settings, open_screen
from dgnd.control.api import GenerateParams
from dgnd.errors import BadRequest


@click.command()
@generation_options
@click.option(
    "--session",
    metavar="NAME",
    shell_complete=session_names,
    help="Keep the context in dgnd under this name; go on with it later.",
)
@click.option(
    "--resume", is_flag=False, flag_value=LAST, metavar="[ID]", shell_complete=kept_chats,
    help="Go on with a kept conversation, the last one if no ID is given; see dgnctl chats.",
)  # fmt: skip
@click.option("--no-keep", is_flag=True, help="Keep neither the conversation nor what is typed.")
@socket_option
@click.pass_context
def chat(
    ctx: click.Context, /, session: str | None, resume: str | None, no_keep: bool, **options: Any
) -> int:
    """Chat with the model in this terminal.

    Type help there for what can be typed. Space or Ctrl-C stops an answer. Where stdin is no terminal, each
    line of it is answered on stdout.
    """
    given = template(**options)
    store = ChatStore()
    name = None if resume is None else store.find(resume)
    found = None if name is None else store.read(name)
    if found is not None and session:
        raise BadRequest("--resume and --session both say what to go on with; give one of them")
    screen = open_screen(lambda: None if no_keep else _history())
    params = given
    if screen.interactive and params.seed is None:  # so that what is saved goes on alike
        params = msgspec.structs.replace(params, seed=random.getrandbits(32))
    talk = Talk(params)
    link = Link(lambda: connect_client(ctx, params.wait), session)
    if session and (ids := link.token_ids()):
        talk.go_on_from(ids)
    keeper = Keeper(store, name) if screen.interactive and not no_keep else None
    conversation = Conversation(link, screen, talk, carry_out, keeper)
    if found is not None:
        _go_on(conversation, found, given, str(store.path(name or "")))
    with (
        ending_signals(),
        kept_settings(sys.stdin.fileno()) if screen.interactive else contextlib.nullcontext(),
        hang_ups(screen),
    ):
        return conversation.hold()


def _go_on(conversation: Conversation, found: SavedChat, given: GenerateParams, where: str) -> None:
    """Takes up a kept conversation, with its own model if that is here; options that were given go first."""
    conversation.look_at_models()
    if given.model is None and found.model in {model.name for model in conversation.models}:
        conversation.talk.params = msgspec.structs.replace(conversation.talk.params, model=found.model)
    take_up(conversation, found, where)
    chosen = {
        name: value
        for name in Sampling.__struct_fields__
        if (value := getattr(given, name)) not in (None, [])
    }
    conversation.talk.params = msgspec.structs.replace(conversation.talk.params, **chosen)
    if given.system not in (None, conversation.talk.params.system):
        conversation.talk.set_system(given.system)
    if conversation.screen.interactive:
        _remind(conversation.screen, conversation.talk, found.saved)


def _remind(screen: Screen, talk: Talk, saved: str) -> None:
    screen.note(f"({len(talk.messages())} messages, the last of {saved}; the conversation goes on)")
    if talk.exchanges:
        last = talk.exchanges[-1]
        screen.note("> " + last.said.replace("\n", "\n… "))
        with screen.answering(lambda: "") as answer:
            answer.add(last.answer)


def _history() -> Path | None:
    try:
        return history_file()
    except BadRequest as error:
        click.echo(f"dgnctl: what is typed is not kept: {error.message}", err=True)
        return None
