"""The configuration file: what is accepted, and the one line that a mistake gets."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgnd.config import Config, LoadedConfig, load_config
from dgnd.config.load import MAX_BYTES
from dgnd.errors import ConfigError

#: A valid id of an ed25519 key.
ID = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"

GOOD = f"""\
[node]
name = "desk"
state_dir = "/var/lib/dgn"
listen = ["/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/0"]

[control]
socket = "/run/dgn/dgnd.sock"

[models.llama]
path = "/srv/models/Llama"
backend = "torch"
device = "cuda:1"
dtype = "bf16"
threads = 4

[peers.attic]
id = "{ID}"
addrs = ["/ip4/192.168.1.20/tcp/4001", "/dns4/attic.lan/tcp/4001/p2p/{ID}"]

[[blocks]]
model = "llama"
peer = "self"
span = "embed,0-13,head"

[[blocks]]
model = "llama"
peer = "attic"
span = "14-27"
"""


def load(tmp_path: Path, text: str) -> LoadedConfig:
    path = tmp_path / "dgn.toml"
    path.write_bytes(text.encode())
    return load_config(path, ["reference", "torch"])


def error_of(tmp_path: Path, text: str) -> str:
    """The message, with the file's path cut off; it is one line."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = caught.value.message
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'dgn.toml'}:")
    return message.removeprefix(f"{tmp_path / 'dgn.toml'}:")


