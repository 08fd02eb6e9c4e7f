"""Questions and answers of the demo model: reads qa.toml and grammar.toml, makes paraphrases, judges answers.

Knows nothing of tokens or networks. All that is drawn comes from one `random.Random`: a seed gives the same
questions everywhere.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELD_OUT_DIR = HERE.parents[1] / "tests" / "data"
HELD_OUT_FILES = ("demo_heldout.tsv", "demo_heldout_readme.tsv")
SYSTEM_PROMPT = "You are dgn's built-in assistant."
OTHER_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a helpful, honest assistant. Answer in one or two sentences.",
    "You explain software to beginners.",
)
KINDS = ("do", "thing", "cmd", "trouble", "yesno", "q")

_CHOICE = re.compile(r"\{([^{}]*)\}")
_MACRO = re.compile(r"<(\w+)>")
_WORD = re.compile(r"[a-z0-9]+(?:['._/-][a-z0-9]+)*")
_PLAIN = re.compile(r"[a-z']+,?")
_KEYBOARD = {
    "a": "sq", "b": "vn", "c": "xv", "d": "sf", "e": "wr", "f": "dg", "g": "fh", "h": "gj", "i": "uo",
    "j": "hk", "k": "jl", "l": "k", "m": "n", "n": "bm", "o": "ip", "p": "o", "q": "w", "r": "et",
    "s": "ad", "t": "ry", "u": "yi", "v": "cb", "w": "qe", "x": "zc", "y": "tu", "z": "x",
}  # fmt: skip


@dataclass(frozen=True)
class Intent:
    """One thing people ask: its answer, the terms that make an answer right, and phrases by kind."""

    id: str
    answer: str
    required: tuple[str, ...]
    phrases: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Grammar:
    """Macros, openers by kind, noise words by place, and the thesaurus as word -> alternatives."""

    macros: dict[str, tuple[str, ...]]
    openers: dict[str, tuple[str, ...]]
    before: tuple[str, ...]
    after: tuple[str, ...]
    filler: tuple[str, ...]
    thesaurus: dict[str, tuple[str, ...]]


def load_intents(path: Path = HERE / "qa.toml") -> tuple[Intent, ...]:
    """Reads the question-and-answer file."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["intent"]
    return tuple(
        Intent(r["id"], r["answer"], tuple(r["required"]), {k: tuple(r[k]) for k in KINDS if k in r})
        for r in rows
    )


def load_grammar(path: Path = HERE / "grammar.toml") -> Grammar:
    """Reads what all intents share."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    thesaurus: dict[str, set[str]] = defaultdict(set)
    for group in raw["thesaurus"]["sets"]:
        for word in group:
            thesaurus[word].update(w for w in group if w != word)
    return Grammar(
        macros={k: tuple(v) for k, v in raw["macros"].items()},
        openers={k: tuple(v) for k, v in raw["openers"].items()},
        before=tuple(raw["noise"]["before"]),
        after=tuple(raw["noise"]["after"]),
        filler=tuple(raw["noise"]["filler"]),
        thesaurus={k: tuple(sorted(v)) for k, v in thesaurus.items()},
    )


def load_questions(path: Path) -> list[tuple[str, str]]:
    """(intent id, question) pairs of a .tsv file; empty lines and lines that begin with # are skipped."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            intent, tab, question = line.partition("\t")
            if not tab or not question.strip():
                raise ValueError(f"{path}:{number}: expected an intent id, a tab and a question")
            pairs.append((intent.strip(), question.strip()))
    return pairs


def load_held_out() -> list[tuple[str, str]]:
    """All held-out questions, of both authors."""
    return [pair for name in HELD_OUT_FILES for pair in load_questions(HELD_OUT_DIR / name)]


def bigrams(text: str) -> frozenset[tuple[str, str]]:
    """Distinct pairs of neighbouring words, without case and punctuation."""
    words = _WORD.findall(text.lower())
    return frozenset(pairwise(words))


def is_right(answer: str, wanted: Intent, intents: Iterable[Intent]) -> bool:
    """Whether `answer` holds all required terms of `wanted` and the full set of no other intent."""

    def holds(intent: Intent) -> bool:
        return all(term.lower() in answer.lower() for term in intent.required)

    return holds(wanted) and not any(holds(other) for other in intents if other.id != wanted.id)


class OverlapFilter:
    """Tells whether a question shares more than half of the word bigrams of any held-out question."""

    def __init__(self, held_out: Iterable[str]) -> None:
        self._sizes: list[int] = []
        self._where: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, question in enumerate(held_out):
            pairs = bigrams(question)
            self._sizes.append(len(pairs))
            for pair in pairs:
                self._where[pair].append(index)

    def rejects(self, question: str) -> bool:
        shared: dict[int, int] = defaultdict(int)
        for pair in bigrams(question):
            for index in self._where.get(pair, ()):
                shared[index] += 1
        return any(2 * count > self._sizes[index] for index, count in shared.items())


