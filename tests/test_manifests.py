"""The same name has to mean the same weights: manifests compared as values, and between real daemons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Row, TestNode
from tiny_llama import make_tiny_llama

from dgn_backends.manifest import Manifest
from dgnd.control.client import ControlClient
from dgnd.peers.offers import OfferBook
from dgnd.peers.trust import ManifestBook
from dgnd.wire.messages import Manifest as ManifestMessage

#: Of the tiny model; each in a file of its own, so that halves of it have nothing in common.
TENSORS = 39
ROWS = [Row("a", "embed,0-1"), Row("b", "2-3,head")]


def manifest(
    complete: bool = False, config: str = "c", tokenizer: str | None = "t", **tensors: str
) -> Manifest:
    return Manifest(config_digest=config, tokenizer_digest=tokenizer, tensors=tensors, complete=complete)


def book(**known: Manifest) -> ManifestBook:
    found = ManifestBook("me")
    for peer, shown in known.items():
        found.put(peer, "m", shown)
    return found


def test_parts_with_nothing_in_common_are_usable_until_somebody_has_the_whole() -> None:
    known = book(me=manifest(x="1"), p=manifest(y="2"))
    assert known.usable("p", "m")
    assert known.whole_digest("m") is None
    known.put("q", "m", manifest(complete=True, x="1", y="3"))
    assert not known.usable("p", "m")
    assert known.usable("q", "m")
    difference = known.conflict("m", ["me", "p", "q"])
    assert difference is not None
    assert difference[:2] == ("p", "q")
    assert "y" in difference[2]
    known.put("p", "m", manifest(y="3"))
    assert known.usable("p", "m")
    known.put("me", "m", manifest(x="2"))  # now it is this node that differs
    assert not known.usable("p", "m")
    assert known.quarrel("p", "m") == known.conflict("m", ["me", "q"])
    known.put("p", "m", manifest(y="4"))  # a whole model of others says nothing
    assert known.usable("p", "m")
    known.forget("q")
    assert known.whole_digest("m") is None


@pytest.mark.parametrize(
    "other", [manifest(config="d"), manifest(tokenizer="u"), manifest(x="2"), manifest(x="2", complete=True)]
)
def test_what_differs_is_not_usable_and_vouches_for_nothing(other: Manifest) -> None:
    known = book(me=manifest(x="1"), p=other)
    assert not known.usable("p", "m")
    assert known.whole_digest("m") is None
    assert known.conflict("m", ["me", "p"]) is not None


def test_whole_models_vouch_with_my_own_first() -> None:
    mine = manifest(complete=True, x="1", y="2")
    known = book(p=manifest(complete=True, x="1", y="3"), me=mine)
    assert known.whole_digest("m") == mine.digest
    assert not known.usable("p", "m")


def test_a_missing_tokenizer_is_no_difference() -> None:
    assert book(me=manifest(x="1"), p=manifest(tokenizer=None, x="1")).usable("p", "m")


def test_nothing_is_kept_of_models_that_this_node_does_not_have() -> None:
    offers = OfferBook("me", "desk", "dgn", {}, lambda: 0.0)
    for number in range(100):
        shown = ManifestMessage(
            model=f"m{number}", config_digest="c", tokenizer_digest=None, tensors={"x": "1"}, complete=True
        )
        offers.peer_manifest("p", shown)
        assert offers.manifests.get("p", f"m{number}") is None


# --- real daemons -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same config: other weights, another tokenizer, and the same in six files."""
    root = tmp_path_factory.mktemp("models")
    found = {
        "one": make_tiny_llama(root / "one", seed=1),
        "other": make_tiny_llama(root / "other", seed=2),
        "words": make_tiny_llama(root / "words", seed=1),
        "shards": make_tiny_llama(root / "shards", seed=1, shards=TENSORS),
    }
    words = found["words"] / "tokenizer.json"
    words.write_text(words.read_text() + "\n")
    return found


def call(node: TestNode, method: str) -> Any:
    """A method of the daemon, without a process for each question."""
    with ControlClient(node.socket) as client:
        return client.call(method)


def notes(node: TestNode) -> str:
    return "\n".join(call(node, "status").notes)


def verified(node: TestNode) -> bool:
    (model,) = call(node, "models.list")
    return bool(model.verified)


def refused(node: TestNode) -> Any:
    failed = node.ctl("run", "--raw", "--json", "--max-tokens", "3", "x", check=False)
    assert failed.returncode != 0
    (line,) = failed.stdout.splitlines()
    return json.loads(line)["error"]


