"""`dgnctl chat`: a conversation in a terminal or over pipes."""

from __future__ import annotations

import contextlib
import random
import sys
from typing import Any

import click
import msgspec

from dgnctl.chat_commands import carry_out
from dgnctl.chat_conversation import Conversation
from dgnctl.chat_link import Link
from dgnctl.chat_talk import Talk
from dgnctl.options import connect_client, socket_option
from dgnctl.sampling import generation_options, template
from dgnctl.terminal import ending_signals, hang_ups, kept_settings, open_screen


@click.command()
@generation_options
@click.option(
    "--session", metavar="NAME", help="Keep the context in dgnd under this name; go on with it later."
)
@socket_option
@click.pass_context
def chat(ctx: click.Context, /, session: str | None, **options: Any) -> int:
    """Chat with the model in this terminal.

    Type help there for what can be typed. Space or Ctrl-C stops an answer. Where stdin is no terminal, each
    line of it is answered on stdout.
    """
    screen = open_screen()
    params = template(**options)
    if screen.interactive and params.seed is None:  # so that what is saved goes on alike
        params = msgspec.structs.replace(params, seed=random.getrandbits(32))
    talk = Talk(params)
    link = Link(lambda: connect_client(ctx, params.wait), session)
    if session and (ids := link.token_ids()):
        talk.go_on_from(ids)
    conversation = Conversation(link, screen, talk, carry_out)
    with (
        ending_signals(),
        kept_settings(sys.stdin.fileno()) if screen.interactive else contextlib.nullcontext(),
        hang_ups(screen),
    ):
        return conversation.hold()
