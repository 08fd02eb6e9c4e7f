"""What the tests of a user's view share: models whose words are known in advance, dgnctl in this process.

Their tokenizer has one token a byte, so every stop text of two characters crosses a token border.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import TestNode
from tiny_llama import SPECIAL_TOKENS, VOCAB_SIZE, TinyLlama, make_tiny_llama, random_weights, write_weights

from dgn_backends.weights import HEAD
from dgnctl.cli import run_command

BOS, IM_START, IM_END = 1, 3, 4
EMBEDDING = "model.embed_tokens.weight"

#: What a scripted model says after a line break, which ends every ChatML prompt for an answer.
ANSWER = "abcdefghijklmnopqrstuvwxyz."
#: What it says after "A": characters of four and three bytes.
EMOJI = "😀日B"
NUL = len(SPECIAL_TOKENS)
CHAINS = ("\n" + ANSWER + "\0", "A" + EMOJI + "\0")


def byte_ids(text: str) -> list[int]:
    """The token ids of bare text, without BOS."""
    return [len(SPECIAL_TOKENS) + byte for byte in text.encode()]


def chat_ids(*turns: tuple[str, str]) -> list[int]:
    """The ids of a ChatML conversation that asks for an answer."""
    ids: list[int] = []
    for role, text in turns:
        ids += [IM_START, *byte_ids(f"{role}\n{text}"), IM_END, *byte_ids("\n")]
    return [*ids, IM_START, *byte_ids("assistant\n")]


def scripted_model(directory: Path, chains: Sequence[str] = CHAINS, **overrides: object) -> Path:
    """A model whose blocks add nothing and whose head knows each token's successor: greedy text is known.

    Each byte of a chain is followed by the next one; "\0" stands for <|im_end|>, which ends answers.
    """
    tiny = TinyLlama(hidden_size=96, eos=[2, IM_END], **overrides)  # type: ignore[arg-type]  # names are checked by TinyLlama
    make_tiny_llama(directory, tiny)
    weights = random_weights(directory, tiny)
    for name, array in weights.items():
        if name.endswith("_proj.weight"):
            array[...] = 0.0
        elif name.endswith("norm.weight"):
            array[...] = 1.0
    head = np.zeros_like(weights[HEAD])
    for chain in chains:
        for token, following in itertools.pairwise(byte_ids(chain)):
            head[IM_END if following == NUL else following] += weights[EMBEDDING][token]
    weights[HEAD] = head
    write_weights(directory, weights)
    return directory


def readable_model(directory: Path, **overrides: object) -> Path:
    """A random model that greedily picks printable ASCII, and so never ends by itself."""
    tiny = TinyLlama(**overrides)  # type: ignore[arg-type]  # names are checked by TinyLlama
    make_tiny_llama(directory, tiny)
    weights = random_weights(directory, tiny)
    shown = set(byte_ids("".join(map(chr, range(0x21, 0x7F)))))
    for token in set(range(VOCAB_SIZE)) - shown:
        weights[HEAD][token] = 0.0
    write_weights(directory, weights)
    return directory


class Dgnctl:
    """dgnctl in this process, against a node: what it prints and how it ends, without a process's start."""

    def __init__(self, node: TestNode, capfd: pytest.CaptureFixture[str]) -> None:
        self._node = node
        self._capfd = capfd

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._capfd.readouterr()
        code = run_command(["--socket", str(self._node.socket), *arguments])
        out, err = self._capfd.readouterr()
        return code, out, err

    def json(self, *arguments: str) -> Any:
        """The one line of a --json command that works, and nothing else."""
        code, out, err = self(arguments[0], "--json", *arguments[1:])
        assert (code, err, out.count("\n"), out[-1:]) == (0, "", 1, "\n"), (out, err, self._node.log)
        return json.loads(out)

    def error(self, *arguments: str) -> Any:
        """The error of a --json command that fails; with `exit`, its exit code."""
        code, out, err = self(arguments[0], "--json", *arguments[1:])
        assert code != 0
        assert (err, out.count("\n"), out[-1:]) == ("", 1, "\n")
        error = json.loads(out)["error"]
        assert list(error) == ["code", "kind", "message", "data"]
        return {**error, "exit": code}

    def run(self, prompt: str, *options: str) -> Any:
        """`run --raw --json`."""
        return self.json("run", "--raw", *options, prompt)


def spans(result: Any) -> Sequence[tuple[str, str]]:
    """The route of a result: names and spans."""
    return [(hop["name"], hop["span"]) for hop in result["route"]]
