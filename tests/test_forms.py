"""Answers of a given form: the matcher by itself, and through hops of a simulated cluster that die."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from sim.cluster import EVERYTHING, SimCluster, read_once, tiny_model
from test_sim_sessions import PROMPT, simulate

from dgn_backends.bundled import bundled_model
from dgnd.control import api
from dgnd.errors import BadRequest, LimitError, ProtocolError
from dgnd.models.sampling import pick
from dgnd.text.assets import TextAssets
from dgnd.text.grammar import MAX_BYTES, Form
from dgnd.wire.allowed import pack, unpack
from dgnd.wire.messages import Sampling

#: Each ends within a few dozen tokens, whatever a model prefers.
SHORT = {"type": "string", "maxLength": 3}
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", None]}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "boolean"}, {"const": {"a": [1, "ü😀"]}}]},
    {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "a"}, "n": {"type": "boolean"}},
                "required": ["kind", "n"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "b"}},
                "required": ["kind"],
                "additionalProperties": False,
            },
        ]
    },
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}},
                "required": ["kids"],
                "additionalProperties": False,
            },
            "leaf": {"type": "string", "pattern": "^[a-c]{1,2}$"},
        },
    },
]


@pytest.fixture(scope="module")
def demo() -> TextAssets:
    path = bundled_model("dgn-demo")
    assert path is not None
    return TextAssets.load(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    read_once(path)
    return path


def walk(form: Form, vocab: int, ends: frozenset[int], rng: random.Random) -> list[int]:
    """Tokens that may follow each other, at random, until the end."""
    ids: list[int] = []
    while not form.complete:
        allowed = np.flatnonzero(unpack(pack(form.bits), vocab))
        token = int(rng.choice(allowed))
        assert form.takes(token)
        if token in ends:
            break
        ids.append(token)
        form.push(token)
        assert len(ids) < 2000
    return ids


@pytest.mark.parametrize("schema", SCHEMAS)
def test_whatever_is_allowed_is_json_of_the_schema(demo: TextAssets, schema: dict[str, Any]) -> None:
    vocab = demo.vocab_size + 3  # models have more rows than tokens
    forms = demo.forms(vocab)
    texts = {
        demo.decode(walk(forms.json(schema), vocab, demo.eos_token_ids, random.Random(seed)))
        for seed in range(20)
    }
    assert len(texts) > 1
    for text in texts:
        jsonschema_rs.validate(schema, json.loads(text))


def test_a_model_without_an_end_completes_its_answer(demo: TextAssets, tmp_path: Path) -> None:
    endless = TextAssets(demo._tokenizer, demo._config)
    endless.eos_token_ids = frozenset()
    ids = walk(
        endless.forms(demo.vocab_size).json(SCHEMAS[0]), demo.vocab_size, frozenset(), random.Random(1)
    )
    jsonschema_rs.validate(SCHEMAS[0], json.loads(demo.decode(ids)))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "wizard"}, "Invalid type: wizard"),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems" at #: no answer can be held to that'),
        ({"properties": {"a/b": {"items": {"not": {}}}}}, '"not" at #/properties/a~1b/items: '),
        ({"properties": {"not": {"if": {}}}, "enum": [{"if": 1}]}, '"if" at #/properties/not: '),
        ({"anyOf": [{"type": "string"}, {"contains": {}}]}, '"contains" at #/anyOf/1: '),
        ({"$defs": {"x": {"uniqueItems": True}}, "$ref": "#/$defs/x"}, '"uniqueItems" at #/$defs/x: '),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"oneOf": [{"type": "object"}, {"type": "object"}]}, '"oneOf" at #: its branches may overlap'),
        ({"enum": ["\ud800"]}, "surrogates not allowed"),
        ({"$ref": "#/nowhere"}, "'/nowhere' does not exist"),
        ({"$ref": "https://example.com/schema"}, "not present"),
        ({"$ref": "#"}, "too complex"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
        ({"enum": ["x" * MAX_BYTES]}, f"more than {MAX_BYTES} bytes"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_in_one_line(
    demo: TextAssets, schema: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadRequest, match=r"^the JSON schema can't be used: ") as caught:
        demo.forms(demo.vocab_size).json(schema)
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.data["setting"] == "json_schema"


def test_a_schema_that_takes_too_much_ends_its_answer_soon(demo: TextAssets) -> None:
    form = demo.forms(demo.vocab_size).json({"type": "string", "pattern": "^((a{1000}){1000}){100}$"})
    (quote,) = np.flatnonzero(unpack(pack(form.bits), demo.vocab_size))
    with pytest.raises(LimitError, match="the answer's form is too complex: lexer error: too many"):
        form.push(int(quote))


@given(st.sets(st.integers(0, 99), min_size=1), st.integers(100, 120))
def test_what_is_allowed_arrives_as_it_was_sent(ids: set[int], vocab: int) -> None:
    mask = np.zeros((vocab + 7) // 8 * 8, np.uint8)
    mask[sorted(ids)] = 1
    assert set(np.flatnonzero(unpack(pack(np.packbits(mask, bitorder="little").tobytes()), vocab))) == ids


@pytest.mark.parametrize(
    "data", [b"", b"x", pack(b"\1"), pack(b"\1" * 40), pack(bytes(32)), pack(b"\1" * 32)[:-1]]
)
def test_what_is_no_set_of_allowed_tokens_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"step\.allowed"):
        unpack(data, 256)


@given(
    st.integers(0, 2**32), st.sampled_from([0.0, 1.3]), st.sampled_from([0, 3]), st.sampled_from([0.4, 1.0])
)
def test_a_token_that_is_not_allowed_is_never_picked(
    seed: int, heat: float, top_k: int, top_p: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=50).astype(np.float32) * 9
    allowed = rng.random(50) < 0.1
    allowed[seed % 50] = True
    sampling = Sampling(temperature=heat, top_k=top_k, top_p=top_p, seed=seed, repetition_penalty=1.2)
    token = pick(logits, sampling, 7, range(7), 0, allowed)
    assert allowed[token]
    if heat == 0.0 and token > 6:
        assert logits[token] >= logits[7:][allowed[7:]].max()


def asked(schema: dict[str, Any], **fields: Any) -> api.GenerateParams:
    return api.GenerateParams(token_ids=PROMPT, json_schema=schema, **fields)


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "seed": 5, "presence_penalty": 0.5}])
def test_a_hop_that_dies_in_the_middle_changes_no_token(model: Path, fields: dict[str, Any]) -> None:
    """The head is far away, and is lost; what its replacement may pick is what the answer's form allows."""
    answers: dict[str, list[list[int]]] = {"alone": [], "split": []}

    async def alone(cluster: SimCluster) -> None:
        for schema in SCHEMAS:
            result = await cluster.ask("a", asked(schema, **fields))
            answers["alone"].append(result.token_ids)
            jsonschema_rs.validate(schema, json.loads(result.text))
            assert result.finish_reason == "stop"

    async def split(cluster: SimCluster) -> None:
        for schema in SCHEMAS:
            killed = False

            def strike(came: int) -> None:
                nonlocal killed
                if came == 3:
                    killed = True
                    route = cluster.route("a")
                    cluster.kill(cluster.name_of(route[-1].peer), "eof", back_s=1.0)

            result = await cluster.ask("a", asked(schema, **fields), strike)
            assert killed
            answers["split"].append(result.token_ids)
            await trio.sleep(5)
            await cluster.all_ready()

    simulate(model, {"a": EVERYTHING}, alone)
    simulate(model, {"a": "embed,0-1", "b": "2-3,head", "c": "2-3,head"}, split)
    assert answers["split"] == answers["alone"]


def test_an_answer_that_is_cut_short_and_a_session_that_goes_on(model: Path) -> None:
    async def work(cluster: SimCluster) -> None:
        whole = await cluster.ask("a", asked(SCHEMAS[0], session="s"))
        cut = await cluster.ask("a", asked(SCHEMAS[0], session="s", max_tokens=5))
        assert (cut.finish_reason, cut.token_ids) == ("length", whole.token_ids[:5])
        with pytest.raises(BadRequest, match="Invalid type"):
            await cluster.ask("a", asked({"type": "wizard"}, session="s"))
        assert (await cluster.ask("a", asked(SCHEMAS[0], session="s"))).token_ids == whole.token_ids

    simulate(model, {"a": "embed,0-1", "b": "2-3,head"}, work)
