"""What `dgnctl backends` says of plugins that are wrong in every way, and that they hurt nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from cluster import Cluster, Row, TestNode
from plugin_site import Site
from tiny_llama import make_tiny_llama

from dgnd.control.api import BackendInfo
from dgnd.probe.prober import Prober

GOOD = """
class B:
    name = "NAME"
    def devices(self): return ["npu:0", "cpu"]
    def load(self, request, progress): raise NotImplementedError
"""
SEGFAULT = "import ctypes; ctypes.string_at(8)"
LIE = """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b'{"devices": ["gpu"]}')
    except OSError:
        pass
"""
LEFT_BEHIND = "import subprocess; subprocess.Popen(['sleep', '1009'])\n"

#: Each plugin's source, and words of the reason; none: it can be used.
PLUGINS: dict[str, tuple[str, str]] = {
    "fine": (GOOD, ""),
    "segfault": (SEGFAULT, "it crashed when imported: SIGSEGV"),
    "aborts": ("import os; os.write(2, b'x\\nno chip\\n'); os.abort()", "SIGABRT (no chip)"),
    "exits": ("import sys; sys.exit(3)", "importing it raised sys.exit(3)"),
    "leaves": ("import os; os._exit(0)", "it ended the process when imported, with exit code 0"),
    "raises": ("raise OSError('no libgpu.so')", "importing it raised OSError: no libgpu.so"),
    "prints": ("while True: print('x' * 4096)", "it printed more than 64 KiB"),
    "forks": ("import os; os.fork()\n" + GOOD, "it forks when it is imported"),
    "starts": (LEFT_BEHIND + GOOD, ""),
    "eats": ("x = bytearray(8 << 30)", "importing it raised MemoryError"),
    "lies": (LIE + GOOD, "it wrote to a file that is not its own"),
    "numbers": (GOOD.replace('["npu:0", "cpu"]', "[5]"), "its devices() returned no list of device names"),
    "endless": (GOOD.replace('["npu:0", "cpu"]', "['x' * 10**6]"), "its devices() returned no list"),
    "nothing": (GOOD.replace('["npu:0", "cpu"]', "[]"), "its devices() is empty"),
    "stumbles": (GOOD.replace('return ["npu:0", "cpu"]', "raise ValueError('a')"), "raised ValueError: a"),
}  # fmt: skip


def add(site: Site, name: str, source: str) -> None:
    site.add(f"their-{name}", {name: f"plugin_{name}:B"}, {f"plugin_{name}": source.replace("NAME", name)})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Every plugin above, and two that claim one name."""
    site = Site(tmp_path / "site")
    for name, (source, _) in PLUGINS.items():
        add(site, name, source)
    for number in (1, 2):
        site.add(f"claimant-{number}", {"claimed": f"claim{number}:B"}, {f"claim{number}": SEGFAULT})
    return site


def left_behind() -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "1009"]]


def check(found: list[dict[str, Any]]) -> None:
    """What is said of the plugins above, and of those that come along."""
    entries = {entry["name"]: entry for entry in found}
    for name, (_, words) in PLUGINS.items():
        entry = entries[name]
        assert entry["state"] == ("broken" if words else "usable"), entry
        assert (entry["distribution"], entry["version"]) == (f"their-{name}", "1.5")
        assert entry["devices"] == ([] if words else ["npu:0", "cpu"])
        assert words in entry["reason"]
        assert "\n" not in entry["reason"]
        assert len(entry["reason"]) < 1000
    twice = [entry for entry in found if entry["name"] == "claimed"]
    assert [entry["distribution"] for entry in twice] == ["claimant-1", "claimant-2"]
    assert all("claimant-1 1.5, claimant-2 1.5; uninstall all but one" in entry["reason"] for entry in twice)
    assert (entries["reference"]["state"], entries["reference"]["devices"]) == ("usable", ["cpu"])
    assert sum(entry["auto"] for entry in found) == 1
    assert not entries["fine"]["auto"]


def test_plugins_that_are_wrong_are_shown_as_broken_without_a_daemon(site: Site) -> None:
    command = [sys.executable, "-m", "dgnctl", "--socket", "/nonexistent/s", "backends", "--json"]
    environment = {**os.environ, **site.environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    check(json.loads(done.stdout))
    assert left_behind() == []


@pytest.fixture
def cluster(site: Site, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "nodes", make_tiny_llama(tmp_path / "model", n_blocks=3)) as cluster:
        cluster.add("a").extra_env |= site.environment
        cluster.configure("a", [Row("a", "embed,0-2,head")])
        cluster.start()
        yield cluster


def alone_with_its_worker(node: TestNode) -> bool:
    return [child.pid for child in node.children()] == node.worker_pids()


def test_plugins_that_are_wrong_do_not_hurt_the_daemon(cluster: Cluster) -> None:
    node = cluster.nodes["a"]
    assert node.process is not None
    node.wait_for(lambda: alone_with_its_worker(node), what="end of reading the tokenizer")
    before = [child.pid for child in node.children()]
    found = node.ctl_json("backends")
    check(found)
    shown = node.ctl("backends").stdout
    assert "segfault   broken  their-segfault 1.5" in shown
    assert "it crashed when imported: SIGSEGV" in shown
    auto = next(entry["name"] for entry in found if entry["auto"])
    assert shown.endswith(f'backend = "auto" takes {auto}\n')
    assert [child.pid for child in node.children()] == before
    assert left_behind() == []
    assert not any("plugin_" in each.path for each in psutil.Process(node.process.pid).memory_maps())
    assert len(node.run("hello", "--max-tokens", "3")["token_ids"]) == 3
    assert "Traceback" not in node.log


def test_who_hangs_up_ends_the_children(cluster: Cluster, site: Site) -> None:
    add(site, "hangs", "import time; time.sleep(1009)")
    node = cluster.nodes["a"]
    node.wait_for(lambda: alone_with_its_worker(node), what="end of reading the tokenizer")
    before = len(node.children())
    asking = subprocess.Popen([sys.executable, "-m", "dgnctl", "--socket", str(node.socket), "backends"])
    node.wait_for(lambda: len(node.children()) > before, what="a child")
    asking.kill()
    asking.wait()
    node.wait_for(lambda: len(node.children()) == before, what="end of the children")


def test_one_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what it started holds its pipes, from a session of its own."""
    site = Site(tmp_path / "site")
    add(site, "hangs", "import time; time.sleep(1009)")
    add(site, "spins", "while True: pass")
    daemonised = "import subprocess; subprocess.Popen(['sleep', '7'], start_new_session=True)\n"
    add(site, "daemon", daemonised + GOOD)
    monkeypatch.setenv("PYTHONPATH", site.environment["PYTHONPATH"])
    monkeypatch.syspath_prepend(site.path)

    async def look() -> dict[str, BackendInfo]:
        return {info.name: info for info in await Prober(deadline_s=6.0).look()}

    found = trio.run(look)
    for name in ("hangs", "spins"):
        assert (found[name].state, found[name].reason) == ("broken", "it gave no answer within 6 s")
    assert found["daemon"].state == found["reference"].state == "usable"
    deadline = time.monotonic() + 30
    while any("dgnd.probe.child" in " ".join(each.cmdline()) for each in psutil.Process().children()):
        assert time.monotonic() < deadline
