"""Small encoders of every family with random weights, batches for them, and a tokenizer of a few words."""

from __future__ import annotations

import torch
from transformers import (
    AlbertConfig,
    BertConfig,
    BertTokenizerFast,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
)

from gradalign.multiexit import MultiExitEncoder

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL, "a", "b", "c", "d", "e", "f", "g", "good", "bad", "film", "plot", "is", "was", "the", "very")
COMMON = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
CONFIGS = {
    "bert": BertConfig(**COMMON),
    "roberta": RobertaConfig(**COMMON, pad_token_id=1),
    "albert": AlbertConfig(**COMMON, embedding_size=8),
    "distilbert": DistilBertConfig(
        vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=24, max_position_embeddings=40
    ),
    "electra": ElectraConfig(**COMMON, embedding_size=8),
}
KINDS = ("pooler", "linear", "mean", "fastbert", "deebert", "mix")


def network(family="bert", seed=0, **options) -> MultiExitEncoder:
    """A network in evaluation mode; its weights are larger than pretrained ones so that answers differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MultiExitEncoder.from_config(CONFIGS[family], **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval()


def batch(family="bert", lengths=(9, 5, 3, 7), seed=0):
    """Rows of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    ids = torch.randint(5, 50, mask.shape, generator=generator)
    return {"input_ids": ids.masked_fill(mask == 0, CONFIGS[family].pad_token_id or 0), "attention_mask": mask}


def tokenizer(folder) -> BertTokenizerFast:
    """A tokenizer of a few words, written to a folder as a checkpoint has it."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    made = BertTokenizerFast(str(folder / "vocab.txt"))
    made.save_pretrained(folder)
    return made
