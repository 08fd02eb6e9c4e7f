"""The repository's own promises: pins, targets, what is installed with the wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M))
SOURCES = sorted(path for name in ("daemon", "backends", "ctl") for path in (ROOT / name).rglob("*.py"))


#: What there is at the top.
LAYOUT = {
    ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "backends",
    "benchmarks", "constraints.txt", "ctl", "daemon", "dgn.toml.example", "docs", "packaging", "plugins",
    "pyproject.toml", "scripts", "tests",
}  # fmt: skip


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, str]:
    """Every requirement of the project by its canonical name."""
    project = PYPROJECT["project"]
    requirements = [*project["dependencies"], *PYPROJECT["dependency-groups"]["dev"]]
    for extra, more in project["optional-dependencies"].items():
        requirements += more if extra != "all" else []
    return {canonical(re.split(r"[^\w.-]", each, maxsplit=1)[0]): each for each in requirements}


def test_every_dependency_is_pinned() -> None:
    pinned = {canonical(name) for name in PINS}
    assert set(declared()) <= pinned
    assert {"pip", "hatchling", "setuptools"} <= pinned  # what installs and builds
    assert PINS["torch"] == "2.13.0"


def test_no_pin_names_a_place() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_nothing_is_kept_that_the_layout_does_not_name() -> None:
    """A node that was run here leaves a state directory, with the key that is its identity."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    assert {file.parts[0] for file in files} == LAYOUT
    assert [file for file in files if file.suffix == ".key"] == []


@pytest.mark.parametrize("name", sorted(declared()))
def test_what_is_installed_is_what_is_pinned(name: str) -> None:
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    pins = {canonical(each): version for each, version in PINS.items()}
    assert installed.split("+")[0] == pins[name], "run `make check`, or raise the pin"


def imports_of(path: Path) -> set[str]:
    """The top-level names that a module imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_what_the_sources_import_is_declared_and_what_is_declared_is_imported() -> None:
    imported = set().union(*map(imports_of, SOURCES)) - set(sys.stdlib_module_names)
    own = {"dgnd", "dgn_backends", "dgnctl"}
    project = PYPROJECT["project"]
    always = {canonical(re.split(r"[^\w.-]", each, maxsplit=1)[0]) for each in project["dependencies"]}
    extras = {"torch", "onnx", "onnxruntime", "starlette", "hypercorn"}
    comes_with = {
        "multiaddr": "libp2p",
        "trio_typing": "libp2p",
        "markdown_it": "markdown-it-py",
    }  # a library that is only there for another one, or is called otherwise
    assert {canonical(comes_with.get(name, name)) for name in imported - own} - extras == always


def test_ci_runs_what_developers_run() -> None:
    run = ROOT / ".ci/run"
    assert os.access(run, os.X_OK)
    text = run.read_text()
    assert "set -euo pipefail" in text
    assert "make test" in text


def make_dry_run(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "-n", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    return done.stdout


def test_test_runs_the_checks_and_the_tests() -> None:
    commands = make_dry_run("test")
    for command in ("ruff check .", "ruff format --check .", "mypy", "lint-imports", "pytest"):
        assert re.search(rf"^.*{re.escape(command)}", commands, flags=re.M), command


def test_a_prompt_reaches_the_demo_as_it_is(tmp_path: Path) -> None:
    prompt = 'what\'s $5 of "$(HOME)" & `x`?'
    makefile = (ROOT / "Makefile").read_text()
    copied = re.sub(r"^demo:\n(\t.*\n)+", 'demo:\n\t@printf %s "$$DGN_DEMO_PROMPT"\n', makefile, flags=re.M)
    assert copied != makefile
    (tmp_path / "Makefile").write_text(copied)
    done = subprocess.run(
        ["make", "demo", f"PROMPT={prompt}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == prompt


def test_the_commands_are_installed() -> None:
    for command in ("dgnd", "dgnctl"):
        done = subprocess.run(
            [Path(sys.executable).parent / command, "--help"], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("Usage: ")
