"""Rows of the configuration as a map of units."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgn_backends.span import Span, format_spans, format_units
from dgnd.config import LoadedConfig
from dgnd.config.schema import BlocksRow, Config, ModelSection
from dgnd.errors import ConfigError
from dgnd.models.blocksmap import BlocksMap
from dgnd.wire.checks import SPANS_MAX


def rows(*triples: tuple[str, str, str]) -> Config:
    models = {model: ModelSection() for model, _, _ in triples} or {"m": ModelSection()}
    return Config(models=models, blocks=tuple(BlocksRow(model=m, peer=p, span=s) for m, p, s in triples))


def test_the_example_of_two_nodes() -> None:
    found = BlocksMap.build(rows(("m", "self", "embed,0-13,head"), ("m", "attic", "14-27")), {"m": 28})
    assert found.own_spans("m") == (Span(0, 14, embed=True), Span(28, 28, head=True))
    assert found.spans("m", "attic") == (Span(14, 28),)
    assert found.peers_of("m") == ("attic",)
    assert found.missing("m") == ""


def test_rows_of_one_node_add_up_to_maximal_spans() -> None:
    found = BlocksMap.build(
        rows(("m", "self", "3"), ("m", "self", "embed"), ("m", "self", "0-2,5")), {"m": 6}
    )
    assert format_spans(found.own_spans("m")) == "embed,0-3,5"
    assert found.missing("m") == "4,head"


def test_peers_may_overlap_as_replicas() -> None:
    found = BlocksMap.build(
        rows(("m", "a", "embed,0-3"), ("m", "b", "0-3,head"), ("m", "self", "2")), {"m": 4}
    )
    assert found.missing("m") == ""
    assert found.peers_of("m") == ("a", "b")


def test_a_model_without_rows_misses_everything_and_is_no_error() -> None:
    found = BlocksMap.build(rows(), {"m": 4})
    assert found.missing("m") == "embed,0-3,head"
    assert found.own_spans("m") == ()
    assert found.peers_of("m") == ()


def test_models_do_not_mix() -> None:
    found = BlocksMap.build(rows(("a", "self", "0"), ("b", "self", "0,1")), {"a": 1, "b": 2})
    assert format_spans(found.own_spans("a")) == "0"
    assert format_spans(found.own_spans("b")) == "0-1"


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ("2-4", 'f.toml:4:18: an earlier row gives 2-3 of "m" to "self" already'),
        ("embed", 'f.toml:4:18: an earlier row gives embed of "m" to "self" already'),
        (
            "27-28",
            'f.toml:4:18: model "m": block 28 in span "27-28" is beyond the model',
        ),
    ],
)
def test_an_error_names_the_line_of_the_row(second: str, expected: str) -> None:
    config = rows(("m", "self", "embed,0-3"), ("m", "self", second))
    text = f"""models.m = {{}}
blocks = [
  {{ model = "m", peer = "self", span = "embed,0-3" }},
  {{ peer="self", span = "{second}", model = "m" }},
]
"""
    loaded = LoadedConfig(config, Path("f.toml"), text)
    with pytest.raises(ConfigError) as caught:
        BlocksMap.build(config, {"m": 28}, loaded.error_at)
    assert str(caught.value).startswith(expected)


def test_the_same_block_twice_on_one_peer_without_a_file() -> None:
    with pytest.raises(ConfigError, match=r"blocks\.1\.span: an earlier row gives 0 of"):
        BlocksMap.build(rows(("m", "attic", "0"), ("m", "attic", "0-1")), {"m": 2})


def test_a_node_has_no_more_spans_than_others_take() -> None:
    every_second = ",".join(str(block) for block in range(0, 2 * SPANS_MAX, 2))
    assert len(BlocksMap.build(rows(("m", "self", every_second)), {"m": 200}).own_spans("m")) == SPANS_MAX
    too_many = f'"self" has {SPANS_MAX + 1} spans of "m"; others take {SPANS_MAX}'
    with pytest.raises(ConfigError, match=too_many):
        BlocksMap.build(rows(("m", "self", every_second), ("m", "self", "199")), {"m": 200})


@given(st.lists(st.frozensets(st.integers(0, 9), min_size=1), max_size=4))
def test_served_and_missing_units_make_up_the_model(parts: list[frozenset[int]]) -> None:
    n_blocks = 8
    config = rows(*[("m", f"p{i}", format_units(units, n_blocks)) for i, units in enumerate(parts)])
    found = BlocksMap.build(config, {"m": n_blocks})
    assert [found.units["m"][f"p{i}"] for i in range(len(parts))] == parts
    missing = set(range(n_blocks + 2)) - set().union(*parts)
    assert found.missing("m") == format_units(missing, n_blocks)
