"""Trains the bundled demo model `dgn-demo` from nothing but this folder, from a seed, on two CPU cores.

    python scripts/demo_model/train.py            # writes backends/dgn_backends/models/dgn-demo

Questions that share more than half of the word bigrams of a held-out question never enter the training set
(demo_data.OverlapFilter); the training report records how many were dropped and a digest of the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_data import (
    HERE,
    SYSTEM_PROMPT,
    Conversation,
    OverlapFilter,
    conversations,
    is_right,
    load_held_out,
    load_intents,
    load_questions,
)
from demo_llama import Llama, Shape, greedy
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TARGET = HERE.parents[1] / "backends" / "dgn_backends" / "models" / "dgn-demo"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = range(3)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEED, STEPS, TURNS_PER_BATCH, VOCAB, CUT = 1, 2400, 64, 2048, 6
PEAK_LR, WARMUP, WEIGHT_DECAY = 3e-3, 100, 0.1


def train_tokenizer(batches: Iterator[list[Conversation]]) -> Tokenizer:
    """Byte-level BPE on the questions and answers of some batches."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = (
        [i.answer for i in load_intents()] * 20
        + [SYSTEM_PROMPT] * 20
        + ["system\n", "user\n", "assistant\n"] * 500
    )
    lines += [question for batch in batches for talk in batch for question, _ in talk.turns]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


class Encoder:
    """Turns conversations into ids and loss weights, ChatML as in CHAT_TEMPLATE."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _message(self, role: str, text: str) -> list[int]:
        return [IM_START, *self._plain(f"{role}\n{text}"), IM_END, *self._plain("\n")]

    def prompt(self, question: str, system: str = "") -> list[int]:
        head = self._message("system", system) if system else []
        return [*head, *self._message("user", question), IM_START, *self._plain("assistant\n")]

    def conversation(self, talk: Conversation) -> tuple[list[int], list[bool]]:
        """ids and, for each, whether it is to be predicted: only what the assistant says is."""
        ids: list[int] = []
        said_by_it: list[bool] = []
        for turn, (question, intent) in enumerate(talk.turns):
            asked = self.prompt(question, talk.system if turn == 0 else "")
            said = [*self._plain(intent.answer), IM_END]
            newline = self._plain("\n")
            if talk.cut and turn == len(talk.turns) - 1:
                said, newline = said[:CUT], []
            ids += asked + said + newline
            said_by_it += [False] * len(asked) + [True] * len(said) + [False] * len(newline)
        return ids, said_by_it

    def batch(self, talks: list[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
        """[conversations, positions] ids, padded at the right, and which are to be predicted (bool)."""
        rows = [self.conversation(talk) for talk in talks]
        # Few different lengths: torch keeps buffers and kernels for each.
        length = -(-max(len(ids) for ids, _ in rows) // 16) * 16 + 1
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        wanted = torch.zeros(len(rows), length, dtype=torch.bool)
        for at, (row, said_by_it) in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
            wanted[at, : len(row)] = torch.tensor(said_by_it)
        return ids, wanted


def accuracy(model: Llama, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> tuple[float, list[str]]:
    """Share of right answers, and a line for each wrong one."""
    intents = {i.id: i for i in load_intents()}
    encoder = Encoder(tokenizer)
    answers = greedy(model, [encoder.prompt(question) for _, question in pairs], IM_END)
    wrong = []
    for (intent, question), ids in zip(pairs, answers, strict=True):
        text = tokenizer.decode(ids)
        if not is_right(text, intents[intent], intents.values()):
            wrong.append(f"[{intent}] {question} -> {text}")
    return 1 - len(wrong) / len(pairs), wrong


def optimizers(model: Llama) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    return (
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    )


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_LR * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def write_model(target: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """A Hugging Face directory: weights in bf16, config, tokenizer with the ChatML template."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(target / "tokenizer.json"))
    ids = {"bos_token_id": None, "eos_token_id": IM_END, "pad_token_id": END_OF_TEXT}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.shape.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, value in (
        ("config.json", config),
        ("generation_config.json", {**ids, "do_sample": False, "max_new_tokens": 96}),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (target / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_model(source: Path) -> tuple[Llama, Tokenizer]:
    """What write_model wrote, in f32."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = Llama(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    model.load_state_dict({name: t.float() for name, t in load_file(source / "model.safetensors").items()})
    return model.eval(), Tokenizer.from_file(str(source / "tokenizer.json"))


def overlap_filter() -> OverlapFilter:
    """Keeps every held-out and development question out of the training set."""
    return OverlapFilter(question for _, question in [*load_held_out(), *load_questions(HERE / "dev.tsv")])


def main() -> None:
    parser = argparse.ArgumentParser(description="train the demo model")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2, help="the bits depend on it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()

    overlap = overlap_filter()
    tokenizer = train_tokenizer(conversations(args.seed, 240, TURNS_PER_BATCH, overlap))
    encoder = Encoder(tokenizer)
    model = Llama(Shape(vocab_size=tokenizer.get_vocab_size()))
    count = sum(p.numel() for p in model.parameters())
    both = optimizers(model)
    dev = load_questions(HERE / "dev.tsv")
    print(f"{count:,} parameters, vocabulary {tokenizer.get_vocab_size()}", flush=True)

    curve: list[dict[str, float]] = []
    digest = hashlib.sha256()
    asked = 0
    total = 0.0
    for step, talks in enumerate(conversations(args.seed, args.steps, TURNS_PER_BATCH, overlap)):
        for talk in talks:
            for question, _ in talk.turns:
                digest.update(question.encode() + b"\n")
                asked += 1
        ids, wanted = encoder.batch(talks)
        wanted = wanted[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model.logits(model.hidden(ids[:, :-1])[wanted])
        loss = F.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="sum") / TURNS_PER_BATCH
        for optimizer in both:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps)
            optimizer.step()
        total += loss.item()
        if (step + 1) % 100 == 0:
            point = {
                "step": step + 1,
                "loss": round(total / 100, 4),
                "wall_s": round(time.monotonic() - started, 1),
            }
            total = 0.0
            if (step + 1) % 250 == 0:
                point["dev_accuracy"] = round(accuracy(model, tokenizer, dev)[0], 4)
            curve.append(point)
            print(point, flush=True)

    write_model(args.target, model, tokenizer)
    model, tokenizer = read_model(args.target)
    held_out = load_held_out()
    dev_accuracy, dev_wrong = accuracy(model, tokenizer, dev)
    held_out_accuracy, wrong = accuracy(model, tokenizer, held_out)
    report = {
        "command": "python scripts/demo_model/train.py"
        f" --seed {args.seed} --steps {args.steps} --threads {args.threads}",
        "seed": args.seed,
        "steps": args.steps,
        "turns_per_step": TURNS_PER_BATCH,
        "threads": args.threads,
        "torch": torch.__version__,
        "parameters": count,
        "intents": len(load_intents()),
        "training_questions": asked,
        "training_questions_sha256": digest.hexdigest(),
        "wall_s": round(time.monotonic() - started, 1),
        "dev": {"questions": len(dev), "accuracy": round(dev_accuracy, 4), "wrong": dev_wrong},
        "held_out": {"questions": len(held_out), "accuracy": round(held_out_accuracy, 4), "wrong": wrong},
        "curve": curve,
    }
    (args.target / "training_report.json").write_text(
        json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"dev {dev_accuracy:.1%}, held out {held_out_accuracy:.1%}, {report['wall_s']} s", flush=True)


if __name__ == "__main__":
    main()
