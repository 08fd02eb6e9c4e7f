"""The scanner that finds keys in a TOML text."""

from __future__ import annotations

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from dgnd.config.locate import KeyPath, locate_keys

#: The mark stands before what the path names.
MARK = "⌖"


@pytest.mark.parametrize(
    ("path", "marked"),
    [
        (("a",), "⌖a = 1"),
        (("b",), 'a = "x # [b]"\n  ⌖b = 2'),
        (("b",), "a = '''\nb = 1\n'''\n⌖b = 2"),
        (("b",), 'a = """\nb = 1 \\"""" # end\n⌖b = 2'),
        (("b",), 'a = """x"""""\n⌖b = 2'),
        (("b",), "a = '''x'''''\n⌖b = 2"),
        (("t",), "# [t]\n[⌖t]\nk = 1"),
        (("t", "k"), "[t]\n⌖k = 1"),
        (("t", "k"), "[ t ]\n\t⌖k = 1"),
        (("t",), "[ ⌖t ]"),
        (("t", "u", "k"), "[t.u]\n⌖k = 1"),
        (("t", "u", "k"), '[t . "u"]\n⌖k = 1'),
        (("t", "u"), "[⌖t.u]\nk = 1"),
        (("t",), "[⌖t.u]\nk = 1\n[t]\nm = 2"),
        (("t", "m"), "[t.u]\nk = 1\n[t]\n⌖m = 2"),
        (("a", "b"), "a.⌖b = 1\na.c = 2"),
        (("a",), "⌖a.b = 1\na.c = 2"),
        (("a b", "c.d"), "\"a b\".⌖'c.d' = 1"),
        (("é",), '⌖"\\u00e9" = 1'),
        (("x", 0), "[[⌖x]]\nk = 1\n[[x]]\nk = 2"),
        (("x", 1, "k"), "[[x]]\nk = 1\n[[x]]\n⌖k = 2"),
        (("x", 1, "y", "k"), "[[x]]\n[x.y]\nk = 1\n[[x]]\n[x.y]\n⌖k = 2"),
        (("x", 1, "y", 0, "k"), "[[x]]\n[[x.y]]\nk = 1\n[[x]]\n[[x.y]]\n⌖k = 2\n[[x.y]]\nk = 3"),
        (("a", 1), "a = [1, ⌖2]"),
        (("a", 2), 'a = [\n  "]", # ]\n  "b",\n  ⌖"c",\n]'),
        (("b",), "a = [\n 1,\n 2, # x\n]\n⌖b = 1"),
        (("a", 1, 0), "a = [[1], [⌖2]]"),
        (("p", "id"), 'p = { addrs = ["}"], ⌖id = "x" }'),
        (("p", "q", "r"), "p = { q = { ⌖r = 1 } }"),
        (("p", "q", "r"), "p = { q.⌖r = 1 }"),
        (("p", 1, "m"), "p = [\n { m = 1 },\n { ⌖m = 2 },\n]"),
        (("z",), "d = 1979-05-27 07:32:00Z # x\n⌖z = true"),
        (("z",), "a = {}\nb = []\n⌖z = 1.5e3"),
        (("z",), "a = 1\r\n⌖z = 2\r\n"),
    ],
)
def test_key_is_found_where_it_stands(path: KeyPath, marked: str) -> None:
    text = marked.replace(MARK, "")
    before = marked[: marked.index(MARK)]
    tomli.loads(text)  # the scanner may rely on that
    place = locate_keys(text)[path]
    assert (place.line, place.column) == (before.count("\n") + 1, len(before) - before.rfind("\n"))


def paths_of(value: object, at: KeyPath = ()) -> set[KeyPath]:
    """Every path within a parsed document."""
    items: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = {at} if at else set()
    for key, item in items:
        found |= paths_of(item, (*at, key))
    return found


KEYS = st.sampled_from(["a", "b-1", '"c.d"', "'e ]'", '"f\\t#"'])
SCALARS = st.sampled_from(
    ["1", '"x, ] } # \\" ="', "'it'", "true", "1979-05-27", '"""\n[t]\nq = 1"""', "'''[[u]]'''"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[\n" + ", # c ]\n".join(items) + "\n]"),
        st.dictionaries(KEYS, inner, max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{key} = {item}" for key, item in pairs.items()) + "}"
        ),
    ),
    max_leaves=5,
)
PAIRS = st.tuples(KEYS, VALUES).map(lambda pair: f"{pair[0]} = {pair[1]}\n")
HEADERS = st.tuples(KEYS, KEYS, st.booleans()).map(
    lambda keys: f"[[{keys[0]} . {keys[1]}]] # [x]\n" if keys[2] else f"[{keys[0]}.{keys[1]}]\n"
)


@given(st.lists(st.one_of(PAIRS, HEADERS), max_size=8).map("".join))
def test_every_path_of_a_valid_document_is_found(text: str) -> None:
    try:
        values = tomli.loads(text)
    except tomli.TOMLDecodeError:
        return
    assert paths_of(values) <= set(locate_keys(text))
