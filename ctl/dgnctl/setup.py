"""`dgnctl setup`: a few questions, and a configuration that works."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Set
from pathlib import Path
from typing import Final

import click

from dgnctl.child import module_command
from dgnctl.output import emit
from dgnctl.setup_file import (
    DEMO_BLOCKS,
    DEMO_MODEL,
    HTTP_ADDRESS,
    MAX_NAME,
    PORT,
    Answers,
    PeerAnswer,
    configuration,
    everything,
    introduction,
    is_host,
    is_name,
    is_peer_id,
    span_problem,
    table_name,
)
from dgnctl.system.places import Places
from dgnctl.whole_file import write_whole
from dgnd.errors import BadRequest

_PATIENCE_S: Final = 120.0
#: The user that the service runs as.
_SERVICE_USER: Final = "dgn"


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="The configuration to write; else /etc/dgn/dgn.toml as root, ~/.config/dgn/dgn.toml as a user.",
)  # fmt: skip
@click.option(
    "--state-dir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Where the node keeps its key; else /var/lib/dgn as root, ~/.local/state/dgn as a user.",
)  # fmt: skip
def setup(output: Path | None, state_dir: Path | None) -> None:
    """Ask a few questions, and write a configuration.

    `dgnd init` asks none: it writes one with comments, to be edited.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise BadRequest("setup asks questions and needs a terminal; 'dgnd init' writes a file without")
    root = os.geteuid() == 0
    places = Places.of_system(Path("/")) if root else Places.of_user(Path("/"))
    path = (output or places.config).absolute()
    state = (state_dir or places.state).absolute()
    if path.exists() and not click.confirm(
        f"{path} is there. Replace it? The old one is kept as {path.name}.old"
    ):
        emit(f"nothing was changed; to check it: dgnd check --config {path}\n")
        return
    peer_id = _identity(state, root and state == places.state)
    answers = _ask(state, peer_id)
    _write(path, configuration(answers))
    emit(f"\nwrote {path}\n\n")
    _check(path)
    _tell(path, answers, peer_id, service=root and path == places.config)


def _identity(state: Path, of_service: bool) -> str:
    """The peer id, made if there is none."""
    user = _SERVICE_USER if of_service and _has_user(_SERVICE_USER) else None
    command = module_command("dgnd", "init", "--state-dir", str(state))
    # The file that init writes beside the key is for those who don't use setup, but does no harm.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_PATIENCE_S, user=user, check=False
    )
    if done.returncode:
        raise BadRequest(f"the node's key can't be made: {done.stderr.strip().removeprefix('dgnd: ')}")
    return done.stdout.strip()


def _has_user(name: str) -> bool:
    import pwd

    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _ask(state: Path, peer_id: str) -> Answers:
    host = socket.gethostname().partition(".")[0]
    while not is_name(name := str(click.prompt("Name of this PC", default=host or "desk")).strip()):
        emit(f"a name has 1 to {MAX_NAME} characters, without blanks and slashes\n")
    model_dir, model, n_blocks = _model()
    quant = "none"
    if model_dir is not None and click.confirm("Store its weights in 8 bits? That is half the memory"):
        quant = "int8"
    if not click.confirm("Do other PCs take part?"):
        return Answers(name, state, model, model_dir, quant, everything(n_blocks), (), _http())
    emit(
        f"\nThe model has blocks 0 to {n_blocks - 1}. Each PC serves some of them; one serves 'embed' (the\n"
        f"beginning) and one 'head' (the end). Such as: embed,0-{n_blocks // 2 - 1},head here and "
        f"{n_blocks // 2}-{n_blocks - 1} there;\n"
        "or 'auto' on all: each serves what others lack most; or 'none'.\n"
    )
    span = _span("What does this PC serve", n_blocks)
    peers: list[PeerAnswer] = []
    emit(f"\nThe peer id of this PC, which the others have to know, is\n{peer_id}\n")
    while click.confirm("\nName another PC?" if peers else "\nName one of the other PCs?", default=not peers):
        peers.append(_peer({peer.name for peer in peers}, n_blocks))
    return Answers(name, state, model, model_dir, quant, span, peers, _http())


