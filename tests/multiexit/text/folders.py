"""A GLUE folder that a small encoder learns, in the classic layout, and the folder of such an encoder."""

from __future__ import annotations

import random

import torch
from transformers import AutoModel, BertConfig

from tests.multiexit.text.tiny import WORDS, tokenizer

FILLERS = ("a", "b", "c", "film", "plot", "is", "was", "the", "very")
HEADS = {
    "SST-2": ("sentence", "label"),
    "MRPC": ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "STS-B": (
        "index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score",
    ),
}  # fmt: skip


def glue(folder, train=64, dev=40):
    """Write SST-2, MRPC and STS-B: "good" and "bad" decide."""
    chance = random.Random(0)
    for name, head in HEADS.items():
        (folder / name).mkdir(parents=True)
        for split, rows in (("train", train), ("dev", dev)):
            lines = [head, *(_row(name, number, chance) for number in range(rows))]
            (folder / name / f"{split}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    return folder


def _row(task, number, chance):
    good, same = number % 2, chance.random() < 0.6
    first = _text("good" if good else "bad", chance)
    if task == "SST-2":
        return first, str(good)
    second = _text("good" if good == same else "bad", chance)
    if task == "MRPC":
        return str(int(same)), "1", "2", first, second
    return str(number), *["none"] * 6, first, second, f"{5.0 * same:.1f}"


def _text(word, chance):
    words = chance.choices(FILLERS, k=chance.randint(1, 7))
    words.insert(chance.randint(0, len(words)), word)
    return " ".join(words)


def backbone(folder, layers=3, dropout=0.1):
    """Write an encoder of width 16 with random weights and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, initializer_range=0.3, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
    model.save_pretrained(folder)
    tokenizer(folder)
    return folder
