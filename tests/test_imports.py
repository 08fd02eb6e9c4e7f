"""What dgnd loads: no compute library, also not after an answer computed by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
from cluster import Cluster, Row
from tiny_llama import make_tiny_llama

COMPUTE = ("torch", "onnx", "onnxruntime", "transformers")
#: What py-libp2p's packages would bring, and nothing here uses (dgnd.p2p.slim_libp2p).
#: What only the HTTP API needs.
HTTP = ("starlette", "hypercorn", "dgnd.http")
#: What only answers of a given form need.
FORMS = ("llguidance",)
UNUSED = ("zeroconf", "requests", "httpx", "rich", "libp2p.host", "libp2p.kad_dht", "libp2p.relay")
UNUSED += ("aioquic.quic.connection", "service_identity")


def _modules_after(statement: str) -> set[str]:
    script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_whole_daemon_imports_no_compute_library_and_only_its_part_of_libp2p() -> None:
    loaded = _modules_after("import dgnd.main, dgnd.app, dgnd.upkeep.plan")
    assert "libp2p.security.noise.transport" in loaded  # the composition root was really imported
    assert loaded.isdisjoint((*COMPUTE, *UNUSED, *HTTP, *FORMS))


def test_names_of_libp2p_are_there_for_whoever_asks_after_dgnd_was_imported() -> None:
    loaded = _modules_after(
        "import dgnd.app; from libp2p import new_host; import libp2p; "
        "assert libp2p.transport.TCP is not None and libp2p.network.TagStore is not None"
    )
    assert "libp2p.host.basic_host" in loaded
    quic = "from libp2p.transport.quic.stream import QuicConnectionError as error; assert error is not None"
    assert "aioquic.quic.connection" in _modules_after(f"import dgnd.app; {quic}")


def _mapped_files(pid: int) -> set[str]:
    """Names of the files mapped into a process."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(fields[5]).name for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6}


def _holds(files: set[str], library: str) -> bool:
    return any(name.startswith((library, f"lib{library}")) for name in files)


def test_a_daemon_that_answered_through_torch_has_not_loaded_it(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    with Cluster(tmp_path / "nodes", model, backend="torch") as cluster:
        cluster.full_mesh([Row("a", "embed,0-3,head")])
        node = cluster.nodes["a"]
        result = node.run("hello", "--max-tokens", "3", "--temperature", "0")
        assert len(result["token_ids"]) >= 1
        (worker,) = node.worker_pids()
        assert node.process is not None
        daemon = _mapped_files(node.process.pid)
        assert _holds(_mapped_files(worker), "torch")  # this is what it looks like where it is loaded
        assert any(name.startswith("_multiarray_umath") for name in daemon)  # numpy: maps were really read
        for library in ("torch", "onnxruntime"):
            assert not _holds(daemon, library)
        assert psutil.Process(node.process.pid).memory_info().rss < 150e6