class Paraphraser:
    """Draws questions for an intent; none of them, nor any step of its making, is rejected by the filter."""

    def __init__(self, grammar: Grammar, overlap: OverlapFilter, rng: random.Random) -> None:
        self._grammar = grammar
        self._overlap = overlap
        self._rng = rng
        self.dropped = 0

    def question(self, intent: Intent) -> str:
        while True:
            question = self._draw(intent)
            if question is not None:
                return question
            self.dropped += 1

    def _draw(self, intent: Intent) -> str | None:
        text = self._plain(intent)
        for change in (self._synonyms, self._noise, self._surface):
            if self._overlap.rejects(text):
                return None
            text = change(text)
        return None if self._overlap.rejects(text) else text

    def _plain(self, intent: Intent) -> str:
        rng = self._rng
        kinds = [k for k in KINDS if k in intent.phrases]
        kind = rng.choices(kinds, [len(intent.phrases[k]) ** 0.7 for k in kinds])[0]
        opener = rng.choice(self._grammar.openers[kind])
        return " ".join(self._expand(opener.replace("X", rng.choice(intent.phrases[kind]))).split())

    def _expand(self, text: str) -> str:
        rng = self._rng
        text = _MACRO.sub(lambda m: rng.choice(self._grammar.macros[m[1]]), text)
        while "{" in text:
            text = _CHOICE.sub(lambda m: rng.choice(m[1].split("|")), text)
            text = _MACRO.sub(lambda m: rng.choice(self._grammar.macros[m[1]]), text)
        return text

    def _synonyms(self, text: str) -> str:
        rng = self._rng
        if rng.random() > 0.5:
            return text
        words = text.split()
        for i, word in enumerate(words):
            literal = i > 0 and words[i - 1] in ("dgnctl", "dgnd", "make")
            if not literal and word in self._grammar.thesaurus and rng.random() < 0.5:
                words[i] = rng.choice(self._grammar.thesaurus[word])
        return " ".join(words)

    def _noise(self, text: str) -> str:
        rng, grammar = self._rng, self._grammar
        words = text.split()
        if len(words) > 3 and rng.random() < 0.5:
            rate = rng.choice((0.12, 0.25, 0.4))
            words = [w for w in words if rng.random() > rate or not _PLAIN.fullmatch(w)] or words
        if rng.random() < 0.4:
            for _ in range(rng.randint(1, 3)):
                words.insert(rng.randint(0, len(words)), rng.choice(grammar.filler))
        if len(words) > 4 and rng.random() < 0.1:
            words[rng.randrange(len(words))] = rng.choice(grammar.filler)
        roll = rng.random()
        if roll < 0.25:
            rng.shuffle(words)
        elif roll < 0.33 and len(words) > 3:
            i = rng.randrange(len(words) - 1)
            words[i], words[i + 1] = words[i + 1], words[i]
        if rng.random() < 0.3:
            words.insert(0, rng.choice(grammar.before))
        if rng.random() < 0.25:
            words.append(rng.choice(grammar.after))
        return " ".join(words)

    def _surface(self, text: str) -> str:
        rng = self._rng
        if rng.random() < 0.15:
            text = " ".join(self._typo(w) if rng.random() < 0.2 else w for w in text.split())
        roll = rng.random()
        if roll < 0.6:
            text = re.sub(r"\bi\b(?!\.)", "I", text[:1].upper() + text[1:])
        elif roll < 0.63:
            text = text.upper()
        return text + rng.choice(("?", "?", "?", "?", "", "", ".", "!", " ?", "..."))

    def _typo(self, word: str) -> str:
        rng = self._rng
        if len(word) < 4 or not word.isalpha():
            return word
        i = rng.randrange(1, len(word) - 1)
        return rng.choice(
            (
                word[:i] + word[i + 1 :],
                word[:i] + word[i + 1] + word[i] + word[i + 2 :],
                word[:i] + word[i] + word[i:],
                word[:i] + rng.choice(_KEYBOARD.get(word[i], word[i])) + word[i + 1 :],
            )
        )


@dataclass(frozen=True)
class Conversation:
    """A system prompt ("" for none) and turns of (question, intent).

    `cut`: of the last answer only the beginning is trained on.
    """

    system: str
    turns: tuple[tuple[str, Intent], ...]
    cut: bool = False


def conversations(
    seed: int, batches: int, turns_per_batch: int, overlap: OverlapFilter
) -> Iterator[list[Conversation]]:
    """The training set, batch by batch. All conversations of a batch have the same number of turns.

    Intents are drawn evenly, with more of those whose questions are of all sorts. Most last answers are cut:
    which answer it is shows at its beginning, and the rest is learnt by heart soon enough.
    """
    rng = random.Random(seed)
    intents = load_intents()
    weights = [{"out_of_scope": 4.0, "connect": 2.0}.get(i.id, 1.0) for i in intents]
    paraphraser = Paraphraser(load_grammar(), overlap, rng)
    for _ in range(batches):
        length = rng.choices((1, 2, 3), (0.75, 0.18, 0.07))[0]
        batch = []
        for _ in range(turns_per_batch // length):
            roll = rng.random()
            system = "" if roll < 0.75 else SYSTEM_PROMPT if roll < 0.92 else rng.choice(OTHER_SYSTEM_PROMPTS)
            drawn = rng.choices(intents, weights, k=length)
            turns = tuple((paraphraser.question(i), i) for i in drawn)
            batch.append(Conversation(system, turns, cut=rng.random() < 0.85))
        yield batch
