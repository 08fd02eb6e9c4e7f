"""Hidden states in 8 bits between nodes: the codec alone, and real daemons that send so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import Cluster, Row
from disturbed import Asked, asked, long_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_llama import make_tiny_llama

from dgn_backends.api import LoadRequest, Step
from dgn_backends.hf_config import read_config
from dgn_backends.reference import ReferenceBackend
from dgn_backends.span import parse_spans
from dgn_backends.tensor import Q8_GROUP, DType, Tensor, tensor_bytes
from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.models.sampling import pick
from dgnd.wire import q8
from dgnd.wire.messages import Sampling

# --- the codec

LARGEST = float(np.float32(3.3e38))
FINITE = st.floats(-LARGEST, LARGEST, width=32) | st.floats(-100, 100, width=32)
SHAPES = st.tuples(st.integers(1, 4), st.sampled_from([1, 7, 63, 64, 65, 128, 200]))
ROWS = SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=FINITE))


@given(ROWS)
def test_every_value_is_off_by_at_most_half_its_groups_scale(values: Any) -> None:
    sent = q8.encode(Tensor.from_numpy(values, "f32"))
    q8.check(sent)
    back = q8.decode(sent).to_f32().astype(np.float64)
    assert (sent.shape, back.shape) == (values.shape, values.shape)
    for start in range(0, values.shape[1], Q8_GROUP):
        group = slice(start, start + Q8_GROUP)
        half = np.abs(values[:, group].astype(np.float64)).max(axis=1, keepdims=True) / 254
        assert (np.abs(back[:, group] - values[:, group]) <= np.maximum(half * (1 + 1e-5), 1.5e-36)).all()


@given(ROWS, st.data())
def test_a_row_has_the_same_bytes_in_any_company_and_rows_are_cut_without_a_copy(
    values: Any, data: st.DataObject
) -> None:
    whole = q8.encode(Tensor.from_numpy(values, "f32"))
    start = data.draw(st.integers(0, len(values) - 1))
    stop = data.draw(st.integers(start + 1, len(values)))
    part = q8.encode(Tensor.from_numpy(values[start:stop], "f32"))
    assert bytes(whole.rows(start, stop).data) == bytes(part.data)
    np.testing.assert_array_equal(
        q8.decode(whole.rows(start, stop)).to_numpy(), q8.decode(whole).to_numpy()[start:stop]
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_it_takes_every_dtype_and_half_the_bytes_of_bf16(dtype: DType) -> None:
    rows = Tensor.from_f32(np.random.default_rng(1).standard_normal((3, 2048), np.float32), dtype)
    sent = q8.encode(rows)
    assert len(sent.data) == tensor_bytes("q8", (3, 2048)) == 3 * (2048 + 4 * 32)
    assert len(sent.data) < 0.54 * tensor_bytes("bf16", (3, 2048))
    np.testing.assert_allclose(q8.decode(sent).to_f32(), rows.to_f32(), atol=0.02)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("place", [0, 40, 69])
def test_what_is_not_finite_is_not_encoded(bad: float, place: int) -> None:
    values = np.ones((2, 70), np.float32)
    values[1, place] = bad
    with pytest.raises(ValueError, match="not finite"):
        q8.encode(Tensor.from_numpy(values, "f32"))


@given(hnp.arrays(np.float32, (2, 2), elements=st.floats(width=32)))
@settings(max_examples=300)
def test_whatever_scales_are_let_in_give_finite_numbers(scales: Any) -> None:
    row = np.full((2, 100 + 8), 0x80, np.uint8)  # codes of -128, which nobody sends
    row[:, 100:] = scales.astype("<f4").view(np.uint8)
    tensor = Tensor("q8", (2, 100), row.tobytes())
    try:
        q8.check(tensor)
    except ValueError:
        return
    assert np.isfinite(q8.decode(tensor).to_f32()).all()


# --- real daemons

#: Drawn tokens show small differences sooner than likeliest ones.
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 7}


def chain_ids(model: Path, spans: Sequence[str], like: api.GenerateResult, wire: str) -> list[int]:
    """The ids of `like`, as drawn from the spans one after the other with every edge between them in
    `wire`."""
    config, prompt = read_config(model), like.prompt_token_ids
    runners = [
        ReferenceBackend().load(LoadRequest(path=model, config=config, span=span), lambda done, total: None)
        for text in spans
        for span in parse_spans(text, config.n_blocks)
    ]
    for runner in runners:
        runner.open(0, runner.span, config.max_positions)
    ids, start = list(prompt), 0
    while len(ids) < len(prompt) + len(like.token_ids):
        rows, wanted = Tensor.from_numpy(np.asarray(ids[start:], dtype="<i4"), "i32"), len(ids) - start - 1
        for runner in runners:
            (output,) = runner.forward([Step(0, start, rows, (wanted,) if runner.span.head else ())])
            if output.hidden is not None:
                rows = q8.decode(q8.encode(output.hidden)) if wire == "q8" else output.hidden
        assert output.logits is not None
        start = len(ids)
        ids.append(pick(output.logits.to_f32()[0], Sampling(**DRAWN), start))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two groups, the second one short; answers have no end but the one asked for."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return make_tiny_llama(directory, n_blocks=6, hidden_size=96, max_positions=4096, eos=None)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """a has its sessions send in q8; the others' files know nothing of it."""
    rows = [Row("a", "embed,0-1"), Row("b", "2-3"), Row("d", "2-3"), Row("c", "4-5,head")]
    keys = {"path": str(model), "backend": "reference"}
    with Cluster(tmp_path_factory.mktemp("q8"), model) as cluster:
        for name in "abcd":
            cluster.add(name)
        for name in "abcd":
            wire = {"wire": "q8"} if name == "a" else {}
            cluster.configure(name, rows, [n for n in "abcd" if n != name], models={"m": keys | wire})
        cluster.start()
        yield cluster


