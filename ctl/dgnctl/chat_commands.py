"""What the commands of a chat do, but for those that end it or only tell of it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from dgnctl import chat_settings
from dgnctl.answer_state import route_in_words, speed
from dgnctl.chat_conversation import Conversation
from dgnctl.chat_file import SavedChat, read_chat, restored, saved, write_chat
from dgnctl.chat_talk import Talk
from dgnctl.output import emit, table
from dgnctl.peers import describe_connected, describe_peers
from dgnctl.speeds import ms
from dgnctl.token_file import read_ids, write_ids
from dgnd.control import api
from dgnd.errors import BadRequest, NoDaemon, NotFound


def carry_out(chat: Conversation, name: str, argument: str) -> None:
    """One command, by its name. Raises DgnError."""
    _COMMANDS[name](chat, argument)


def _peers(chat: Conversation, _: str) -> None:
    emit(describe_peers(chat.link.client().call("peers.list")))


def _connect(chat: Conversation, addr: str) -> None:
    emit(describe_connected(chat.link.client().call("peers.connect", api.ConnectParams(addr=addr))))


def _clear(chat: Conversation, _: str) -> None:
    chat.forget_pending()
    chat.link.put([], None)
    chat.talk.clear()
    chat.synced = True
    chat.state.used = 0
    before = chat.kept.ended() if chat.kept is not None else ""
    kept = f"(forgotten; what is kept goes with 'dgnctl chats rm {before}')"  # fits into 80 columns
    chat.screen.note(kept if before else "(the conversation is forgotten)")


# --- files


def snapshot(chat: Conversation) -> SavedChat:
    """The conversation as a file has it. Raises BadRequest where its words are not known."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    model = chat.model
    name, fingerprint = (model.name, model.digest) if model else (chat.talk.params.model or "", "")
    return saved(chat.talk, name, fingerprint, now)


def _save(chat: Conversation, argument: str) -> None:
    path = Path(argument).expanduser()
    if path.suffix.lower() == ".csv":
        ids = chat.talk.ids
        if ids is None:
            chat.catch_up()
            ids = chat.link.token_ids()
        if not ids:
            raise BadRequest("nothing was said yet that could be saved; say something first")
        write_ids(path, ids)
        chat.screen.note(f"({len(ids)} token ids written to {path})")
        return
    try:
        chat.look_at_models()
    except NoDaemon:  # what is known of the model does: above all when dgnd is gone, nothing may be lost
        chat.link.lose()
    found = snapshot(chat)
    write_chat(path, found)
    chat.screen.note(f"({len(found.messages)} messages written to {path})")


def _load(chat: Conversation, argument: str) -> None:
    path = Path(argument).expanduser()
    if path.suffix.lower() == ".csv":
        ids = read_ids(path)
        talk = Talk(chat.talk.params)
        talk.go_on_from(ids)
        _adopt(chat, talk)
        if chat.kept is not None:
            chat.kept.ended()
        chat.screen.note(f"({len(ids)} token ids read from {path}; the conversation goes on from there)")
        return
    found = read_chat(path)
    chat.look_at_models()
    take_up(chat, found, str(path))
    if chat.kept is not None:
        chat.kept.ended()
    chat.screen.note(
        f"({len(found.messages)} messages read from {path}; the conversation goes on from there)"
    )


def take_up(chat: Conversation, found: SavedChat, where: str) -> None:
    """Goes on with a saved conversation, with the model that is talked with. Raises BadRequest."""
    model = chat.model
    try:
        talk = restored(
            found,
            chat.talk.params,
            model.name if model else chat.talk.params.model or "",
            model.digest if model else "",
        )
    except BadRequest as error:
        raise BadRequest(f"{where}: {error.message}") from None
    if talk.ids is None and found.token_ids is not None:
        chat.screen.note("(it was held with another model, or was edited: the messages are read again)")
    _adopt(chat, talk)


def _adopt(chat: Conversation, talk: Talk) -> None:
    """The chat goes on with `talk`, once dgnd has taken its token ids."""
    if talk.ids is not None:
        chat.link.put(talk.ids, talk.params.model)
    chat.forget_pending()
    chat.talk, chat.synced = talk, talk.ids is not None
    chat.state.used = len(talk.ids or ())


# --- asking again


def _regenerate(chat: Conversation, _: str) -> None:
    before = chat.talk.exchanges[-1].answer if chat.talk.exchanges and chat.pending is None else None
    seed = chat.talk.params.seed
    if seed is not None:  # the same seed would give the same answer
        chat.talk.params = msgspec.structs.replace(chat.talk.params, seed=(seed + 1) % 2**64)
    chat.say_instead(None)
    if before is not None and chat.talk.exchanges[-1].answer == before:
        chat.screen.note("(the same again: the likeliest tokens are taken; try /set temperature 0.7)")