def test_other_files_under_one_name_are_refused_naming_both(models: dict[str, Path], tmp_path: Path) -> None:
    """One pair of nodes with two maps: other weights, and another tokenizer."""
    rows = [Row(row.peer, row.span, model) for model in ("weights", "words") for row in ROWS]
    with Cluster(tmp_path, None) as cluster:
        cluster.add("a")
        cluster.add("b")
        for name, folders in (("a", ("one", "one")), ("b", ("other", "words"))):
            tables = {
                model: {"path": str(models[folder]), "backend": "reference"}
                for model, folder in zip(("weights", "words"), folders, strict=True)
            }
            cluster.configure(name, rows, ["b" if name == "a" else "a"], models=tables)
        cluster.start(state="degraded")
        for node in cluster.nodes.values():
            node.wait_for(
                lambda node=node: notes(node).count("differs between") == 2, what="both differences"
            )
            for model, what in (("weights", "lm_head.weight"), ("words", "tokenizer")):
                failed = node.ctl("run", "--raw", "--json", "--model", model, "x", check=False)
                error = json.loads(failed.stdout)["error"]
                assert error["kind"] == "manifest_mismatch"
                assert f"model {model} differs between" in error["message"]
                for word in (" a ", " b:", what) if node.name == "a" else (" b ", " a:", what):
                    assert word in error["message"]
            status = call(node, "status")
            assert status.missing.keys() == {"weights", "words"}
            assert status.sessions == []


def parts(model: Path, folder: Path, keep: set[str]) -> Path:
    """A copy of a sharded model that has only those files that hold one of the tensors' prefixes."""
    shutil.copytree(model, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if any(name.startswith(prefix) for prefix in keep)}
    for file in set(index.values()) - needed:
        (folder / file).unlink()
    return folder


LOW = {"model.embed_tokens", "model.layers.0.", "model.layers.1."}
HIGH = {"model.layers.2.", "model.layers.3.", "model.norm", "lm_head"}


def test_parts_of_a_model_are_unverified_until_a_node_has_the_whole(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with Cluster(tmp_path, None) as cluster:
        folders = {
            "a": parts(models["shards"], tmp_path / "low", LOW),
            "b": parts(models["shards"], tmp_path / "high", HIGH),
            "c": models["one"],
            "d": models["other"],
        }
        files = [{path.name for path in folders[name].glob("*.safetensors")} for name in ("a", "b")]
        assert not files[0] & files[1]
        assert len(files[0] | files[1]) == TENSORS
        for name in folders:
            cluster.add(name)
        for name, folder in folders.items():
            peers = [peer for peer in folders if peer != name]
            cluster.configure(name, ROWS, peers, models={"m": {"path": str(folder), "backend": "reference"}})
        cluster.start("a", "b")
        a, b = cluster.nodes["a"], cluster.nodes["b"]
        unverified = "model m is unverified: no node here has all its files"
        for node in (a, b):
            assert unverified in notes(node)
            assert not verified(node)
        alone = a.run("hello", "--max-tokens", "12")
        assert [hop["name"] for hop in alone["route"]] == ["a", "b"]

        cluster.start("c")
        for node in (a, b):
            node.wait_for(lambda node=node: unverified not in notes(node), what="verification")
            assert verified(node)
            assert node.run("hello", "--max-tokens", "12")["token_ids"] == alone["token_ids"]
        assert cluster.nodes["c"].run("hello", "--max-tokens", "12")["token_ids"] == alone["token_ids"]
        cluster.nodes["c"].terminate()
        a.wait_for(lambda: unverified in notes(a), what="end of the verification")

        cluster.start("d", state="degraded")  # all files, but others: it vouches for nothing, and is named
        a.wait_for(lambda: "differs between a and d" in notes(a), what="the difference")
        assert unverified in notes(a)
        assert a.run("hello", "--max-tokens", "12")["token_ids"] == alone["token_ids"]
        assert refused(cluster.nodes["d"])["kind"] == "manifest_mismatch"


def test_parts_of_two_models_are_found_out_by_a_node_that_has_one_of_them(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """a and b have no tensor in common, so only the whole model shows that b's is another one."""
    other = make_tiny_llama(tmp_path / "other-shards", seed=2, shards=TENSORS)
    with Cluster(tmp_path, None) as cluster:
        folders = {
            "a": parts(models["shards"], tmp_path / "low", LOW),
            "b": parts(other, tmp_path / "high", HIGH),
            "c": models["one"],
        }
        for name in folders:
            cluster.add(name)
        for name, folder in folders.items():
            peers = [peer for peer in folders if peer != name]
            cluster.configure(name, ROWS, peers, models={"m": {"path": str(folder), "backend": "reference"}})
        cluster.start(state="degraded")
        a = cluster.nodes["a"]
        for node, lacks in ((a, "2-3,head"), (cluster.nodes["b"], "embed,0-1")):
            node.wait_for(
                lambda node=node, lacks=lacks: call(node, "status").missing == {"m": lacks}, what="refusal"
            )
            assert "differs between" in notes(node)
            error = refused(node)
            assert error["kind"] == "manifest_mismatch"
            assert any(f"differs between {pair}: " in error["message"] for pair in ("b and c", "c and b"))