def test_a_full_file(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD).config
    assert config.node.name == "desk"
    assert config.models["llama"].path == Path("/srv/models/Llama")
    assert config.models["llama"].threads == 4
    assert config.peers["attic"].addrs[0] == "/ip4/192.168.1.20/tcp/4001"
    assert [(row.model, row.peer, row.span) for row in config.blocks] == [
        ("llama", "self", "embed,0-13,head"),
        ("llama", "attic", "14-27"),
    ]


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "\ufeff# saved by an editor that marks UTF-8\r\n"])
def test_an_empty_file_is_valid(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).config == Config()


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = '[node]\nstate_dir = "state"\n[control]\nsocket = "~/s"\n[models.a]\npath = "../a"\n[models.b]\n'
    config = load(tmp_path, text).config
    assert config.node.state_dir == tmp_path / "state"
    assert config.control.socket == Path("/home/me/s")
    assert config.models["a"].path == tmp_path / "../a"
    assert config.models["b"].path is None


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[node]", "[node", "1:6: Expected ']'"),
        ('name = "desk"', "name = desk", "2:8: Invalid value"),
        ('name = "desk"', 'name = "desk"\nname = "x"', '3:11: name is set already; keep one of the two'),
        ('name = "desk"', "name = 1" + "0" * 5000, "2:8: a number has too many digits"),
        ('name = "desk"', "name = " + "[" * 3000, "1:1: tables or arrays are nested too deeply"),
        ("name = ", "nmae = ", '2:1: unknown key "nmae" in node; did you mean "name"?'),
        ("threads = ", "thread_count = ", '14:1: unknown key "thread_count" in models.llama'),
        ("[[blocks]]", "[[block]]", '20:3: unknown key "block"; did you mean "blocks"?'),
        ('dtype = "bf16"', 'qaunt = "q4"', '13:1: unknown key "qaunt" in models.llama; did you mean'),
        ('dtype = "bf16"', 'quant = "q4"', '13:1: "q4" is no quantisation; one of none, int8, int4, '),
        ('"desk"', "5", "2:1: node.name must be a string, not an integer"),
        ('"desk"', "1979-05-27", "2:1: node.name must be a string, not a date or a time"),
        ("threads = 4", "threads = true", "14:1: models.llama.threads must be an integer, not true or false"),
        ("threads = 4", "threads = 4.5", "14:1: models.llama.threads must be an integer, not a fraction"),
        ("threads = 4", 'chat_template = "lama3"', "14:1: chat_template is 'lama3'; it must be one of "),
        ("threads = 4", "threads = 0", "14:1: threads must be from 1 to 4096"),
        ("threads = 4", "kv_bytes = 0", "14:1: kv_bytes must be at least 1"),
        ('"/ip6/::/tcp/0"]', "7]", "4:36: node.listen[1] must be a string, not an integer"),
        ("[control]", "[[control]]", "6:3: control must be a table, not an array"),
        ('path = "/srv/models/Llama"', 'path = ""', "10:1: models.llama.path is no path"),
        ('path = "/srv/models/Llama"', 'path = "a\\u0000b"', "10:1: models.llama.path is no path"),
        ('"/run/dgn/dgnd.sock"', f'"/{"x" * 107}"', "7:1: a socket's path has at most 107 bytes"),
        ('"torch"', '"trch"', '11:1: no backend "trch" is installed; did you mean "torch"?'),
        ('"cuda:1"', '"gpu"', '12:1: "gpu" is no device; one of auto, cpu, cuda, cuda:1'),
        ('"bf16"', '"bfloat16"', '13:1: "bfloat16" is no dtype; one of auto, f32, bf16, f16'),
        ("[peers.attic]", "[peers.self]", '16:2: no peer may be named "self"'),
        ("[peers.attic]", '[peers."the attic"]', "16:2: 'the attic' is no name"),
        (f'id = "{ID}"', 'id = "12D3KooW"', "17:1: not the peer id of an ed25519 key: '12D3KooW'"),
        (f'id = "{ID}"\n', "", '16:2: peers.attic lacks the key "id"'),
        (f'id = "{ID}"', f'id = "{ID}"\n[peers.b]\nid = "{ID}"\n', '19:1: peers.attic has the same id'),
        ("192.168.1.20", "192.168.1.256", '18:10: "192.168.1.256" in '),
        ("/ip4/192.168.1.20", "/ip6/192.168.1.20", '18:10: "192.168.1.20" in '),
        ("192.168.1.20/tcp", "192.168.1.20/udp", '18:10: "/ip4/192.168.1.20/udp/4001" uses udp'),
        ("192.168.1.20/tcp/4001", "192.168.1.20/tcp/0", '18:10: "/ip4/192.168.1.20/tcp/0" has port 0'),
        ("attic.lan", "attic..lan", '18:40: "attic..lan" in '),
        (
            '"/ip6/::/tcp/0"]',
            '"/ip4/127.0.0.1/tcp/4001"]',
            '4:36: "/ip4/127.0.0.1/tcp/4001" is listened on already, by "/ip4/0.0.0.0/tcp/4001"; leave one',
        ),
        ('"/ip6/::/tcp/0"]', '"/ip6/::/tcp/1", "/ip6/0::0/tcp/1"]', '4:53: "/ip6/0::0/tcp/1" is listened on'),
        ("/ip4/0.0.0.0/", "/dns4/desk/", '4:11: "/dns4/desk/tcp/4001" is no address to listen on'),
        ('"llama"\npeer = "attic"', '"lama"\npeer = "attic"', '26:1: there is no [models.lama]'),
        ('peer = "attic"', 'peer = "atic"', '27:1: there is no [peers.atic]; did you mean "attic"?'),
        ('"14-27"', '"27-14"', '28:1: range "27-14" in span "27-14" runs backwards'),
        ('"14-27"', '""', '28:1: "" in span "" is none of: embed, head, a block number'),
        ('span = "14-27"\n', "", '25:3: blocks[1] lacks the key "span"'),
        ('"14-27"', '"auto"', '28:1: span = "auto" is for this node\'s own rows; a peer'),
        ('"14-27"', '"14-27"\nmax_bytes = 5', '29:1: max_bytes goes with span = "auto" alone'),
        ('"embed,0-13,head"', '"auto"\nmax_bytes = 0', "24:1: max_bytes must be at least 1"),
        (
            'peer = "attic"\nspan = "14-27"',
            'peer = "self"\nspan = "auto"',
            '28:1: this node has a row for "llama" already',
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    message = error_of(tmp_path, GOOD.replace(old, new, 1))
    assert message.startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sessions.idle_s = 0", "1:10: sessions.idle_s must be a number of seconds above 0"),
        ("sessions = { idle_s = inf }", "1:14: sessions.idle_s must be a number of seconds above 0"),
        ("[sessions]\nmax_sessions = 0", "2:1: sessions.max_sessions must be from 1 to 10000"),
        ("[sessions]\nmax_sessions = 1000000000", "2:1: sessions.max_sessions must be from 1 to 10000"),
        (f"[sessions]\nmax_sessions = {10**30}", "2:1: sessions.max_sessions must be from 1 to 10000"),
        ("[http]\nconversations = -1", "2:1: http.conversations must be from 0 to 512"),
        ("[http]\nmax_requests = 0", "2:1: http.max_requests must be from 1 to 10000"),
        ('[http]\nlisten = "11435"', '2:1: "11435" is no address to listen on; one such as 127.0.0.1:11435'),
        ('[http]\nlisten = "999.0.0.1:1"', '2:1: "999.0.0.1:1": "999.0.0.1" is no IP address'),
        ('[http]\nlisten = "127.0.0.1:65536"', '2:1: "127.0.0.1:65536": a port is at most 65535'),
        (
            '[http]\nlisten = "0.0.0.0:11435"',
            '2:1: "0.0.0.0:11435" can be reached from other machines: name a keys_file with API keys, or '
            "listen on 127.0.0.1:11435",
        ),
        ("[log]\n[log]", "2:5: the table log is there already; keep one of the two"),
        ("[a.b]\n[a.b]", "2:5: the table a.b is there already"),
        (f"[log]\nlevel = {'9' * 5000}", "2:9: a number has too many digits"),
        ('[metrics]\nlisten = "127.0.0.1:9\\n"', '2:1: "127.0.0.1:9\\n" is no address for metrics; one such'),
        ('[log]\n"l\\u202eevel" = 1', '2:1: unknown key "l\\u202eevel" in log; did you mean "level"?'),
        ("models = 3", "1:1: models must be a table of tables, not an integer"),
        ("models.a = 3", "1:8: models.a must be a table, not an integer"),
        ("blocks = 3", "1:1: blocks must be an array, not an integer"),
        ("blocks = [\n  3]", "2:3: blocks[0] must be a table, not an integer"),
        ('node = { name = "a", listn = [] }', '1:22: unknown key "listn" in node; did you mean "listen"?'),
        (f'[peers.b]\nid = "{ID}"\naddrs = ["/ip4/1.2.3.4/tcp/4001/p2p/{ID[:-1]}1"]', "3:10: "),
    ],
)
def test_mistakes_in_other_notations(tmp_path: Path, text: str, expected: str) -> None:
    assert error_of(tmp_path, text).startswith(expected)