def _edit(chat: Conversation, text: str) -> None:
    if text:
        chat.say_instead(text)
        return
    if not chat.screen.interactive:
        raise BadRequest("/edit takes the text here: /edit TEXT")
    last = chat.pending or (chat.talk.exchanges[-1].said if chat.talk.exchanges else None)
    if last is None:
        raise BadRequest("nothing was said yet that could be changed; say something first")
    chat.begin_with, chat.editing = last, True


# --- settings


def _system(chat: Conversation, text: str) -> None:
    if not text:
        emit(f"{chat.talk.params.system or 'no system message; /system TEXT gives one'}\n")
        return
    chat.talk.set_system(None if text.lower() in chat_settings.UNSET else text)
    chat.screen.note(
        "(the conversation has no system message)"
        if text.lower() in chat_settings.UNSET
        else "(the system message counts from the next answer on)"
    )


def _set(chat: Conversation, argument: str) -> None:
    if argument:
        chat.talk.params = chat_settings.changed(chat.talk.params, argument)
        return
    emit(chat_settings.describe(chat.talk.params))


def _stop(chat: Conversation, text: str) -> None:
    if text:
        chat.talk.params = chat_settings.stopping(chat.talk.params, text)
        shown = ", ".join(json.dumps(each, ensure_ascii=False) for each in chat.talk.params.stop)
        chat.screen.note(f"(answers end before {shown})")
    else:
        chat.talk.params = msgspec.structs.replace(chat.talk.params, stop=[])
        chat.screen.note("(answers end where the model ends them)")


def _model(chat: Conversation, name: str) -> None:
    chat.look_at_models()
    names = [model.name for model in chat.models]
    if not name:
        current = chat.model
        rows = [
            ["*" if model is current else "", model.name, str(model.context), model.missing or "nothing"]
            for model in chat.models
        ]
        emit(table(["", "model", "context", "missing"], rows))
        return
    if name not in names:
        raise NotFound(f"no model {name!r} is configured; there is: {', '.join(names) or 'none'}")
    chat.talk.set_model(name)
    chat.state.of(chat.models, name)
    chat.state.route = ()
    chat.forget_pending()
    chat.screen.note(
        f"({name} reads the conversation with the next message)"
        if chat.talk.exchanges
        else f"({name} answers from now on)"
    )


# --- how it goes


def _stats(chat: Conversation, _: str) -> None:
    used = chat.state.used
    share = (
        f" of {chat.state.context} tokens ({100 * used // chat.state.context} %)"
        if chat.state.context
        else ""
    )
    lines = []
    if chat.last is not None:
        last, times = chat.last, chat.last.timings
        rate = speed(last)
        lines = [
            f"answer    {last.usage.completion_tokens} tokens in {times.prefill_s + times.decode_s:.2f} s"
            + (f", {rate:.1f} tok/s" if rate else ""),
            f"prompt    {last.usage.prompt_tokens} tokens, first token after {times.ttft_s:.2f} s",
            f"ended     {last.finish_reason}, {'exact' if last.exact else 'not exact'}",
            f"route     {route_in_words(last.route)}",
            f"logs      dgnctl logs --generation {last.generation}",
        ]
    lines.append(f"context   {used}{share}" if share else f"context   {used} tokens")
    lines.append(f"messages  {len(chat.talk.messages())}")
    emit("\n".join(lines) + "\n")


def _route(chat: Conversation, _: str) -> None:
    status: api.Status = chat.link.client().call("status")
    route = next((each.route for each in status.sessions if each.id == chat.link.session), None)
    route = route or list(chat.state.route)
    if not route:
        emit("no route yet: it is chosen with the first answer\n")
        return
    speeds = {(each.peer, each.model): each for each in status.speeds}
    rows = []
    for hop in route:
        said = speeds.get((hop.peer, chat.state.model))
        figures = next((each for each in (said.figures if said else ()) if each.span == hop.span), None)
        step = "-" if figures is None or figures.step_ms is None else ms(figures.step_ms)
        trip = "-" if said is None or said.trip_ms is None else ms(said.trip_ms)
        rows.append([hop.name or hop.peer, step, trip, hop.span])
    emit(table(["node", "ms a token", "ms round trip", "computes"], rows))


_COMMANDS: Final[dict[str, Callable[[Conversation, str], None]]] = {
    "peers": _peers,
    "connect": _connect,
    "clear": _clear,
    "save": _save,
    "load": _load,
    "regenerate": _regenerate,
    "edit": _edit,
    "system": _system,
    "set": _set,
    "stop": _stop,
    "model": _model,
    "stats": _stats,
    "route": _route,
}
