"""What is trained in the benchmarks: a multi-exit BERT, a multi-exit ResNet-56 and an MLP of many small tensors.

Shapes: N rows of a batch, L tokens, M exits, C classes; stacked logits are (M, N, C).

Inputs and labels are random: what a step costs does not depend on what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradalign.multiexit import MultiExitResNet, objectives

Groups = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""Stacked logits and labels to named losses."""

Case = Callable[[str, bool], "Workload"]
"""Makes a workload on a device, small where it has to be quick."""

PROBED_SHARE = 4
"""A probe evaluates the auxiliary losses on one row in so many."""

# A step must change the parameters as training does, and yet leave every step the same work to do: with a rate this
# small no loss runs off, however many steps are taken.
_LEARNING_RATE = 1e-6


def pair(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the groups of GAML-BERT: cross-entropy of all exits, and distillation among them."""
    return {
        "ce": objectives.weighted_cross_entropy(logits, labels),
        "kd": objectives.mutual_distillation(logits, reduction="mean"),
    }


def each_exit(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return each exit's cross-entropy as a group of its own."""
    return {f"exit{m}": F.cross_entropy(exit_logits, labels) for m, exit_logits in enumerate(logits, 1)}


def shares_of_exits(K: int) -> Groups:
    """Return what makes K groups of the exits: each the mean cross-entropy of as many neighbours."""

    def groups(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {
            f"share{k}": torch.stack([F.cross_entropy(exit_logits, labels) for exit_logits in share]).mean()
            for k, share in enumerate(logits.chunk(K), 1)
        }

    return groups


@dataclass(eq=False)
class Workload:
    """A model, a batch, the losses and the inner optimizer.

    Attributes:
        title: What it is, for a table.
        model: Maps inputs to stacked logits (M, N, C).
        inputs: (N, ...).
        labels: (N,).
        groups: What makes losses of the logits.
        inner: The optimizer of the model's parameters.
        autocast: The dtype of ``torch.autocast`` around the model, or None for none.
    """

    title: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    groups: Groups
    inner: torch.optim.Optimizer
    autocast: torch.dtype | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The model's parameters."""
        return list(self.model.parameters())

    @property
    def gradient_bytes(self) -> int:
        """P, in bytes: what one group's gradient takes."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)

    @property
    def has_probe(self) -> bool:
        """Whether one loss is the anchor's and the other can be evaluated on a part of the batch."""
        return self.groups is pair

    def logits(self, rows: int | None = None) -> Tensor:
        """Return the logits (M, rows, C) of the first rows, of all by default."""
        device = self.inputs.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            logits: Tensor = self.model(self.inputs[:rows])
        return logits.float()

    def losses(self) -> dict[str, Tensor]:
        """Return every group's loss on the whole batch."""
        return self.groups(self.logits(), self.labels)

    def anchor_loss(self) -> dict[str, Tensor]:
        """Return the anchor's loss alone."""
        return {"ce": objectives.weighted_cross_entropy(self.logits(), self.labels)}

    def probe(self) -> dict[str, Tensor]:
        """Return the auxiliary loss, on the first quarter of the batch."""
        rows = max(1, len(self.inputs) // PROBED_SHARE)
        return {"kd": objectives.mutual_distillation(self.logits(rows), reduction="mean")}

    def clear(self) -> None:
        """Drop the gradients, and what a way that failed may have left at the parameters."""
        for parameter in self.parameters:
            parameter.grad = None
            if hasattr(parameter, "jac"):  # TorchJD's Jacobians lie there until they are aggregated
                del parameter.jac


class EncoderLayer(nn.Module):
    """BERT's layer: self-attention and a feed-forward network of four times the width, each normalised after its sum.

    Args:
        width: Of the hidden states.
        heads: Of the attention; they share the width.
        dropout: Probability, of attention and of both sums.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attention_norm, self.output_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (N, L, width) to those of the next layer."""
        query, key, value = (
            project(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        drop = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=drop).transpose(1, 2).flatten(-2)
        hidden = self.attention_norm(hidden + self.dropout(self.mix(attended)))
        fed = self.narrow(F.gelu(self.widen(hidden)))
        return self.output_norm(hidden + self.dropout(fed))


class MultiExitBERT(nn.Module):
    """BERT with an exit after every layer: one pooler that the exits share, and a linear head each.

    Args:
        layers: M, and the number of exits.
        width: Of the hidden states.
        heads: Of the attention.
        vocabulary: Number of words.
        positions: The most tokens of a row.
        num_classes: C.
        dropout: Probability.
    """

    def __init__(
        self,
        layers: int = 6,
        width: int = 384,
        heads: int = 6,
        vocabulary: int = 30522,
        positions: int = 512,
        num_classes: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.types = nn.Embedding(2, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.exits = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token numbers (N, L), all of the first type, to stacked logits (M, N, C)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        embedded = self.words(tokens) + self.positions(places) + self.types(torch.zeros_like(tokens))
        hidden = self.dropout(self.norm(embedded))
        logits = []
        for layer, head in zip(self.layers, self.exits, strict=True):
            hidden = layer(hidden)
            logits.append(head(self.dropout(torch.tanh(self.pooler(hidden[:, 0])))))
        return torch.stack(logits)


class MultiExitMLP(nn.Module):
    """Linear layers of one width with ReLU between them, and exits at even distances, the last one at the end.

    Args:
        layers: Number of hidden layers.
        width: Of all of them, and of the inputs.
        num_exits: M, a divisor of ``layers``.
        num_classes: C.
    """

    def __init__(self, layers: int = 100, width: int = 64, num_exits: int = 5, num_classes: int = 10) -> None:
        super().__init__()
        self.stride = layers // num_exits
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.exits = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(num_exits))
        for layer in self.layers:  # so that neither signals nor gradients fade over a hundred layers
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, hidden: Tensor) -> Tensor:
        """Map inputs (N, width) to stacked logits (M, N, C)."""
        logits = []
        for number, layer in enumerate(self.layers, 1):
            hidden = F.relu(layer(hidden))
            if number % self.stride == 0:
                logits.append(self.exits[number // self.stride - 1](hidden))
        return torch.stack(logits)


def bert(
    groups: Groups,
    device: str = "cpu",
    shape: Sequence[int] = (32, 32),
    autocast: torch.dtype | None = None,
    **sizes: Any,  # noqa: ANN401, those of MultiExitBERT, whatever their types
) -> Workload:
    """Return a multi-exit BERT under AdamW.

    Args:
        groups: What makes losses of the logits.
        device: Where it is trained.
        shape: (N, L), rows and tokens of a batch.
        autocast: As in ``Workload``.
        sizes: As ``MultiExitBERT`` takes them.
    """
    torch.manual_seed(0)
    model = MultiExitBERT(**sizes).to(device)
    tokens = torch.randint(model.words.num_embeddings, tuple(shape), device=device)
    labels = torch.randint(model.exits[0].out_features, tuple(shape[:1]), device=device)
    inner = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    named = "float32" if autocast is None else f"autocast to {str(autocast).removeprefix('torch.')}"
    title = f"BERT {len(model.layers)} x {model.pooler.in_features}, batch {shape[0]} x {shape[1]}, {named}, AdamW"
    return Workload(title, model, tokens, labels, groups, inner, autocast)


def resnet(groups: Groups, device: str = "cpu", batch: int = 128, exits: str = "block", depth: int = 56) -> Workload:
    """Return a multi-exit ResNet on images of 32 pixels, under SGD with momentum.

    Args:
        groups: What makes losses of the logits.
        device: Where it is trained.
        batch: N.
        exits: As ``MultiExitResNet`` takes it.
        depth: Layers with weights, 6n + 2.
    """
    torch.manual_seed(0)
    model = MultiExitResNet(depth=depth, exits=exits).to(device)
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    inner = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9)
    title = f"ResNet-{depth}, {model.num_exits} exits, batch {batch}, float32, SGD"
    return Workload(title, model, images, labels, groups, inner)


def mlp(groups: Groups, device: str = "cpu", batch: int = 128, **sizes: int) -> Workload:
    """Return a multi-exit MLP under SGD with momentum.

    Args:
        groups: What makes losses of the logits.
        device: Where it is trained.
        batch: N.
        sizes: As ``MultiExitMLP`` takes them.
    """
    torch.manual_seed(0)
    model = MultiExitMLP(**sizes).to(device)
    width = model.layers[0].in_features
    inputs, labels = torch.randn(batch, width, device=device), torch.randint(10, (batch,), device=device)
    inner = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9)
    title = f"MLP {len(model.layers)} x {width}, {len(model.exits)} exits, batch {batch}, float32, SGD"
    return Workload(title, model, inputs, labels, groups, inner)


_QUICK = {"width": 128, "heads": 2, "vocabulary": 4000}


def _bert_case(shape: Sequence[int], groups: Groups, autocast: torch.dtype | None = None, **sizes: int) -> Case:
    def case(device: str, quick: bool) -> Workload:
        if quick:
            return bert(groups, device, (4, 16), autocast, **sizes | _QUICK)
        return bert(groups, device, shape, autocast, **sizes)

    return case


_SMALL = partial(_bert_case, (32, 32))
_BASE = partial(_bert_case, (32, 128), layers=12, width=768, heads=12)
CASES: dict[str, Case] = {
    "bert": _SMALL(pair),
    "bert-exits": _SMALL(each_exit),
    "resnet": lambda device, quick: resnet(pair, device, 8 if quick else 128),
    "resnet-exits": lambda device, quick: resnet(each_exit, device, 8 if quick else 128, "shallow-deep"),
    "mlp": lambda device, quick: mlp(pair, device),
    "mlp-exits": lambda device, quick: mlp(each_exit, device),
    "bert-base": _BASE(pair),
    "bert-base-exits": _BASE(each_exit),
    "bert-base-bf16": _BASE(pair, torch.bfloat16),
    "bert-base-bf16-exits": _BASE(each_exit, torch.bfloat16),
}
"""A case's name to what makes it."""


def cases(device: str) -> list[str]:
    """Return the cases that a device takes: BERT-base is for an accelerator."""
    return [name for name in CASES if device != "cpu" or not name.startswith("bert-base")]
