"""What the shell offers for a word that is a name: models, peers and sessions, asked of the running dgnd.

A completion never fails and never keeps a shell waiting: where nobody answers at once, nothing is offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import click

from dgnctl.options import connect_client
from dgnd.errors import DgnError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Seconds for an answer of dgnd. A shell's user waits.
_WITHIN_S: Final = 1.0

Completer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def of_daemon(method: str, names: Callable[[Any], Iterable[tuple[str, str]]]) -> Completer:
    """Offers what a method of the control API answers with; `names`: each with a word of help."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            with connect_client(ctx) as client:
                found = names(client.call(method, timeout_s=_WITHIN_S))
                return _beginning(incomplete, found)
        except (DgnError, OSError):
            return []

    return complete


def _beginning(incomplete: str, found: Iterable[tuple[str, str]]) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    names = dict(found)
    return [
        CompletionItem(name, help=help or None) for name, help in names.items() if name.startswith(incomplete)
    ]


def kept_chats(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Conversations that are kept for this user."""
    from dgnctl.chat_store import LAST, ChatStore

    try:
        ids = ChatStore().ids()
    except (DgnError, OSError):
        return []
    latest = [(LAST, "the latest")] if ids else []
    return _beginning(incomplete, [*latest, *((name, "") for name in reversed(ids))])


model_names = of_daemon("models.list", lambda found: ((model.name, model.local) for model in found))
peer_names = of_daemon(
    "peers.list", lambda found: ((peer.name or peer.id, peer.state) for peer in found.peers)
)
session_names = of_daemon(
    "cache.list", lambda found: ((e.session, e.model) for e in found if e.role == "origin")
)
