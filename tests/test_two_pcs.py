"""docs/two-pcs.md, run as it is written, between two network namespaces with the addresses of the text.

The commands and files are taken from the document; only places on disk and peer ids are filled in. What
installs packages, changes a firewall or talks to systemd is left out.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgn_backends.testing_models import make_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs/two-pcs.md").read_text()
BIN = Path(sys.executable).parent
N_BLOCKS = 28
PATIENCE_S = 120.0
BRIEF = "run --max-tokens 8 --temperature 0 "


def _namespaces_work() -> bool:
    name = f"dgn-probe-{secrets.token_hex(4)}"
    if (
        shutil.which("ip") is None
        or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode
    ):
        return False
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return True


def section(number: int) -> str:
    """The text of one numbered step."""
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", DOCUMENT, flags=re.M | re.S)
    assert found is not None
    return found[0]


def fenced(number: int, language: str) -> list[str]:
    """The fenced blocks of a step."""
    return re.findall(rf"^```{language}\n(.*?)^```", section(number), flags=re.M | re.S)


def daemon_line(number: int) -> str:
    """The one command of a step that runs dgnd, without the change of user."""
    (line,) = re.findall(r"^sudo -u dgn (dgnd .+)$", section(number), flags=re.M)
    return str(line)


class Pc:
    """One machine: a network namespace, and a directory in which its /etc/dgn, /var/lib/dgn, … lie."""

    def __init__(self, name: str, namespace: str, directory: Path) -> None:
        self.name = name
        self.namespace = namespace
        self.directory = directory
        self.daemon: subprocess.Popen[bytes] | None = None
        for place in ("etc/dgn", "var/lib", "run/dgn", "srv/models"):
            (directory / place).mkdir(parents=True)

    @property
    def model(self) -> Path:
        return self.directory / "srv/models/llama"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def configure(self, text: str) -> None:
        """Writes the document's file; the smallest backend is quick to start."""
        path = 'path = "/srv/models/llama"'
        assert path in text
        text = text.replace(path, f'{path}\nbackend = "reference"')
        (self.directory / "etc/dgn/dgn.toml").write_text(self.here(text))

    def here(self, text: str) -> str:
        """The document's text with this machine's places."""
        return re.sub(
            r"(?<![\w.])/(etc|var/lib|run|srv/models)(?=/(dgn|llama))", rf"{self.directory}/\1", text
        )

    def command(self, line: str) -> list[str]:
        words = shlex.split(self.here(line))
        return ["ip", "netns", "exec", self.namespace, str(BIN / words[0]), *words[1:]]

    def environ(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "DGN_SOCKET": str(self.directory / "run/dgn/dgnd.sock"),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, line: str, *, check: bool = True, typed: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a line of the document."""
        done = subprocess.run(
            self.command(line),
            env=self.environ(),
            input=typed,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        if check and done.returncode:
            log = self.log.read_text() if self.log.exists() else ""
            raise AssertionError(f"{self.name}$ {line}: {done.returncode}\n{done.stdout}{done.stderr}\n{log}")
        return done

    def start(self, line: str) -> None:
        with self.log.open("wb") as log:
            self.daemon = subprocess.Popen(
                self.command(line), env=self.environ(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self) -> None:
        if self.daemon is not None:
            self.daemon.terminate()
            try:
                self.daemon.wait(15)
            finally:
                self.daemon.kill()
                self.daemon.wait()


@pytest.fixture
def pcs() -> Iterator[tuple[Pc, Pc]]:
    """desk and attic on one wire, with the addresses that the document gives them."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not _namespaces_work():
        pytest.skip("network namespaces can't be made")
    addresses = dict(re.findall(r"`(desk|attic)` \(([\d.]+)\)", DOCUMENT))
    tag = secrets.token_hex(3)
    directory = Path(tempfile.mkdtemp(prefix="dgn-pcs-", dir="/tmp"))  # a socket's path must be short
    pair = [Pc(name, f"dgn-{name}-{tag}", directory / name) for name in ("desk", "attic")]
    made: list[str] = []
    try:
        for pc in pair:
            subprocess.run(["ip", "netns", "add", pc.namespace], check=True)
            made.append(pc.namespace)
        first, second = (pc.namespace for pc in pair)
        wire = ["link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", second]
        subprocess.run(["ip", "-n", first, *wire], check=True)
        for pc in pair:
            for words in (
                ["addr", "add", f"{addresses[pc.name]}/24", "dev", "wire"],
                ["link", "set", "wire", "up"],
            ):
                subprocess.run(["ip", "-n", pc.namespace, *words], check=True)
            subprocess.run(["ip", "-n", pc.namespace, "link", "set", "lo", "up"], check=True)
        yield pair[0], pair[1]
    finally:
        for pc in pair:
            pc.stop()
        for namespace in made:
            subprocess.run(["ip", "netns", "delete", namespace], check=True)
        shutil.rmtree(directory)


def test_from_two_bare_pcs_to_an_answer(pcs: tuple[Pc, Pc]) -> None:
    desk, attic = pcs

    # 2. identities
    init = daemon_line(2)
    ids = {pc.name: pc.run(init).stdout.strip() for pc in pcs}
    assert pcs[0].run(init).stdout.strip() == ids["desk"]

    # 3. a model, on desk alone; attic has the small files
    make_tiny_llama(desk.model, n_blocks=N_BLOCKS, shards=4)

    # 4. both files
    for pc, text in zip(pcs, fenced(4, "toml"), strict=True):
        text = text.replace("ID-OF-ATTIC", ids["attic"]).replace("ID-OF-DESK", ids["desk"])
        pc.configure(text)

    # 5. check says what attic needs; copying just that is enough
    (check,) = fenced(5, "sh")
    plan = desk.run(check.strip()).stdout
    assert "warning" not in plan
    of_attic = re.search(r"^  attic .*\n((?:   +\S+\n)+)", plan, flags=re.M)
    small = re.search(r"every node of this model also needs (.+)", plan)
    assert of_attic is not None
    assert small is not None
    shards, others = of_attic[1].split(), small[1].split()
    assert 0 < len(shards) < 4
    attic.model.mkdir()
    for file in others:
        shutil.copy(desk.model / file, attic.model / file)
    lacking = attic.run(check.strip(), check=False)
    assert lacking.returncode == 2
    assert all(file in lacking.stderr for file in shards)
    for file in shards:
        shutil.copy(desk.model / file, attic.model / file)
    attic.run(check.strip())

    # 7. run
    run = daemon_line(7)
    for pc in pcs:
        pc.start(run)

    # 8. ask: the answer comes from both, to both the same
    status, ask, chat = fenced(8, "sh")[0].splitlines()
    assert [line.split()[1] for line in (status, ask, chat)] == ["status", "run", "chat"]
    answer = json.loads(desk.run(ask.replace("run ", BRIEF + "--json ")).stdout)
    assert [(hop["name"], hop["peer"], hop["span"]) for hop in answer["route"]] == [
        ("desk", ids["desk"], "embed,0-13"),
        ("attic", ids["attic"], "14-27"),
        ("desk", ids["desk"], "head"),
    ]
    assert len(answer["token_ids"]) == 8
    assert "desk: ready" in desk.run(status).stdout
    assert (
        json.loads(attic.run(ask.replace("run ", BRIEF + "--json ")).stdout)["token_ids"]
        == answer["token_ids"]
    )
    assert desk.run(chat + " --max-tokens 8", typed="hello\nexit\n").stdout.strip()

    # the same from desk alone
    for pc in pcs:
        pc.stop()
    head, *_ = fenced(4, "toml")[0].replace("ID-OF-ATTIC", ids["attic"]).partition("[[blocks]]")
    row = '[[blocks]]\nmodel = "llama"\npeer = "self"\nspan = "embed,0-27,head"\n'
    desk.configure(head + row)
    desk.start(run)
    alone = json.loads(desk.run(ask.replace("run ", BRIEF + "--json ")).stdout)
    assert {hop["name"] for hop in alone["route"]} == {"desk"}
    assert alone["token_ids"] == answer["token_ids"]


def test_the_port_of_the_firewall_is_the_one_that_is_used() -> None:
    (rule,) = fenced(6, "sh")
    port = re.search(r"port (\d+) proto tcp", rule)
    assert port is not None
    assert f"tcp dport {port[1]} accept" in section(6)
    addresses = [address for text in fenced(4, "toml") for address in re.findall(r'"(/ip4/[^"]+)"', text)]
    assert len(addresses) == 4
    assert all(address.endswith(f"/tcp/{port[1]}") for address in addresses)
