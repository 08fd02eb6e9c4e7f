"""A conversation as a JSON file: messages, sampling, the model's fingerprint, token ids. Knows no daemon.

The token ids give the same next tokens again. They count only for the model that they are of, and only while
the messages are those that they came with: who edits the messages gets what the messages say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from dgnctl.chat_talk import Exchange, Talk
from dgnctl.whole_file import read_bounded, write_whole
from dgnd.control.api import ChatMessage, GenerateParams
from dgnd.errors import BadRequest

FORMAT: Final = "dgn-chat-1"


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """The settings of a chat; null: the model's own."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: list[str] = []
    stop_ids: list[list[int]] = []


class SavedChat(msgspec.Struct, frozen=True):
    """What the file holds; all but `messages` may be left out."""

    messages: list[ChatMessage]
    format: str = FORMAT
    model: str = ""
    fingerprint: str = ""  #: of the model; empty where it was not known
    saved: str = ""  #: ISO 8601, UTC
    sampling: Sampling = Sampling()
    begins: list[int | None] = []  #: for each message of the user, the token ids before it
    messages_digest: str = ""  #: of the messages that the token ids came with
    token_ids: list[int] | None = None


def saved(talk: Talk, model: str, fingerprint: str, when: str) -> SavedChat:
    """The conversation as it is now.

    Raises:
        BadRequest: it has parts of which only token ids are known.
    """
    if talk.earlier:
        raise BadRequest("this conversation began with token ids alone; save it as .csv")
    messages = talk.messages()
    names = Sampling.__struct_fields__
    return SavedChat(
        messages=messages,
        model=model,
        fingerprint=fingerprint,
        saved=when,
        sampling=Sampling(**{name: getattr(talk.params, name) for name in names}),
        begins=[each.begin for each in talk.exchanges],
        messages_digest=_digest(messages),
        token_ids=talk.ids,
    )


def restored(chat: SavedChat, params: GenerateParams, model: str, fingerprint: str) -> Talk:
    """The conversation again, to go on with `model`; `params` say what a file does not.

    Raises:
        BadRequest: the messages are in no order that makes a conversation.
    """
    rest = list(chat.messages)
    system = rest.pop(0).content if rest and rest[0].role == "system" else None
    roles = [message.role for message in rest]
    if len(rest) % 2 or roles != ["user", "assistant"] * (len(rest) // 2):
        raise BadRequest("its messages must be one of system, if any, then user and assistant in turns")
    sampling = {name: getattr(chat.sampling, name) for name in Sampling.__struct_fields__}
    talk = Talk(msgspec.structs.replace(params, system=system, **sampling))
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    same = chat.model == model if not (chat.fingerprint and fingerprint) else chat.fingerprint == fingerprint
    if same and chat.token_ids is not None and chat.messages_digest == _digest(chat.messages):
        begins = chat.begins if len(chat.begins) == len(pairs) else [None] * len(pairs)
        talk.ids = list(chat.token_ids)
    else:
        begins = [None] * len(pairs)
        talk.ids = None if pairs else []
    talk.exchanges = [
        Exchange(said.content, answer.content, begin)
        for (said, answer), begin in zip(pairs, begins, strict=True)
    ]
    return talk


def write_chat(path: Path, chat: SavedChat, mode: int = 0o666) -> None:
    """Replaces what was there. Raises BadRequest when it can't be written."""
    write_whole(path, encode(chat), mode)


def encode(chat: SavedChat) -> bytes:
    """One line for each field, and for each message."""
    lines = []
    for name in ("format", "model", "fingerprint", "saved", "sampling"):
        lines.append(f'  "{name}": {_json(getattr(chat, name))}')
    messages = ",\n".join(f"    {_json(message)}" for message in chat.messages)
    lines.append(f'  "messages": [\n{messages}\n  ]' if messages else '  "messages": []')
    for name in ("begins", "messages_digest", "token_ids"):
        lines.append(f'  "{name}": {_json(getattr(chat, name))}')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read_chat(path: Path) -> SavedChat:
    """What a file holds.

    Raises:
        BadRequest: it can't be read, or is something else; says where.
    """
    data = read_bounded(path, "file of a conversation")
    try:
        chat = msgspec.json.decode(data, type=SavedChat)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path}: is no saved conversation: {error}; give a file that /save wrote") from None
    if chat.format != FORMAT:
        raise BadRequest(f"{path}: has the format {chat.format!r}; this dgnctl reads {FORMAT!r}")
    bad = [
        begin for begin in chat.begins if begin is not None and not 0 <= begin <= len(chat.token_ids or ())
    ]
    if bad:
        raise BadRequest(f"{path}: begins has {bad[0]}, beyond its token ids")
    return chat


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _digest(messages: Sequence[ChatMessage]) -> str:
    return hashlib.blake2b(msgspec.json.encode(messages), digest_size=8).hexdigest()
