"""Three machines with the package, each with its own systemd, on a network: they answer together, and go on
while the package is upgraded. `make test-systemd` runs it.

desk has the first half of the demo model, attic and cellar both have the second.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from deb_kit import WHY_SKIPPED, install, made_package, newer_package, quick_dpkg
from lan import Lan
from lan import why_not as why_no_lan
from nspawn import Machine, base_system, why_not

from dgnd.control import api
from dgnd.control.client import ControlClient

pytestmark = [
    pytest.mark.skipif(not os.environ.get("DGN_TEST_SYSTEMD"), reason=WHY_SKIPPED),
    pytest.mark.skipif(bool(reason := why_not() or why_no_lan()), reason=reason),
    pytest.mark.timeout(1800),
]

MODEL = "dgn-demo"
SPANS = {"desk": "embed,0-3", "attic": "4-7,head", "cellar": "4-7,head"}
PORT = 4001
#: On every wire while a package is upgraded: a token takes twice as long, and an answer outlasts the upgrade.
SLOW_S = 0.15
#: The least number of tokens for an answer that is to outlast it.
LONG = 300


@dataclass
class Place:
    """The machines, and the network between them."""

    lan: Lan
    machines: dict[str, Machine]

    @property
    def desk(self) -> Machine:
        return self.machines["desk"]

    def client(self) -> ControlClient:
        """Of desk, as root, with its file system seen from here."""
        return ControlClient(Path("/proc", str(self.desk.leader), "root", "run/dgn/dgnd.sock"))

    def serving(self) -> set[str]:
        """Whose blocks desk can use now."""
        with self.client() as client:
            return {row.name for row in client.call("map.show").rows if row.state == "ready"}

    def slow(self, delay_s: float) -> None:
        for wire in self.lan.wires():
            wire.delay_s = delay_s


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A Debian in which the package was installed while no systemd ran, as when an image is made."""
    base = base_system()
    image = Machine("image", tmp_path_factory.mktemp("image"), base)
    image.mount()
    try:
        quick_dpkg(image.root)
        shutil.copy(made_package(), image.root / "var/tmp/dgn.deb")
        command = ["chroot", image.root, "dpkg", "--install", "/var/tmp/dgn.deb"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (image.root / "var/tmp/dgn.deb").unlink()
    finally:
        image.unmount()
    yield [image.upper, base]
    shutil.rmtree(image.upper.parent)


@pytest.fixture(scope="module")
def place(layers: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("cluster")
    with contextlib.ExitStack() as stack:
        lan = stack.enter_context(Lan(SPANS))
        machines = {
            name: stack.enter_context(Machine(name, directory, *layers, namespace=lan.namespace(name)))
            for name in SPANS
        }
        place = Place(lan, machines)
        ids = {
            name: json.loads(machine.run("dgnctl", "status", "--json").stdout)["peer_id"]
            for name, machine in machines.items()
        }
        for name, machine in machines.items():
            (machine.root / "etc/dgn/dgn.toml").write_text(config(name, ids, lan))
        for machine in machines.values():
            machine.run("systemctl", "restart", "dgnd.service")
        place.desk.wait_for(lambda: place.serving() == set(SPANS), "all blocks in reach")
        yield place


def config(name: str, ids: dict[str, str], lan: Lan) -> str:
    """Of one machine."""
    lines = ["[node]", f'name = "{name}"', f"[models.{MODEL}]", "threads = 1"]
    for peer, peer_id in ids.items():
        if peer != name:
            address = f"/ip4/{lan.addresses[peer]}/tcp/{PORT}"
            lines += [f"[peers.{peer}]", f'id = "{peer_id}"', f'addrs = ["{address}"]']
    for peer, span in SPANS.items():
        row = f'model = "{MODEL}"\npeer = "{"self" if peer == name else peer}"\nspan = "{span}"'
        lines += ["[[blocks]]", row]
    return "\n".join(lines) + "\n"


def test_machines_on_a_network_answer_a_chat(place: Place) -> None:
    place.desk.run("useradd", "--create-home", "--groups", "dgn", "alice")
    done = subprocess.run(
        place.desk.inside("dgnctl", "chat", user="alice"),
        input="How do I connect a peer?\n", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, "dgnctl connect" in done.stdout) == (0, True), done
    with place.client() as client:
        result = client.generate(api.GenerateParams(prompt="How do I connect a peer?"), lambda _: None)
    assert {hop.name for hop in result.route} in ({"desk", "attic"}, {"desk", "cellar"})


def long_answer(place: Place) -> tuple[api.GenerateParams, list[int]]:
    """A request, and its ids where nothing disturbs it."""
    for seed in range(40):
        params = api.GenerateParams(prompt="x", raw=True, temperature=4.0, seed=seed)
        with place.client() as client:
            ids = client.generate(params, lambda _: None).token_ids
        if len(ids) >= LONG:
            return params, ids
    raise AssertionError(f"no answer of {LONG} tokens")


@pytest.mark.parametrize("revision", ["+1", "+2"])
def test_an_upgrade_during_an_answer_loses_no_token(place: Place, tmp_path: Path, revision: str) -> None:
    params, right = long_answer(place)
    package = newer_package(made_package(), tmp_path, revision)
    came: list[int] = []
    under_way, ended = threading.Event(), threading.Event()
    results: list[api.GenerateResult | Exception] = []

    def delta(piece: api.GenerateDelta) -> None:
        came.extend(piece.token_ids)
        if len(came) >= 5:
            under_way.set()

    def ask() -> None:
        try:
            with place.client() as client:
                results.append(client.generate(params, delta))
        except Exception as error:  # noqa: BLE001 - shown below
            results.append(error)
        ended.set()
        under_way.set()

    place.slow(SLOW_S)
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert under_way.wait(120.0)
        with place.client() as client:
            (session,) = client.call("status").sessions
        (upgraded,) = {hop.name for hop in session.route} - {"desk"}
        machine = place.machines[upgraded]
        before = machine.property("MainPID")
        install(machine, package)
        in_time = not ended.is_set()
    finally:
        place.slow(0.0)
        thread.join(300.0)
    assert machine.property("MainPID") not in ("0", before)
    assert machine.run("dpkg-query", "-W", "-f", "${Version}", "dgn").stdout.endswith(revision)
    (result,) = results
    assert isinstance(result, api.GenerateResult), result
    assert in_time, "the answer ended before the upgrade did: it shows nothing"
    assert result.token_ids == right
    assert came == right
    assert upgraded not in {hop.name for hop in result.route}
    place.desk.wait_for(lambda: place.serving() == set(SPANS), f"{upgraded} serves again")