def _model() -> tuple[Path | None, str, int]:
    while True:
        text = click.prompt(
            "Directory of the model, as from Hugging Face (empty: a small one that comes with dgn)",
            default="",
            show_default=False,
        ).strip()
        if not text:
            return None, DEMO_MODEL, DEMO_BLOCKS
        path = Path(text).expanduser().absolute()
        try:
            found = json.loads((path / "config.json").read_text())["num_hidden_layers"]
        except OSError as error:
            emit(f"{path / 'config.json'}: {error.strerror}; name a directory that holds a model\n")
        except (ValueError, KeyError, TypeError):
            emit(f"{path / 'config.json'}: no num_hidden_layers in it; a model that generates text has it\n")
        else:
            if isinstance(found, int) and found > 0:
                return path, table_name(path.name), found
            emit(f"{path / 'config.json'}: num_hidden_layers is {found!r}\n")


def _span(question: str, n_blocks: int) -> str:
    while True:
        answer = str(click.prompt(question, default="auto")).replace(" ", "")
        if answer in ("auto", "none"):
            return "" if answer == "none" else answer
        problem = span_problem(answer, n_blocks)
        if not problem:
            return answer
        emit(f"{problem}\n")


def _peer(taken: Set[str], n_blocks: int) -> PeerAnswer:
    while (name := table_name(click.prompt("Its name"))) in {"self", *taken} or not is_name(name):
        emit(f"no PC can be called {name!r} now; choose another name, of at most {MAX_NAME} characters\n")
    while not is_peer_id(peer_id := str(click.prompt("Its peer id (dgnd init prints it there)")).strip()):
        emit("that is no peer id; one begins with 12D3KooW and has 52 letters and digits\n")
    question = f"Its address: an IP address, a name, or /ip4/…/tcp/{PORT} (empty: it connects to this PC)"
    while address := str(click.prompt(question, default="", show_default=False)).strip():
        if is_host(address):
            break
        emit(f"{address!r} is none of these\n")
    span = _span("What does it serve (auto: it says that itself)", n_blocks)
    return PeerAnswer(name, peer_id, address, "" if span == "auto" else span)


def _http() -> bool:
    wanted = click.confirm(
        f"Serve programs of this PC over HTTP, at {HTTP_ADDRESS} (OpenAI's API, Ollama's)?"
    )
    if wanted and importlib.util.find_spec("hypercorn") is None:
        emit("that needs: pip install 'distributed-gpt-node[http]'\n")
    return wanted


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_name(path.name + ".old"))
    except OSError as error:
        raise BadRequest(f"{path}: can't be written: {error.strerror or error}; see --output") from None
    write_whole(path, text.encode(), 0o644)


def _check(path: Path) -> None:
    """Says what the file means, as dgnd has it. Raises BadRequest where it can't be used yet."""
    done = subprocess.run(
        module_command("dgnd", "check", "--config", str(path)),
        capture_output=True, text=True, timeout=_PATIENCE_S, check=False,
    )  # fmt: skip
    emit(done.stdout)
    if done.returncode:
        why = done.stderr.strip()
        raise BadRequest(f"{why}\nmend it there, then: dgnd check --config {path}")


def _tell(path: Path, answers: Answers, peer_id: str, *, service: bool) -> None:
    if answers.peers:
        emit(f"\nin the files of the other PCs:\n\n{introduction(answers.name, peer_id)}")
    start = f"dgnd --config {path}"
    if service and _has_user(_SERVICE_USER):
        start = "systemctl enable --now dgnd"
    emit(f"\nnext:\n  {start}\n  dgnctl chat --wait 120\n")
