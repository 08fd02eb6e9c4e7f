"""js-libp2p from npm pings a node and asks who it is. `make test-js` runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
from p2p_kit import Node, running

from dgnd.identity import Identity
from dgnd.p2p.standard import IDENTIFY, PING

HERE = Path(__file__).resolve().parent / "js_libp2p"

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("DGN_TEST_JS"), reason="needs packages of npm: `make test-js` runs it"
    ),
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed"),
]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ask.mjs beside the packages that it needs."""
    directory = tmp_path_factory.mktemp("js")
    for name in ("package.json", "ask.mjs"):
        shutil.copy(HERE / name, directory)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode:
        pytest.skip(f"npm can't install js-libp2p here: {done.stderr.strip()[-300:]}")
    return directory / "ask.mjs"


def test_js_libp2p_pings_and_identifies(script: Path) -> None:
    async def main() -> None:
        node, listed = Node("desk", settings={"software": "dgn/1.2.3"}), Identity.generate()
        node.network.allow(listed.peer_id, "js", keep_connected=False)
        async with running(node):
            where = node.address.partition("/p2p/")[0]
            command = ["node", str(script), node.address, listed.seed.hex()]
            with trio.fail_after(60):
                done = await trio.run_process(command, capture_stdout=True, cwd=script.parent)
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["me"] == listed.peer_id
        assert found["peer"] == node.id
        assert len(found["pings"]) == 3
        assert all(0 <= ms < 10_000 for ms in found["pings"])
        assert found["agent"] == "dgn/1.2.3"
        assert found["listening"] == [where]
        assert found["observed"].startswith("/ip4/127.0.0.1/tcp/")
        assert {PING, IDENTIFY, "/dgn/1"} <= set(found["protocols"])

    trio.run(main)
