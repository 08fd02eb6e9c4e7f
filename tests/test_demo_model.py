"""The bundled demo model: its limits, what it answers, and that all it names exists.

Knows nothing of daemons; the greedy loop is the one of the training script.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import numpy as np
import pytest
from safetensors import safe_open

from dgn_backends.bundled import bundled_model

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts" / "demo_model"))

import demo_data  # noqa: E402 (its folder is no package)

INTENTS = {intent.id: intent for intent in demo_data.load_intents()}
#: The words of the chat that begin with a slash and that an answer may name.
CHAT_COMMANDS = {"/save", "/load", "/clear"}


def model_dir() -> Path:
    found = bundled_model("dgn-demo")
    assert found is not None, "dgn-demo is not there: make demo-model"
    return found


def read_json(name: str) -> Any:
    return json.loads((model_dir() / name).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the files


def test_config_is_a_small_llama_with_grouped_queries() -> None:
    config = read_json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == 8
    assert 0 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 512
    assert config["torch_dtype"] == "bfloat16"


def test_weights_are_bf16_and_within_the_limits() -> None:
    file = model_dir() / "model.safetensors"
    assert file.stat().st_size <= 6_000_000
    parameters = 0
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (safe_open is not iterable)
            part = tensors.get_slice(name)
            assert part.get_dtype() == "BF16", name
            parameters += int(np.prod(part.get_shape()))
    assert parameters <= 3_000_000
    assert parameters == read_json("training_report.json")["parameters"]


def test_tokenizer_has_the_chatml_template_and_its_ends() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    assert (
        end == read_json("config.json")["eos_token_id"] == read_json("generation_config.json")["eos_token_id"]
    )
    assert read_json("tokenizer_config.json")["eos_token"] == "<|im_end|>"
    template = read_json("tokenizer_config.json")["chat_template"]
    assert "<|im_start|>" in template
    assert "add_generation_prompt" in template
    assert tokenizer.get_vocab_size() == read_json("config.json")["vocab_size"]
    odd = "zażółć 漢字 🙂 \x00\ttab\n<end>"
    assert tokenizer.decode(tokenizer.encode(odd, add_special_tokens=False).ids) == odd


def test_template_writes_what_the_model_was_trained_on() -> None:
    pytest.importorskip("torch")
    import train
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        read_json("tokenizer_config.json")["chat_template"]
    )
    intent = INTENTS["connect"]
    talk = demo_data.Conversation(demo_data.SYSTEM_PROMPT, (("One?", intent), ("Two?", intent)))
    messages = [{"role": "system", "content": talk.system}]
    for question, said in talk.turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said.answer}]
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    encoder = train.Encoder(tokenizer)
    assert template.render(messages=messages) == tokenizer.decode(
        encoder.conversation(talk)[0], skip_special_tokens=False
    )
    assert template.render(messages=messages[:2], add_generation_prompt=True) == tokenizer.decode(
        encoder.prompt("One?", talk.system), skip_special_tokens=False
    )


# ---------------------------------------------------------------- the questions and answers


def test_required_terms_tell_the_answers_apart() -> None:
    for intent in INTENTS.values():
        assert intent.required, intent.id
        assert demo_data.is_right(intent.answer, intent, INTENTS.values()), intent.id


def test_held_out_questions_are_many_and_name_known_intents() -> None:
    own, _readme = (
        demo_data.load_questions(demo_data.HELD_OUT_DIR / name) for name in demo_data.HELD_OUT_FILES
    )
    assert len(own) >= 60
    assert {intent for intent, _ in demo_data.load_held_out()} <= set(INTENTS)


@cache
def training_questions() -> frozenset[str]:
    """Every question the committed model was trained on, made again from the seed of its report."""
    pytest.importorskip("torch")
    import train

    report = read_json("training_report.json")
    digest = hashlib.sha256()
    questions = set()
    for batch in demo_data.conversations(
        report["seed"], report["steps"], report["turns_per_step"], train.overlap_filter()
    ):
        for talk in batch:
            for question, _ in talk.turns:
                digest.update(question.encode() + b"\n")
                questions.add(question)
    assert digest.hexdigest() == report["training_questions_sha256"], (
        "qa.toml, grammar.toml or a held-out file changed since the model was trained: make demo-model"
    )
    return frozenset(questions)


def test_no_held_out_question_shares_more_than_half_of_its_bigrams_with_a_training_question() -> None:
    where: dict[tuple[str, str], set[int]] = {}
    held_out = [(q, word_pairs(q)) for _, q in demo_data.load_held_out()]
    for index, (question, pairs) in enumerate(held_out):
        assert pairs, f"too short to be told apart from training questions: {question}"
        for pair in pairs:
            where.setdefault(pair, set()).add(index)
    for question in training_questions():
        pairs = word_pairs(question)
        for index in {i for pair in pairs for i in where.get(pair, ())}:
            shared = len(pairs & held_out[index][1]) / len(held_out[index][1])
            assert shared <= 0.5, f"{held_out[index][0]!r} is too near to {question!r}"


def word_pairs(text: str) -> set[tuple[str, str]]:
    """Counted here anew, so that a mistake in the training script's own filter shows."""
    words = re.findall(r"[a-z0-9]+(?:['._/-][a-z0-9]+)*", text.lower())
    return set(itertools.pairwise(words))


