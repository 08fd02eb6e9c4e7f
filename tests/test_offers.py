"""What a peer may offer, and what is made of it however often it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs
from tiny_llama import make_tiny_llama

from dgn_backends.manifest import Manifest
from dgn_backends.span import Span
from dgnd.config.schema import ModelSection
from dgnd.errors import ProtocolError
from dgnd.models.local import LocalModel, read_model
from dgnd.peers.offers import OfferBook
from dgnd.peers.told import Told
from dgnd.routing.exactness import Way
from dgnd.wire.checks import ALL_SPANS_MAX, SPAN_TEXT, SPANS_MAX, validate
from dgnd.wire.codec import encode_bytes
from dgnd.wire.messages import Frame, Hello, ModelOffer, SpanOffer

N_BLOCKS = 8
MANIFEST = Manifest(config_digest="c", tokenizer_digest=None, tensors={"x": "1"}, complete=True)


def spans(*texts: str) -> tuple[SpanOffer, ...]:
    return tuple(SpanOffer(span=text, numerics="n", dtype="f32", step_ms=2.0) for text in texts)


def offer(*texts: str, model: str = "m", planned: str | None = None) -> ModelOffer:
    return ModelOffer(model=model, n_blocks=N_BLOCKS, config_digest="c", spans=spans(*texts), planned=planned)


def hello(*offers: ModelOffer) -> Hello:
    return Hello(versions=(1,), software="", name="", offers=offers)


@pytest.fixture
def model(tmp_path: Path) -> LocalModel:
    path = make_tiny_llama(tmp_path / "tiny", n_blocks=N_BLOCKS)
    found = read_model("m", ModelSection(path=path), tmp_path)
    found.manifest = MANIFEST
    return found


@pytest.fixture
def book(model: LocalModel) -> OfferBook:
    found = OfferBook("me", "desk", "dgn", {"m": model}, lambda: 100.0)
    found.manifests.put("me", "m", MANIFEST)
    found.manifests.put("p", "m", MANIFEST)
    return found


TOO_MUCH = [
    (hello(offer("0-1"), offer("2-3")), "two offers of model 'm'"),
    (hello(offer(*["0"] * (SPANS_MAX + 1))), f"{SPANS_MAX + 1} spans of model 'm'; at most {SPANS_MAX}"),
    (hello(offer("0" * (SPAN_TEXT + 1))), f"a span of {SPAN_TEXT + 1} characters; at most {SPAN_TEXT}"),
    (
        hello(*(offer(*["0"] * SPANS_MAX, model=f"m{i}") for i in range(ALL_SPANS_MAX // SPANS_MAX + 1))),
        f"{ALL_SPANS_MAX + SPANS_MAX} spans; at most {ALL_SPANS_MAX}",
    ),
]


@pytest.mark.parametrize(("message", "expected"), TOO_MUCH, ids=[text for _, text in TOO_MUCH])
def test_more_than_a_node_can_mean_is_refused(message: Hello, expected: str) -> None:
    for each in (message, message.update):
        with pytest.raises(ProtocolError, match=expected):
            encode_bytes(Frame(each))


def test_what_a_large_node_offers_is_not() -> None:
    texts = [str(block) for block in range(0, 2 * SPANS_MAX, 2)]
    validate(Frame(hello(*(offer(*texts, model=f"m{i}") for i in range(ALL_SPANS_MAX // SPANS_MAX)))))


def test_spans_that_overlap_are_not_used_and_that_is_said_once(
    book: OfferBook, model: LocalModel, caplog: pytest.LogCaptureFixture
) -> None:
    book.peer_up("p", hello(offer("embed,0-3", "2-5")))
    for _ in range(3):
        assert book.offers(model) == []
        assert book.way(model, "p", Span(4, 5)) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "offer of p for m is not used: it offers 2-3 twice"


def test_an_offer_is_read_when_it_comes_and_not_when_it_is_used(book: OfferBook, model: LocalModel) -> None:
    said = hello(offer("embed,0-1", "4,6-7"))
    book.peer_up("p", said)
    found = book.offers(model)
    assert [each.span for each in found] == [Span(0, 2, embed=True), Span(4, 5), Span(6, 8)]
    # The spans are the very ones that were read before, not equal ones.
    assert all(a.span is b.span for a, b in zip(found, book.offers(model), strict=True))
    assert book.way(model, "p", Span(7, 8)) == Way("none", "f32", "n", row_invariant=False)
    assert book.way(model, "p", Span(4, 7)) is None
    assert book.plans(model) == {"p": frozenset({0, 1, 2, 5, 7, 8})}

    book.peer_says("p", structs.replace(said, offers=(offer("2-3", planned="2-5"),)).update)
    assert [each.span for each in book.offers(model)] == [Span(2, 4)]
    assert book.plans(model) == {"p": frozenset({3, 4, 5, 6})}
    book.peer_down("p")
    assert book.offers(model) == []
    assert book.way(model, "p", Span(2, 3)) is None


def test_a_model_that_has_other_blocks_now_is_read_anew() -> None:
    told = Told([offer("0-7")])
    assert told.read("m", N_BLOCKS).spans[0][0] == Span(0, 8)
    assert told.read("m", N_BLOCKS) is told.read("m", N_BLOCKS)
    assert "beyond the model" in told.read("m", 4).problem
    assert told.read("other", N_BLOCKS).spans == ()