def test_a_long_value_does_not_hide_what_is_said_of_it(tmp_path: Path) -> None:
    message = error_of(tmp_path, GOOD.replace("embed,0-13,head", "0" * 5000, 1))
    assert len(message) < 400
    assert message.endswith("a range such as 0-13")


def test_a_node_may_choose(tmp_path: Path) -> None:
    row = load(tmp_path, GOOD.replace('"embed,0-13,head"', '"auto"\nmax_bytes = 7', 1)).config.blocks[0]
    assert (row.span, row.max_bytes) == ("auto", 7)
    text = GOOD.replace('"embed,0-13,head"', '"auto"', 1).replace('peer = "attic"', 'peer = "self"', 1)
    assert error_of(tmp_path, text).startswith('28:1: this node has a row for "llama" already; span = "auto"')


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "dgn.toml"
    path.write_bytes('[node]\nname = "é'.encode() + b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"dgn.toml:2:10: byte 0xff is not UTF-8"):
        load_config(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        return caught.value.message

    assert message(tmp_path / "none.toml") == f"{tmp_path / 'none.toml'}: there is no such file"
    assert message(tmp_path).startswith(f"{tmp_path}: is a directory")
    assert "can't be read" in message(Path("a\x00b"))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "can't be read: Too many levels" in message(loop)
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * (MAX_BYTES + 1))
    assert "is larger than" in message(huge)
    assert "is larger than" in message(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    assert message(tmp_path / "pipe") == f"{tmp_path / 'pipe'}: is a pipe; name a configuration file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "dgn.toml"
    path.write_text("")
    path.chmod(0)
    with pytest.raises(ConfigError, match="can't be read: Permission denied"):
        load_config(path)


def accepted_or_explained(path: Path) -> bool:
    """Whether the file gives a configuration, or an error of the promised form."""
    try:
        load_config(path)
    except ConfigError as error:
        return re.fullmatch(rf"{re.escape(str(path))}:\d+:\d+: .+", error.message) is not None
    return True


@given(st.text())
def test_any_text_gives_a_config_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert accepted_or_explained(path)


KEYS = st.sampled_from(["node", "models", "peers", "blocks", "sessions", "name", "span", "x"])
VALUES = st.sampled_from(["1", "'self'", "[]", "{}", "[{}]", "{ x = 1 }", "[1, 'a']", "1.5", "true"])


@given(st.lists(st.tuples(KEYS, KEYS, VALUES), max_size=4))
def test_any_shape_gives_a_config_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "shape.toml"
    path.write_text("".join(f"{first}.{second} = {value}\n" for first, second, value in entries))
    assert accepted_or_explained(path)


@pytest.mark.parametrize("listen", ["127.0.0.1:11435", "localhost:11435", "[::1]:0", "127.9.9.9:80"])
def test_the_http_api_needs_no_keys_on_loopback(tmp_path: Path, listen: str) -> None:
    assert load(tmp_path, f'[http]\nlisten = "{listen}"\n').config.http.listen == listen


def test_the_file_of_keys_is_found_beside_the_configuration(tmp_path: Path) -> None:
    text = '[http]\nlisten = "0.0.0.0:11435"\nkeys_file = "keys"\n'
    assert load(tmp_path, text).config.http.keys_file == tmp_path / "keys"
