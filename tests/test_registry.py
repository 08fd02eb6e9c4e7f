"""The registry: what it lists, that it imports nothing for that, and one clear line for every broken
plugin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from plugin_site import Site

from dgn_backends.api import Backend
from dgn_backends.errors import BackendUnavailable
from dgn_backends.reference import ReferenceBackend
from dgn_backends.registry import choose_backend, duplicates, list_backends, load_backend

GOOD = """
class Good:
    name = "fine"
    def devices(self): return ["cpu"]
    def load(self, request, progress): raise NotImplementedError
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(tmp_path)
    return Site(tmp_path)


def failure(name: str) -> str:
    with pytest.raises(BackendUnavailable) as caught:
        load_backend(name)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_built_in_backends_use_the_same_door() -> None:
    entries = {entry.name: entry for entry in list_backends()}
    assert entries["reference"].distribution == entries["torch"].distribution == "distributed-gpt-node"
    backend: Backend = load_backend("reference")
    assert isinstance(backend, ReferenceBackend)
    assert duplicates(list_backends()) == {}


def test_listing_and_choosing_import_no_backend() -> None:
    code = (
        "import sys; from dgn_backends.registry import *\n"
        "list_backends(); choose_backend(); choose_backend('torch')\n"
        "unwanted = 'torch', 'onnxruntime', 'dgn_backends.torch_backend', 'dgn_backends.reference'\n"
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plugin_is_listed_and_loaded(site: Site) -> None:
    site.add("their-plugin", {"fine": "fine_module:Good"}, {"fine_module": GOOD})
    (entry,) = [entry for entry in list_backends() if entry.name == "fine"]
    assert (entry.distribution, entry.version, entry.target) == ("their-plugin", "1.5", "fine_module:Good")
    assert "fine_module" not in sys.modules
    assert load_backend("fine").devices() == ["cpu"]


def test_only_the_chosen_one_is_imported(site: Site) -> None:
    site.add("their-bad", {"bad": "bad_at_import:X"}, {"bad_at_import": "raise SystemError('boom')"})
    site.add("their-plugin", {"fine": "other_fine:Good"}, {"other_fine": GOOD})
    assert load_backend("fine").devices() == ["cpu"]
    assert "bad_at_import" not in sys.modules


def test_an_unknown_name_lists_the_installed() -> None:
    message = failure("nothing")
    assert 'no backend "nothing" is installed' in message
    assert "reference" in message


def test_a_name_claimed_twice_names_both(site: Site) -> None:
    site.add("first-plugin", {"fine": "m1:Good"}, {"m1": GOOD})
    site.add("second-plugin", {"fine": "m2:Good"}, {"m2": GOOD})
    assert [entry.distribution for entry in duplicates(list_backends())["fine"]] == [
        "first-plugin",
        "second-plugin",
    ]
    message = failure("fine")
    assert "first-plugin 1.5, second-plugin 1.5" in message
    assert "uninstall" in message


def test_a_missing_dependency_says_what_to_install(site: Site) -> None:
    site.add("their-plugin", {"gpu": "gpu_module:B"}, {"gpu_module": "import missing_driver.core"})
    message = failure("gpu")
    assert 'backend "gpu" of their-plugin 1.5 (gpu_module:B)' in message
    assert "missing_driver" in message
    assert message.endswith("pip install missing_driver")


def test_a_missing_dependency_with_an_extra_names_the_extra(site: Site) -> None:
    site.add("their-plugin", {"gpu": "gpu_extra:B"}, {"gpu_extra": "import missing_driver"}, extras=("gpu",))
    assert failure("gpu").endswith("pip install 'their-plugin[gpu]'")


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        (None, "not_there:B", "its module not_there is missing"),
        ("raise OSError('no libcuda')", "broken1:B", "importing it raised OSError: no libcuda"),
        ("import os\nfrom os import nothing_such", "broken2:B", "importing it raised ImportError"),
        ("x = = 1", "broken3:B", "importing it raised SyntaxError"),
        ("raise SystemExit(3)", "broken10:B", "importing it raised sys.exit(3)"),
        ("raise GeneratorExit", "broken11:B", "importing it raised GeneratorExit;"),
        (
            "class E(Exception):\n def __str__(self): raise self\nraise E",
            "broken12:B",
            "importing it raised E: its message can't be made",
        ),
        ("raise ValueError('\x1b[31m' + 'x' * 9999)", "broken13:B", "raised ValueError: [31mxxx"),
        ("class A: pass", "broken4:B", "has no attribute 'B'"),
        ("B = 5", "broken5:B", "does not name a class"),
        ("class B: name = 'else'", "broken6:B", "its class says name = 'else', not \"bad\""),
        ("class B:\n name = 'bad'\n def devices(self): ...", "broken7:B", "its class has no method load"),
        (
            "class B:\n name = 'bad'\n load = devices = lambda self: 0\n"
            " def __init__(self): raise ValueError('a\\nb')",
            "broken8:B",
            "making it raised ValueError: a b",
        ),
        (
            "class B:\n name = 'bad'\n load = devices = lambda self: 0\n def __init__(self, x): ...",
            "broken9:B",
            "making it raised TypeError",
        ),
    ],
)
def test_every_way_to_be_broken_is_one_line(site: Site, source: str | None, target: str, why: str) -> None:
    module = target.partition(":")[0]
    site.add("their-plugin", {"bad": target}, {} if source is None else {module: source})
    message = failure("bad")
    assert why in message
    assert "their-plugin 1.5" in message


def test_damaged_metadata_hurts_no_other(site: Site) -> None:
    before = list_backends()
    site.add("no-metadata", {"nameless": "m:B"}, {})
    (site.path / "no_metadata-1.5.dist-info" / "METADATA").unlink()
    site.add("no-text", {"x": "m:B"}, {})
    (site.path / "no_text-1.5.dist-info" / "entry_points.txt").write_bytes(b"[dgn.backends]\n\xff = m:B\n")
    site.add("no-target", {"aimless": "not a target!"}, {})
    found = {entry.name: entry for entry in list_backends()}
    assert set(before) < set(found.values())
    assert str(found["nameless"]) == 'backend "nameless" of unknown unknown (m:B)'
    assert "can't be loaded" in failure("aimless")


def test_auto_prefers_what_is_installed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"numpy"}

    def find_spec(name: str) -> object:
        return object() if name in present else None

    monkeypatch.setattr("dgn_backends.registry.importlib.util.find_spec", find_spec)
    assert choose_backend() == "reference"
    present.add("torch")
    assert choose_backend("auto") == choose_backend("auto", "int4") == "torch"
    present.add("onnxruntime")
    monkeypatch.setattr("dgn_backends.registry._NVIDIA", Path("/no such device"))
    assert choose_backend("auto", "none") == "torch"
    assert choose_backend("auto", "int4") == "onnx"
    assert choose_backend("auto", "int4", "cuda:0") == "torch"
    monkeypatch.setattr("dgn_backends.registry._NVIDIA", Path("/"))
    assert choose_backend("auto", "int4") == "torch"
    assert choose_backend("auto", "int4", "cpu") == "onnx"
    site.add("their-plugin", {"fine": "fine_module:Good"}, {"fine_module": GOOD})
    assert choose_backend("fine") == "fine"
    with pytest.raises(BackendUnavailable, match='no backend "other" is installed'):
        choose_backend("other")