# ---------------------------------------------------------------- the answers


@cache
def generated_answers() -> tuple[tuple[str, str, str], ...]:
    """(intent, held-out question, greedy answer) of the committed model."""
    pytest.importorskip("torch")
    import train

    model, tokenizer = train.read_model(model_dir())
    encoder = train.Encoder(tokenizer)
    asked = demo_data.load_held_out()
    answers: list[str] = []
    for first in range(0, len(asked), 64):
        prompts = [encoder.prompt(question) for _, question in asked[first : first + 64]]
        answers += [tokenizer.decode(ids) for ids in train.greedy(model, prompts, train.IM_END)]
    return tuple((i, q, a) for (i, q), a in zip(asked, answers, strict=True))


@pytest.mark.timeout(300)
def test_held_out_questions_are_answered_right() -> None:
    """All held-out questions together; the report in the model's folder lists the wrong ones."""
    wrong = [
        f"[{intent}] {question} -> {answer}"
        for intent, question, answer in generated_answers()
        if not demo_data.is_right(answer, INTENTS[intent], INTENTS.values())
    ]
    asked = len(generated_answers())
    assert asked >= 60
    assert len(demo_data.load_questions(demo_data.HELD_OUT_DIR / "demo_heldout_readme.tsv")) >= 30
    assert len(wrong) <= 0.2 * asked, f"{len(wrong)} of {asked}\n" + "\n".join(wrong)


def test_follow_up_questions_and_a_system_prompt_do_not_confuse_it() -> None:
    pytest.importorskip("torch")
    import train

    model, tokenizer = train.read_model(model_dir())
    encoder = train.Encoder(tokenizer)
    first = "How do I connect a peer?"
    for system in ("", demo_data.SYSTEM_PROMPT):
        [ids] = train.greedy(model, [encoder.prompt(first, system)], train.IM_END)
        answer = tokenizer.decode(ids)
        assert demo_data.is_right(answer, INTENTS["connect"], INTENTS.values()), answer
        said = encoder.conversation(demo_data.Conversation(system, ((first, INTENTS["connect"]),)))[0]
        for question, wanted in (("Thank you!", "thanks"), ("And what is a span?", "span")):
            [ids] = train.greedy(model, [said + encoder.prompt(question)], train.IM_END)
            answer = tokenizer.decode(ids)
            assert demo_data.is_right(answer, INTENTS[wanted], INTENTS.values()), answer


# ---------------------------------------------------------------- what answers name


@cache
def commands(module: str) -> click.Command:
    """The one click group that the program's module defines."""
    [group] = [v for v in vars(importlib.import_module(module)).values() if isinstance(v, click.Group)]
    return group