SPANS = ("embed,0-1", "2-3", "4-5,head")


def ask(cluster: Cluster, name: str, prompt: str, **fields: Any) -> tuple[api.GenerateResult, list[str]]:
    """An answer, and the spans that it went through."""
    with ControlClient(cluster.nodes[name].socket) as client:
        params = asked(prompt=prompt, **{"max_tokens": 200, **DRAWN, **fields})
        result = client.generate(params, lambda _: None)
    return result, [hop.span for hop in result.route]


def test_every_edge_between_nodes_is_sent_so_and_the_answer_is_said_to_be_inexact(
    running: Cluster, model: Path
) -> None:
    for prompt in ("hello there", "once upon " * 60):  # the second one in several chunks
        result, spans = ask(running, "a", prompt)
        assert (result.exact, spans) == (False, list(SPANS))
        q8_ids, plain_ids = (chain_ids(model, SPANS, result, wire) for wire in ("q8", "plain"))
        assert q8_ids != plain_ids
        assert result.token_ids == q8_ids


def test_an_exact_answer_is_never_sent_so_also_in_a_session_that_was(running: Cluster, model: Path) -> None:
    first, _ = ask(running, "a", "hello there", session="s", max_tokens=20)
    again, spans = ask(running, "a", " and again", session="s", exact=True)
    assert (first.exact, again.exact) == (False, True)
    assert again.prompt_token_ids[: len(first.prompt_token_ids)] == first.prompt_token_ids
    assert again.token_ids == chain_ids(model, spans, again, "plain")
    running.nodes["a"].ctl("cache", "clear", "s")


def test_whose_file_does_not_say_so_sends_plainly(running: Cluster, model: Path) -> None:
    result, spans = ask(running, "b", "hello there")
    assert len(spans) == 3
    assert result.exact
    assert result.token_ids == chain_ids(model, spans, result, "plain")


@pytest.mark.parametrize("after", [1, 60])
def test_an_answer_that_loses_a_hop_goes_on_with_the_same_ids(running: Cluster, after: int) -> None:
    origin = running.nodes["a"]
    for node in running.nodes.values():
        node.wait_ready()
    params, right = long_answer(origin, DRAWN)

    def strike(names: list[str]) -> None:
        assert names[1] in "bd"
        running.nodes[names[1]].kill()
        running.nodes[names[1]].start()

    assert Asked(origin, params, after, strike).ids() == right
