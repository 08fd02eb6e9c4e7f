"""A conversation as values, its file, and the settings of a chat. Nothing here is asked of a daemon."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgnctl import chat_line, chat_settings
from dgnctl.chat_file import SavedChat, encode, read_chat, restored, saved, write_chat
from dgnctl.chat_talk import Exchange, Talk
from dgnd.control.api import ChatMessage, GenerateParams, GenerateResult, Timings, Usage
from dgnd.errors import BadRequest


def answer(prompt_ids: list[int], ids: list[int], text: str = "yes") -> GenerateResult:
    usage, times = Usage(len(prompt_ids), len(ids)), Timings(0.1, 0.1, 0.1)
    return GenerateResult(text, ids, prompt_ids, "stop", True, usage, times, [])


def talk(*said: str, system: str | None = None) -> Talk:
    """A conversation of these messages, each with two ids and two of its answer."""
    found = Talk(GenerateParams(system=system, seed=5))
    for text in said:
        before = found.ids or []
        found.answered(text, answer([*before, 1, 2], [3, 4], text.upper()))
    return found


def test_the_first_request_has_the_system_message_and_later_ones_the_prompt_alone() -> None:
    found = Talk(GenerateParams(system="be brief", temperature=0.5))
    first = found.request("hello", "s")
    assert (first.prompt, first.system, first.messages, first.session) == ("hello", "be brief", None, "s")
    found.answered("hello", answer([1, 2], [3]))
    second = found.request("and?", "s")
    assert (second.prompt, second.system, second.temperature) == ("and?", None, 0.5)
    assert found.ids == [1, 2, 3]


def test_what_is_taken_back_leaves_the_ids_before_it() -> None:
    found = talk("a", "b")
    assert found.take_back() == Exchange("b", "B", 4)
    assert found.ids == [1, 2, 3, 4]
    assert found.take_back().said == "a"
    assert (found.ids, found.fresh) == ([], True)
    with pytest.raises(BadRequest, match="nothing was said"):
        found.take_back()


def test_another_system_message_has_all_read_again() -> None:
    found = talk("a", system="old")
    found.set_system("new")
    request = found.request("b", "s")
    assert request.messages == [
        ChatMessage("system", "new"),
        ChatMessage("user", "a"),
        ChatMessage("assistant", "A"),
        ChatMessage("user", "b"),
    ]
    assert (request.prompt, request.system) == (None, None)
    found.answered("b", answer([9, 9], [8]))
    assert found.request("c", "s").prompt == "c"
    found.take_back()  # where it began is not known
    assert found.ids is None
    assert found.request("d", "s").messages is not None


def test_another_model_has_all_read_again_unless_words_are_unknown() -> None:
    found = talk("a")
    found.set_model("other")
    assert found.request("b", "s").model == "other"
    assert found.ids is None
    found.go_on_from([1, 2, 3])
    with pytest.raises(BadRequest, match="token ids"):
        found.set_model("third")
    found.set_system("now")
    assert found.request("b", "s").system == "now"
    found.answered("b", answer([1, 2, 3, 4], [5]))
    assert found.request("c", "s").system is None
    found.take_back()
    assert found.ids == [1, 2, 3]


def test_a_copy_stays_as_it_was() -> None:
    found = talk("a")
    before = found.copy()
    found.take_back()
    assert before.exchanges[0].said == "a"
    assert before.ids == [1, 2, 3, 4]


# --- files


def test_a_conversation_survives_its_file(tmp_path: Path) -> None:
    found = talk("a", "多行\n😀", system="be brief")
    found.params = msgspec.structs.replace(found.params, temperature=0.7, stop=["\n\n"], max_tokens=9)
    path = tmp_path / "x.json"
    write_chat(path, saved(found, "m", "f-1", "2026-01-01T00:00:00Z"))
    again = restored(read_chat(path), GenerateParams(model="m"), "m", "f-1")
    assert (again.ids, again.exchanges) == (found.ids, found.exchanges)
    assert again.params == msgspec.structs.replace(found.params, model="m")
    assert len(path.read_text().splitlines()) < 20  # token ids have one line


def test_with_another_model_the_messages_count_and_not_the_ids() -> None:
    chat = saved(talk("a"), "m", "f-1", "")
    assert restored(chat, GenerateParams(), "m", "f-2").ids is None
    assert restored(chat, GenerateParams(), "n", "f-1").ids == [1, 2, 3, 4]  # the same under another name
    assert restored(chat, GenerateParams(), "m", "").ids == [1, 2, 3, 4]  # as far as is known
    assert restored(chat, GenerateParams(), "n", "").ids is None


def test_with_edited_messages_the_messages_count() -> None:
    chat = saved(talk("a"), "m", "f", "")
    edited = msgspec.structs.replace(
        chat, messages=[ChatMessage("user", "a"), ChatMessage("assistant", "other")]
    )
    found = restored(edited, GenerateParams(), "m", "f")
    assert found.ids is None
    assert found.exchanges == [Exchange("a", "other", None)]


def test_bare_messages_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    assert restored(read_chat(path), GenerateParams(), "m", "f").request("c", "s").messages


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "no saved conversation"),
        ("[1]", "no saved conversation"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', r"\$.messages\[0\].role"),
        ('{"messages": [], "format": "other"}', "format 'other'"),
        ('{"messages": [], "begins": [7], "token_ids": [1]}', "beyond"),
        ('{"messages": [], "token_ids": ["x"]}', r"token_ids\[0\]"),
    ],
)
def test_what_is_no_conversation_is_said(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BadRequest, match=why) as caught:
        read_chat(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "roles", [["user"], ["assistant", "user"], ["user", "user"], ["user", "assistant", "system"]]
)
def test_messages_out_of_order_are_refused(roles: list[str]) -> None:
    chat = SavedChat([msgspec.convert({"role": role, "content": "x"}, ChatMessage) for role in roles])
    with pytest.raises(BadRequest, match="in turns"):
        restored(chat, GenerateParams(), "m", "")


def test_ids_without_words_are_no_json() -> None:
    found = Talk(GenerateParams())
    found.go_on_from([1, 2])
    with pytest.raises(BadRequest, match="csv"):
        saved(found, "m", "", "")


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5), st.text())
def test_any_words_survive(pairs: list[tuple[str, str]], system: str) -> None:
    found = Talk(GenerateParams(system=system or None))
    for said, answered in pairs:
        found.answered(said, answer([*(found.ids or []), 1], [2], answered))
    chat = msgspec.json.decode(encode(saved(found, "m", "f", "")), type=SavedChat)
    again = restored(chat, GenerateParams(), "m", "f")
    assert (again.messages(), again.ids) == (found.messages(), found.ids)


# --- settings


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("temperature 0.7", "temperature", 0.7),
        ("temperature=0", "temperature", 0.0),
        ("top-k 40", "top_k", 40),
        ("Seed 18446744073709551615", "seed", 2**64 - 1),
        ("max_tokens none", "max_tokens", None),
    ],
)
def test_set(argument: str, name: str, value: float | None) -> None:
    params = GenerateParams(max_tokens=5)
    assert getattr(chat_settings.changed(params, argument), name) == value


@pytest.mark.parametrize(
    "argument",
    [
        "heat 1",
        "temperature",
        "temperature x",
        "temperature -1",
        "temperature nan",
        "top_p 0",
        "top_k 1.5",
        "seed -1",
    ],
)
def test_what_can_not_be_set(argument: str) -> None:
    with pytest.raises(BadRequest):
        chat_settings.changed(GenerateParams(), argument)


def test_stop_texts() -> None:
    params = chat_settings.stopping(GenerateParams(), "The end")
    assert chat_settings.stopping(params, r'"\n\n"').stop == ["The end", "\n\n"]
    for bad in ('""', '"half'):
        with pytest.raises(BadRequest):
            chat_settings.stopping(params, bad)


def test_all_settings_are_described() -> None:
    shown = chat_settings.describe(GenerateParams(temperature=0.25, stop=["x"]))
    assert "temperature        0.25\n" in shown
    assert 'stop               "x"\n' in shown
    assert all(name in shown for name in chat_settings.SETTINGS)


def test_the_help_has_every_command_in_80_columns() -> None:
    for name in chat_line.COMMANDS:
        assert f"\n{name if name in chat_line.PLAIN else f'/{name}'}" in "\n" + chat_line.HELP
    assert max(map(len, chat_line.HELP.splitlines())) < 80