def tree(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from tree(child)


@cache
def option_names() -> frozenset[str]:
    every = [c for module in ("dgnctl.cli", "dgnd.main") for c in tree(commands(module))]
    return frozenset(
        o for c in every for p in c.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")
    )


def sections() -> dict[str, set[str]]:
    """`[node]` and the like, as written in dgn.toml, with the keys of each."""
    from dgnd.config.schema import Config

    found: dict[str, set[str]] = {}
    for field in msgspec.structs.fields(Config):
        inner = next(
            (t for t in get_args(field.type) if isinstance(t, type) and issubclass(t, msgspec.Struct)), None
        )
        kind = field.type if inner is None else inner
        origin = getattr(field.type, "__origin__", None)
        header = {dict: f"[{field.encode_name}.", tuple: f"[[{field.encode_name}]]"}.get(
            origin, f"[{field.encode_name}]"
        )
        assert isinstance(kind, type), field
        found[header] = {f.encode_name for f in msgspec.structs.fields(kind)}
    return found


def unknown_names(answer: str) -> list[str]:
    """Commands, options, sections, keys, targets and files that `answer` names and that do not exist."""
    unknown = []
    for program, module in (("dgnctl", "dgnctl.cli"), ("dgnd", "dgnd.main")):
        for words in re.findall(rf"\b{program}((?: [a-z]+\b)*)", answer):
            unknown += unknown_subcommand(program, commands(module), words.split(), answer)
    unknown += [o for o in re.findall(r"(?<![\w-])--[a-z][a-z-]*", answer) if o not in option_names()]
    known = sections()
    keys = {key for names in known.values() for key in names}
    for header in re.findall(r"\[\[?[\w.]+\]\]?", answer):
        written = re.sub(r"\.\w+\]$", ".", header)
        if written not in known and header != "[peers]":
            unknown.append(header)
    unknown += [k for k in re.findall(r"\b([a-z_]+) = ", answer) if k not in keys]
    unknown += [k for k in re.findall(r"(?<![\w/])[a-z]+(?:_[a-z]+)+\b(?!/|\.\w)", answer) if k not in keys]
    unknown += [c for c in re.findall(r"(?<!\S)/[a-z]+\b(?!/)", answer) if c not in CHAT_COMMANDS]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    unknown += [
        f"make {t}"
        for t in re.findall(r"\bmake ((?:demo|test|check|deb|bench)[a-z-]*)", answer)
        if t not in targets
    ]
    for path in re.findall(r"\b(?:docs|packaging|scripts)/[\w./-]*\w|\bdgn\.toml\.example\b", answer):
        if not (REPOSITORY / path).exists():
            unknown.append(path)
    return unknown


def unknown_subcommand(program: str, group: click.Command, words: list[str], answer: str) -> list[str]:
    """The words behind `dgnctl` or `dgnd`: a command where one is named, else prose ("dgnctl is")."""
    if not words or words[0] in PROSE:
        return []
    for word in words[:2]:
        if not isinstance(group, click.Group):
            break
        child = group.get_command(click.Context(group), word)
        if child is None:
            return [f"{program} {' '.join(words)}"]
        group = child
    return []


#: Words that follow the programs' names in sentences about them.
PROSE = {"is", "as", "already", "behind", "found", "for", "over", "runs", "tells", "of"}


def test_the_check_of_names_finds_what_does_not_exist() -> None:
    for wrong in (
        "dgnctl frobnicate shows it.", "dgnctl cache frob", "dgnd serve", "Use --frob.", "See [frob].",
        'Set frob = "x".', "Set frob_dir.", "Type /frob.", "Run make test-frob.", "Read docs/frob.md.",
        "[[frob]]", "[frob.NAME]",
    ):  # fmt: skip
        assert unknown_names(wrong), wrong
    right = 'dgnctl cache clear, dgnd check --config, [peers.NAME], state_dir = "x", make demo, /save'
    assert unknown_names(right) == []


@pytest.mark.parametrize("intent", INTENTS)
def test_answers_name_only_what_exists(intent: str) -> None:
    assert unknown_names(INTENTS[intent].answer) == []


@pytest.mark.timeout(300)
def test_generated_answers_name_only_what_exists() -> None:
    assert {q: names for _, q, a in generated_answers() if (names := unknown_names(a))} == {}
